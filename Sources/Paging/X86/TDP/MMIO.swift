import Audit
import Frames
import GuestMemory
import HostMemory
import Synchrony

/// Accesses to what no slot contains. Spec: x86 1.5, 2.7 (noslot), 2.8.
///
/// The race that the generation closes: a fault finds no slot, a slot is made, the fault installs "no memory here". The
/// update waits for the fault, which is inside `withSlots`, and only then raises the generation; so whatever the fault
/// has installed is older than the new slot.
extension TDPMMU {
    func cachesMMIO(_ frame: GuestFrame) -> Bool { configuration.keepsMMIO(frame) }

    /// A fault with a reserved bit; see `answer`.
    @inline(never)
    func handleMMIO(_ cpu: VirtualCPU, _ fault: GuestFault) -> FaultOutcome? {
        let state = state(of: cpu)
        if state.lastMMIO.isOf(fault.frame, vm.slotsGeneration(of: cpu.addressSpaceNumber)) { return .emulate }
        guard let root = cpu.root, fault.frame < view(root).end else { return .retry }
        let last = withTables { configuration.lastEntry(in: view(root), fault.frame, bits) }
        return answer(last, fault.frame, &state.lastMMIO, cpu)
    }

    /// A fault without a slot is emulated, and remembered: by the vCPU, and by an entry that makes the next access a quick
    /// exit. No page is owned. Caller as for `serve`. Kernel: `kvm_handle_noslot_fault`, and the rest of the fault.
    ///
    /// No retry check: the generation protects these entries. That of the root stays. Spec: x86 2.7.
    @inline(never)
    func serveNoSlot(
        _ cpu: VirtualCPU, _ root: HostFrame, _ fault: GuestFault, _ reserve: inout TableReserve
    ) -> FaultOutcome {
        state(of: cpu).lastMMIO.note(fault.frame, vm.slotsGeneration(of: cpu.addressSpaceNumber))
        guard cachesMMIO(fault.frame) else { return FaultFamily.x86.answer(.noSlot, fault.access).outcome }
        let guardian = vm.lockMMUForFault()
        let section = tables.enter()
        let outcome = isValid(root) ? mark(cpu, root, fault, &reserve, guardian) : .retry
        tables.exit(section)
        guardian.unlock()
        return outcome
    }

    private func mark(
        _ cpu: VirtualCPU, _ root: HostFrame, _ fault: GuestFault, _ reserve: inout TableReserve,
        _ guardian: borrowing MMUGuard
    ) -> FaultOutcome {
        let role = role(ofRoot: root)
        while true {
            let position = view(root).descend(to: fault.frame, until: .page4K)
            if position.value == EntryBits.frozen { return .retry }
            if position.level == .page4K { return markMMIO(position, fault, bits, cpu) }
            guard let child = reserve.take() else { return .retry }
            let seen = position.entry.observe(holding: guardian)
            if !link(child, at: position, fault.frame, role, seen: seen) {
                vm.host.freeTable(child)
                return .retry
            }
        }
    }

    /// The slots are about to get `generation`. Caller holds slots_lock.
    func slotsChange(to generation: UInt64) {
        guard configuration.cachesMMIO, wrapsMMIO(generation) else { return }
        replaceRoots()
        freeRemovedTables()
    }
}
