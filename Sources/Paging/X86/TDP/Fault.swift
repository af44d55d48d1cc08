import Audit
import Frames
import GuestMemory
import HostMemory
import Synchrony

/// One guest fault, from the exit to the outcome. Kernel: `kvm_tdp_page_fault`. Spec: x86 2.3, 2.4, 2.7.
///
///     root → fast path → tables → snapshot → slot → translate → mmu_lock → stale? → map → release the page → unlock
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
        if cpu.root == nil { takeRoot(cpu) }
        guard let root = cpu.root else { return .failed(.ENOMEM) }
        let slot = cpu.slot(containing: fault.frame)
        let isPrivate = vm.wantsPrivate(fault)
        if fault.entryPresent, fault.access == .write, !fault.isReserved, isTracked(fault.frame, in: slot) {
            return .writeProtected
        }
        if !fault.isPrefetch, agrees(fault, isPrivate), let outcome = fixWithoutLock(root, fault, slot, by: cpu) {
            CPUStatistics.bump(cpu.statistics.pf_fast)
            return outcome
        }
        guard var reserve = TableReserve(vm.host, count: missingTables(root, fault.frame)) else {
            return .failed(.ENOMEM)
        }
        let snapshot = vm.snapshot()
        // A fault that wants the other kind of memory is userspace's to settle, slot or none.
        guard agrees(fault, isPrivate) else { return memoryFault(cpu, fault, isPrivate, .EFAULT) }
        guard let slot else {
            return isPrivate
                ? memoryFault(cpu, fault, true, .EFAULT) : serveNoSlot(cpu, root, fault, &reserve)
        }
        // A slot on its way out: no MMIO yet, for its entries may still be there. Spec: x86 2.7 step 4.
        // A prefetch would wait for its own caller (6.18; see `VirtualMachine.preFault`).
        if slot.isInvalid { return fault.isPrefetch ? .failed(.EAGAIN) : answer(.invalidSlot, fault) }
        if slot.id == APICAccessPage.slot, let outcome = serveAPIC(cpu, root, fault, &reserve) { return outcome }
        if vm.mayBeStale(snapshot, fault.frame) { return .retry }
        if isPrivate { return servePrivate(cpu, root, &fault, slot, snapshot, &reserve) }
        switch cpu.faultIn(fault, slot: slot, snapshot: snapshot) {
        case .failed(let error): return answer(.translation(error), fault)
        case .postponed: return .retry
        case .frame(let faulted): return resolve(cpu, root, &fault, faulted, &reserve)
        }
    }

    /// No page is owned. Spec: x86 2.7 steps 4 and 8, generic section 7.
    private func answer(_ condition: FaultCondition, _ fault: GuestFault) -> FaultOutcome {
        FaultFamily.x86.answer(condition, fault.access).outcome
    }

    /// Takes mmu_lock, checks, maps, releases the page, unlocks. Spec: x86 2.7 steps 10 and "finish".
    func resolve(
        _ cpu: VirtualCPU, _ root: HostFrame, _ fault: inout GuestFault, _ faulted: consuming FaultedFrame,
        _ reserve: inout TableReserve
    ) -> FaultOutcome {
        if vm.mayBeStale(faulted) {
            faulted.releaseUnused()
            return .retry
        }
        let isWritable = faulted.isWritable
        let guardian = vm.lockMMUForFault()
        let section = tables.enter()
        let outcome = install(cpu, root, &fault, faulted, &reserve, guardian)
        tables.exit(section)
        faulted.finish(use(after: outcome, ofWritable: isWritable), holding: guardian)
        guardian.unlock()
        return outcome
    }

    /// The stale check and the map. Kernel: `is_page_fault_stale`, `kvm_tdp_mmu_map`.
    private func install(
        _ cpu: VirtualCPU, _ root: HostFrame, _ fault: inout GuestFault, _ faulted: borrowing FaultedFrame,
        _ reserve: inout TableReserve, _ guardian: borrowing MMUGuard
    ) -> FaultOutcome {
        // The request to load another root is posted already: the retry ends there (X65).
        guard isValid(root) else {
            checkRequest(of: cpu, on: root)
            return .retry
        }
        let largest = largestLeaf(at: faulted.guestFrame, in: faulted.slot)
        guard let permit = guardian.check(faulted, largest: largest) else { return .retry }
        return map(permit, &fault, faulted.slot, root, &reserve, by: cpu)
    }

    /// The largest leaf that the slot allows; what the host maps is the check's to say. A logged slot has small leaves
    /// only, so that a write is a write to one page. Spec: x86 3.5. Caller holds mmu_lock.
    func largestLeaf(at frame: GuestFrame, in slot: MemorySlot) -> PageLevel {
        guard !slot.isLogged, let counts = slot.largePages else { return .page4K }
        var level = largestPage
        while level > .page4K, !counts.allows(frame, level) { level = level.below }
        return level
    }

    /// How many tables are missing on the way to a 4 KiB leaf. Only a guess: a table can go before the lock is taken,
    /// and the fault then tries again.
    private func missingTables(_ root: HostFrame, _ frame: GuestFrame) -> Int {
        guard frame < view(root).end else { return 0 }
        return withTables { Int(view(root).descend(to: frame, until: .page4K).level.rawValue) - 1 }
    }
}
