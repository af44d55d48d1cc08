import Audit
import Frames
import GuestMemory
import HostMemory
import Synchrony

/// Second-stage tables of a host whose TDP MMU is switched off (`tdp_mmu=N`): the guest's own tables are the processor's,
/// and all shadow pages are direct, of one root for each address space. Spec: x86 2.5.
///
/// A fault holds mmu_lock for writing, and takes the pages that it needs from the VM's quota. Leaves are found by their
/// reverse maps; nothing is known of a tree as a whole. What is read without the lock is read with the vCPU's mode saying
/// so, for there is no grace period: whoever frees a page flushes first.
extension ShadowMMU {
    // MARK: What the processor walks

    /// The tables' format and what else was chosen. Caller: this is made for second-stage tables.
    public var secondStage: TDPConfiguration {
        guard let direct else { preconditionFailure("tables that the processor walks for linear addresses") }
        return direct
    }

    /// What points a vCPU's hardware to the tables: the EPTP, or nCR3. Without a root it names the host's page of zeros,
    /// where every access misses. Kernel: `construct_eptp`.
    public func rootPointer(for cpu: VirtualCPU) -> UInt64 {
        let root = cpu.root ?? vm.host.zeroPage
        let direct = secondStage
        guard bits.isEPT else { return root.physicalAddress }
        return EPT.pointer(root: root, levels: direct.levels, accessDirty: direct.accessDirty)
    }

    /// The tables as the walks without a lock and those to the lowest entry see them.
    private func tables(_ root: HostFrame, _ direct: TDPConfiguration) -> RadixTables<TDPFormat> {
        RadixTables(memory: vm.memory.tables, format: TDPFormat(levels: direct.levels), root: root)
    }

    /// The vCPU may have entered or left system management mode: another root. Kernel: `kvm_mmu_reset_context`.
    func changeSpace(_ cpu: VirtualCPU, _ direct: TDPConfiguration) {
        let state = state(of: cpu)
        guard state.role.rawValue != 0, state.role.space != cpu.addressSpaceNumber else { return }
        load(state.format, direct.rootRole(space: cpu.addressSpaceNumber), on: cpu)
    }

    // MARK: Faults

    /// Caller as for `handleFault`. Kernel: `kvm_mmu_page_fault`.
    func handleDirect(_ cpu: VirtualCPU, _ fault: GuestFault, _ direct: TDPConfiguration) -> FaultOutcome {
        if fault.isReserved, let outcome = handleMMIO(cpu, fault, direct) { return outcome }
        // Of a misconfiguration KVM tells nothing.
        let isTold = !fault.isReserved || !bits.isEPT
        if isTold {
            note(
                Event(
                    .fault, guest: fault.frame.number,
                    level: (fault.entryPresent ? 1 : 0) | (fault.isReserved ? 8 : 0),
                    value: UInt64(fault.access.rawValue), extra: UInt64(cpu.number), task: task(cpu)))
        }
        CPUStatistics.bump(cpu.statistics.pf_taken)
        var served = fault
        let outcome = serve(cpu, &served, direct)
        cpu.statistics.count(outcome)
        if isTold {
            note(
                Event(
                    .faultResolved, guest: fault.frame.number, value: outcome.code, extra: UInt64(cpu.number),
                    task: task(cpu)))
        }
        return outcome
    }

    /// Kernel: `direct_page_fault`. Spec: x86 2.5, 2.7. `fault.level` comes to be that of the mapping.
    private func serve(_ cpu: VirtualCPU, _ fault: inout GuestFault, _ direct: TDPConfiguration) -> FaultOutcome {
        let state = state(of: cpu)
        guard let root = state.root else { return state.rootFailure.map { .failed($0) } ?? .retry }
        let slot = cpu.slot(containing: fault.frame)
        if !fault.isPrefetch, let outcome = fixWithoutLock(root.page.table, fault, slot, cpu, direct) {
            CPUStatistics.bump(cpu.statistics.pf_fast)
            return outcome
        }
        guard fillStock(state, to: Self.tablesPerFault) else { return .failed(.ENOMEM) }
        let snapshot = vm.snapshot()
        guard let slot else { return serveNoSlot(cpu, fault, direct) }
        if slot.isInvalid { return fault.isPrefetch ? .failed(.EAGAIN) : .retry }
        if vm.mayBeStale(snapshot, fault.frame) { return .retry }
        switch cpu.faultIn(fault, slot: slot, snapshot: snapshot) {
        case .failed(let error): return FaultFamily.x86.answer(.translation(error), fault.access).outcome
        case .postponed: return .retry
        case .frame(let faulted):
            var request = Request(
                address: fault.address.value, fault: fault,
                walk: GuestWalk(of: fault.frame, level: largestDirectLevel))
            let outcome = resolve(cpu, &request, faulted)
            fault.level = request.fault.level
            return outcome
        }
    }

