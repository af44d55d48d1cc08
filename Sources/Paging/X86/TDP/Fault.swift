import Audit
import Frames
import GuestMemory
import HostMemory
import Synchrony

/// One guest fault, from the exit to the outcome. Kernel: `kvm_tdp_page_fault`. Spec: x86 2.3, 2.4, 2.7.
///
///     root → fast path → tables → snapshot → slot → translate → mmu_lock → stale? → map → release the page → unlock
///
/// Nothing on the way counts a reference to an object, and no two vCPUs write one line: the VM is the vCPU's, the slot is
/// borrowed from the section, and what runs seldom stands apart (`@inline(never)`), so that its counting is not on the way.
/// `.ci/fault-path-disassembly.sh` looks at the machine code.
///
/// The page, if one is owned, is released in `resolve` on every way out, before mmu_lock is dropped (X2, I-10).
extension TDPMMU {
    /// Caller: the vCPU's task, inside `withSlots`, no lock held.
    ///
    /// `.failed(.EHWPOISON)` says that the host's page is poisoned: KVM sends SIGBUS for its user address and lets the
    /// run end with EINTR, which is the caller's to do; no other way of failing has that errno. Without memory for a
    /// table or a root the run ends with ENOMEM.
    ///
    /// A prefetch takes no short way: what is there stays as it is (Spec: I-26, X59). The kernel lets one give back rights
    /// that access tracking has taken.
    func serve(_ cpu: VirtualCPU, _ fault: inout GuestFault) -> FaultOutcome {
        lending(cpu.vm) { serve(cpu, &fault, $0) }
    }

    func serve(_ cpu: VirtualCPU, _ fault: inout GuestFault, _ vm: VirtualMachine) -> FaultOutcome {
        guard let root = cpu.root ?? takenRoot(cpu) else { return .failed(.ENOMEM) }
        let slot = cpu.unretainedSlot(containing: fault.frame)
        let isPrivate = vm.wantsPrivate(fault)
        if fault.entryPresent, fault.access == .write, !fault.isReserved, isTracked(fault.frame, in: slot) {
            return .writeProtected
        }
        if !fault.isPrefetch, mayNeedNoLock(fault), agrees(fault, isPrivate, vm),
            let outcome = fixWithoutLock(root, fault, slot, by: cpu)
        {
            lending(cpu.statistics) { CPUStatistics.bump($0.pf_fast) }
            return outcome
        }
        if let slot {
            let address = slot._withUnsafeGuaranteedRef { $0.userAddress(of: fault.frame) }
            lending(vm.addressSpace) { $0.prefetchEntry(of: address) }
        }
        var reserve = TableReserve()
        let missing = missingTables(root, fault.frame, vm)
        if missing > 0, !reserve.fill(vm.host, count: missing) { return .failed(.ENOMEM) }
        let snapshot = vm.snapshot()
        // A fault that wants the other kind of memory is userspace's to settle, slot or none.
        guard agrees(fault, isPrivate, vm) else { return memoryFault(cpu, fault, isPrivate, .EFAULT) }
        guard let slot else {
            return isPrivate
                ? memoryFault(cpu, fault, true, .EFAULT) : serveNoSlot(cpu, root, fault, &reserve)
        }
        // A slot on its way out: no MMIO yet, for its entries may still be there. Spec: x86 2.7 step 4.
        // A prefetch would wait for its own caller (6.18; see `VirtualMachine.preFault`).
        if slot._withUnsafeGuaranteedRef({ $0.isInvalid }) {
            return fault.isPrefetch ? .failed(.EAGAIN) : answer(.invalidSlot, fault)
        }
        if slot._withUnsafeGuaranteedRef({ $0.id }) == APICAccessPage.slot,
            let outcome = serveAPIC(cpu, root, fault, &reserve)
        {
            return outcome
        }
        if vm.mayBeStale(snapshot, fault.frame) { return .retry }
        if isPrivate { return servePrivate(cpu, root, &fault, slot, snapshot, &reserve) }
        switch cpu.faultIn(fault, in: slot, snapshot: snapshot, vm) {
        case .failed(let error): return answer(.translation(error), fault)
        case .postponed: return .retry
        case .frame(let faulted): return resolve(cpu, root, &fault, faulted, slot, &reserve, vm)
        }
    }

