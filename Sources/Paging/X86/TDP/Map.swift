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
        _ permit: borrowing InstallPermit, _ fault: inout GuestFault, _ slot: MemorySlot, _ root: HostFrame,
        _ reserve: inout TableReserve, by cpu: VirtualCPU
    ) -> FaultOutcome {
        let view = view(root)
        let frame = permit.guestFrame
        let role = role(ofRoot: root)
        let isDisallowed = disallowsHugePage(fault)
        fault.level = isDisallowed ? .page4K : permit.largest
        while true {
            let position = view.descend(to: frame, until: fault.level)
            if position.value == EntryBits.frozen { return .retry }
            if position.level == fault.level, fault.level > .page4K, self.isDisallowed(position) {
                fault.level = fault.level.below
                continue
            }
            if position.level == fault.level { return install(permit, fault, slot, position, role, by: cpu) }
            if fault.isPrefetch, EntryBits.isLeaf(position.value, position.level.rawValue) {
                fault.level = position.level
                return .spurious
            }
            guard let child = reserve.take() else { return .retry }
            let seen = position.entry.observe(holding: permit)
            if !link(child, at: position, frame, role, isDisallowed: isDisallowed, seen: seen) {
                vm.host.freeTable(child)
                return .retry
            }
            // Nothing but the fetch was against a huge leaf here.
            if isDisallowed && permit.largest >= position.level { trackPossibleHugePage(child) }
        }
    }

    /// Kernel: `tdp_mmu_map_handle_target_level`. Spec: x86 3.4 step 3.
    private func install(
        _ permit: borrowing InstallPermit, _ fault: GuestFault, _ slot: MemorySlot, _ position: RadixPosition,
        _ role: PageRole, by cpu: VirtualCPU
    ) -> FaultOutcome {
        let old = position.value
        let level = position.level
        let wasLeaf = EntryBits.isLeaf(old, level.rawValue)
        // What is there may be better than what a prefetch would make (I-26): a leaf or a table. Spec: x86 0.1.
        if fault.isPrefetch && old & EntryBits.mmuPresent != 0, !SeriesPatch.prefetchKeepsEntries.isUndone {
            return .spurious
        }
        if wasLeaf && bits.allows(fault.access, old) { return .spurious }
        let mayWrite =
            (wasLeaf && old & EntryBits.write != 0)
            || letGuestWrite(permit.guestFrame, slot, prefetch: fault.isPrefetch)
        let isProtected = !mayWrite && permit.writable && fault.access == .write
        let attributes = leafAttributes(permit, at: level, role, isTracked: !mayWrite, prefetch: fault.isPrefetch)
        let new = position.entry.value(permit, level, attributes)
        if new == old { return isProtected ? .writeProtected : .spurious }
        // In the log before the guest can write: a harvest in between reports too much at worst. Spec: X44, X47.
        if new & EntryBits.write != 0 { vm.markDirty(permit.guestFrame, in: slot, by: cpu) }
        schedulingNote(.atomicLoad, position.table.physicalAddress)
        guard position.entry.install(permit, level: level, attributes: attributes, expected: old) == nil else {
            return .retry
        }
        record(
            Event(
                .entryInstalled, frame: EntryBits.field.frame(in: new),
                guest: permit.guestFrame.aligned(to: level).number,
                level: level.rawValue, value: new, extra: old))
        if wasLeaf {
            leafReplaced(old, by: new, permit.guestFrame)
        } else {
            vm.statistics.addPages(level: level.rawValue, 1)
        }
        if EntryBits.isTable(old, level.rawValue) { tableReplaced(old) }
        return isProtected ? .writeProtected : .fixed
    }

    /// A leaf took a huge table's place. Stale paging-structure entries go before the section ends, and the table, frozen
    /// by then, after it. Spec: F8.
    private func tableReplaced(_ link: UInt64) {
        vm.flushRemoteTLBs()
        remove(EntryBits.field.frame(in: link))
    }

    /// The rights or A/D of a leaf changed in place. The frame may not: whoever changed the host's mapping has zapped the
    /// leaf first. Linux stops the machine there; here it is a finding where a journal listens, and stops else. Losing
    /// HW or MW cannot happen either: Linux warns; it would leave writable TLB entries. Spec: X20, X21, F3.
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