    private func fixWithoutLock(
        _ root: HostFrame, _ fault: GuestFault, _ slot: MemorySlot?, _ cpu: VirtualCPU, _ direct: TDPConfiguration
    ) -> FaultOutcome? {
        guard LocklessFix.mayHelp(fault, accessDirty: direct.accessDirty) else { return nil }
        let fix = LocklessFix(tables: tables(root, direct), bits: bits, accessDirty: direct.accessDirty)
        cpu.beginReadingTables()
        defer { cpu.endReadingTables() }
        return fix.fix(fault, slot, by: cpu)
    }

    // MARK: Accesses without memory. Spec: x86 1.5, 2.7, 2.8.

    private func handleMMIO(_ cpu: VirtualCPU, _ fault: GuestFault, _ direct: TDPConfiguration) -> FaultOutcome? {
        let state = state(of: cpu)
        guard let root = state.root else { return nil }
        if state.lastMMIO.isOf(fault.frame, vm.slotsGeneration(of: cpu.addressSpaceNumber)) { return .emulate }
        let tables = tables(root.page.table, direct)
        guard fault.frame < tables.end else { return .retry }
        cpu.beginReadingTables()
        let last = direct.lastEntry(in: tables, fault.frame, bits)
        cpu.endReadingTables()
        return answer(last, fault.frame, &state.lastMMIO, cpu)
    }

    /// No page is owned, and no retry check needed: the generation protects these entries. Kernel:
    /// `kvm_handle_noslot_fault`, and the rest of the fault.
    private func serveNoSlot(_ cpu: VirtualCPU, _ fault: GuestFault, _ direct: TDPConfiguration) -> FaultOutcome {
        let state = state(of: cpu)
        state.lastMMIO.note(fault.frame, vm.slotsGeneration(of: cpu.addressSpaceNumber))
        guard direct.keepsMMIO(fault.frame) else { return FaultFamily.x86.answer(.noSlot, fault.access).outcome }
        let guardian = vm.lockMMU()
        let outcome = mark(cpu, state, fault, direct)
        guardian.unlock()
        return outcome
    }

    private func mark(
        _ cpu: VirtualCPU, _ state: ShadowCPU, _ fault: GuestFault, _ direct: TDPConfiguration
    ) -> FaultOutcome {
        guard !hasObsoleteRoot(state), let root = state.root else {
            checkRequest(of: cpu)
            return .retry
        }
        guard makeRoom() else { return .failed(.ENOSPC) }
        var page = root.page
        while page.role.level > 1 {
            let index = shadowIndex(fault.address.value, page.role.level)
            let made = child(page, index, fault.frame.aligned(to: page.level), direct: true, .all, cpu)
            if let made { link(made, page, index) }
            page = made ?? child(entry(page, index).load())
        }
        let position = tables(root.page.table, direct).descend(to: fault.frame, until: .page4K)
        return markMMIO(position, fault, bits, cpu)
    }

    // MARK: Faults that no guest waits for. Spec: x86 2.10, generic 6.2, 6.3.

    /// As `TDPMMU.mapAhead`.
    func mapAhead(_ cpu: VirtualCPU, _ address: GuestAddress, _ direct: TDPConfiguration) throws(Errno) -> PageLevel {
        while true {
            if vm.addressSpace.signals.pending { throw .EINTR }
            dropObsoleteRoots(cpu)
            takeRoot(cpu)
            var fault = GuestFault(address: address, access: .read, entryPresent: false, isPrefetch: true)
            switch serve(cpu, &fault, direct) {
            case .fixed, .spurious, .writeProtected: return fault.level
            case .emulate: throw .ENOENT
            case .failed(.EHWPOISON): throw .EINTR
            case .failed(let errno), .memoryFault(let errno): throw errno
            case .retry: isExplorerAttached ? vm.waitForInvalidations() : yieldProcessor()
            }
        }
    }

    /// As `TDPMMU.mapFetched`.
    func mapFetched(_ cpu: VirtualCPU, _ fault: GuestFault, _ direct: TDPConfiguration) {
        dropObsoleteRoots(cpu)
        takeRoot(cpu)
        var fault = fault
        if serve(cpu, &fault, direct) == .fixed { CPUStatistics.bump(cpu.statistics.pf_fixed) }
    }
}

extension TDPConfiguration {
    func rootRole(space: UInt8) -> PageRole { .tdpRoot(levels: levels, accessDirty: accessDirty, space: space) }
}
