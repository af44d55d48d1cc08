import Audit
import Frames
import GuestMemory
import HostMemory
import Synchrony

/// Putting a leaf into the tables. Spec: x86 3.4. Caller: mmu_lock (for reading, as faults do) and a section.
extension TDPMMU {
    /// Goes down to the level that the permit allows, adding tables and splitting huge leaves, and installs. A lost
    /// race, and an entry that is frozen, end in `.retry`. Kernel: `kvm_tdp_mmu_map`.
    ///
    /// A prefetch ends where something is mapped already: `fault.level` says how large. The kernel would split a huge leaf
    /// for it where only small ones are allowed now; the guest's own access does that here.
    func map(
        _ permit: borrowing InstallPermit, _ fault: inout GuestFault, _ slot: Unmanaged<MemorySlot>, _ root: HostFrame,
        _ role: PageRole, _ reserve: inout TableReserve, by cpu: VirtualCPU, _ vm: VirtualMachine
    ) -> FaultOutcome {
        let view = view(root, vm)
        let frame = permit.guestFrame
        let isDisallowed = disallowsHugePage(fault)
        fault.level = isDisallowed ? .page4K : permit.largest
        while true {
            let position = view.descend(to: frame, until: fault.level, racing: true)
            if position.value == EntryBits.frozen, !Defect.frozenOverwritten.isOn { return .retry }
            if position.level == fault.level, fault.level > .page4K, self.isDisallowed(position) {
                fault.level = fault.level.below
                continue
            }
            if position.level == fault.level { return install(permit, fault, slot, position, role, by: cpu, vm) }
            if fault.isPrefetch, EntryBits.isLeaf(position.value, position.level.rawValue) {
                fault.level = position.level
                return .spurious
            }
            if !addTable(permit, at: position, role, isDisallowed: isDisallowed, &reserve) { return .retry }
        }
    }

    /// False: somebody else was faster, or a table is missing that was there when the reserve was made.
    @inline(never)
    private func addTable(
        _ permit: borrowing InstallPermit, at position: RadixPosition, _ role: PageRole, isDisallowed: Bool,
        _ reserve: inout TableReserve
    ) -> Bool {
        guard let child = reserve.take() else { return false }
        let seen = position.entry.observe(holding: permit)
        if !link(child, at: position, permit.guestFrame, role, isDisallowed: isDisallowed, seen: seen) {
            vm.host.freeTable(child)
            return false
        }
        // Nothing but the fetch was against a huge leaf here.
        if isDisallowed && permit.largest >= position.level { trackPossibleHugePage(child) }
        return true
    }

    /// Kernel: `tdp_mmu_map_handle_target_level`. Spec: x86 3.4 step 3.
    private func install(
        _ permit: borrowing InstallPermit, _ fault: GuestFault, _ slot: Unmanaged<MemorySlot>,
        _ position: RadixPosition,
        _ role: PageRole, by cpu: VirtualCPU, _ vm: VirtualMachine
    ) -> FaultOutcome {
        let old = position.value
        let level = position.level
        let wasLeaf = EntryBits.isLeaf(old, level.rawValue)
        if fault.isPrefetch, EntryBits.outlastsPrefetch(old) { return .spurious }
        if wasLeaf && bits.allows(fault.access, old) { return .spurious }
        let mayWrite =
            !tracksFrames || EntryBits.provesWritable(old, level.rawValue)
            || letGuestWrite(permit.guestFrame, slot, prefetch: fault.isPrefetch)
        let isProtected = !mayWrite && permit.writable && fault.access == .write
        let attributes = leafAttributes(
            permit, at: level, role, isTracked: !mayWrite, prefetch: fault.isPrefetch, vm)
        let new = position.entry.value(permit, level, attributes)
        if new == old { return isProtected ? .writeProtected : .spurious }
        // In the log before the guest can write: a harvest in between reports too much at worst. Spec: X44, X47.
        if new & EntryBits.write != 0 {
            let frame = permit.guestFrame
            slot._withUnsafeGuaranteedRef { vm.markDirty(frame, in: $0, by: cpu) }
        }
        schedulingNote(.atomicLoad, position.table.physicalAddress)
        guard position.entry.install(permit, level: level, attributes: attributes, expected: old) == nil else {
            return .retry
        }
        vm.record(
            Event(
                .entryInstalled, frame: EntryBits.field.frame(in: new),
                guest: permit.guestFrame.aligned(to: level).number,
                level: level.rawValue, value: new, extra: old))
        if wasLeaf {
            leafReplaced(old, by: new, permit.guestFrame)
        } else {
            lending(cpu.statistics) { $0.addPage(level: level.rawValue) }
        }
        if vm.memory.isObserved { checkInstalled(old, new, permit.guestFrame, slot, fault, level) }
        if EntryBits.isTable(old, level.rawValue) { tableReplaced(old) }
        return isProtected ? .writeProtected : .fixed
    }

    /// X28, X58 and X59, where they can be broken. Caller holds mmu_lock.
    @inline(never)
    private func checkInstalled(
        _ old: UInt64, _ new: UInt64, _ frame: GuestFrame, _ slot: Unmanaged<MemorySlot>, _ fault: GuestFault,
        _ level: PageLevel
    ) {
        guard let journal = vm.memory.journal else { return }
        let mapped = EntryBits.field.frame(in: new)
        if old == EntryBits.frozen {
            journal.add(Finding(.x28, "a fault wrote over a frozen entry", frame: mapped, guest: frame))
        }
        if EntryBits.isTable(old, level.rawValue), new & EntryBits.write != 0,
            isTracked(frame, in: slot)
                || nested?.forbidsWrites(
                    frame..<frame.advanced(by: 1), in: slot._withUnsafeGuaranteedRef { $0.addressSpace }) ?? false
        {
            journal.add(
                Finding(
                    .x58, "a leaf that replaced a table lets the guest write a tracked frame", frame: mapped,
                    guest: frame))
        }
        if fault.isPrefetch, EntryBits.isPresent(old) {
            journal.add(Finding(.x59, "a prefetch replaced a present entry", frame: mapped, guest: frame))
        }
    }

    /// A leaf took a huge table's place. Stale paging-structure entries go before the section ends, and the table, frozen
    /// by then, after it. Spec: F8.
    @inline(never)
    private func tableReplaced(_ link: UInt64) {
        vm.flushRemoteTLBs()
        remove(EntryBits.field.frame(in: link))
    }

    /// The rights or A/D of a leaf changed in place. The frame may not: whoever changed the host's mapping has zapped the
    /// leaf first. Linux stops the machine there; here it is a finding where a journal listens, and stops else. Losing
    /// HW or MW cannot happen either: Linux warns; it would leave writable TLB entries. Spec: X20, X21, F3.
    @inline(never)
    private func leafReplaced(_ old: UInt64, by new: UInt64, _ frame: GuestFrame) {
        if (old ^ new) & EntryBits.field.mask != 0 {
            guard let journal = vm.memory.journal else { preconditionFailure("a present leaf changes its frame (X21)") }
            journal.add(
                Finding(
                    .x21, "a fault put another frame into a present leaf", frame: EntryBits.field.frame(in: new),
                    guest: frame))
            vm.flushRemoteTLBs()
        } else if old & ~new & (bits.hostWritable | bits.mmuWritable) != 0 {
            vm.memory.journal?.add(
                Finding(
                    .x20, "a fault took from a present leaf what the host allows",
                    frame: EntryBits.field.frame(in: new),
                    guest: frame))
            vm.flushRemoteTLBs()
        }
    }
}