    @inline(never)
    private func takenRoot(_ cpu: VirtualCPU) -> HostFrame? {
        takeRoot(cpu)
        return cpu.root
    }

    /// No page is owned. Spec: x86 2.7 steps 4 and 8, generic section 7.
    @inline(never)
    private func answer(_ condition: FaultCondition, _ fault: GuestFault) -> FaultOutcome {
        FaultFamily.x86.answer(condition, fault.access).outcome
    }

    /// Takes mmu_lock, checks, maps, releases the page, unlocks. Spec: x86 2.7 steps 10 and "finish".
    func resolve(
        _ cpu: VirtualCPU, _ root: HostFrame, _ fault: inout GuestFault, _ faulted: consuming FaultedFrame,
        _ slot: Unmanaged<MemorySlot>, _ reserve: inout TableReserve, _ vm: VirtualMachine
    ) -> FaultOutcome {
        if vm.mayBeStale(faulted) {
            faulted.releaseUnused()
            return .retry
        }
        let isWritable = faulted.isWritable
        let guardian = vm.lockMMUForFault()
        let section = tables.enter()
        let outcome = install(cpu, root, &fault, faulted, slot, &reserve, guardian, vm)
        tables.exit(section)
        faulted.finish(use(after: outcome, ofWritable: isWritable), holding: guardian)
        guardian.unlock()
        return outcome
    }

    /// The stale check and the map. Kernel: `is_page_fault_stale`, `kvm_tdp_mmu_map`.
    private func install(
        _ cpu: VirtualCPU, _ root: HostFrame, _ fault: inout GuestFault, _ faulted: borrowing FaultedFrame,
        _ slot: Unmanaged<MemorySlot>, _ reserve: inout TableReserve, _ guardian: borrowing MMUGuard,
        _ vm: VirtualMachine
    ) -> FaultOutcome {
        // The request to load another root is posted already: the retry ends there (X65). A root becomes invalid under
        // mmu_lock for writing.
        let role = lending(vm.host) { RootInfo($0.tableWords(root)).role }
        if role.isInvalid {
            checkRequest(of: cpu, on: root)
            return .retry
        }
        let frame = faulted.guestFrame
        let largest = faulted.mayBeHuge ? slot._withUnsafeGuaranteedRef { largestLeaf(at: frame, in: $0) } : .page4K
        guard let permit = guardian.check(faulted, largest: largest) else { return .retry }
        return map(permit, &fault, slot, root, role, &reserve, by: cpu, vm)
    }

    /// The largest leaf that the slot allows; what the host maps is the check's to say. A logged slot has small leaves
    /// only, so that a write is a write to one page. Spec: x86 3.5. Caller holds mmu_lock.
    func largestLeaf(at frame: GuestFrame, in slot: MemorySlot) -> PageLevel {
        slot.isLogged ? .page4K : slot.largestAllowed(at: frame, upTo: configuration.largestPage)
    }

    /// How many tables are missing on the way to a 4 KiB leaf. Only a guess: a table can go before the lock is taken,
    /// and the fault then tries again.
    ///
    /// The processor is asked for the entry's line meanwhile: it will be written, once the host's tables have been walked.
    @inline(__always)
    private func missingTables(_ root: HostFrame, _ frame: GuestFrame, _ vm: VirtualMachine) -> Int {
        let view = view(root, vm)
        guard frame < view.end else { return 0 }
        let section = tables.enter()
        let position = view.approach(frame)
        tables.exit(section)
        return position
    }
}
