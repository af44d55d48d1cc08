/// The rules on `kvm_tdp_mmu_spte_changed`: every write to a TDP-MMU entry, with its old and new value.
/// Spec: x86 X20, X21, X28, X36; 3.3.
extension MachineAudit {
    func change(_ event: EntryChanged, thread: TracedThread, at moment: Moment) {
        sawChange = true
        tally.changes += 1
        recording.format.count(event.new)
        guard let format = recording.format.decided else {
            rules.skip(.changeLegal, "the entry format could not be told yet")
            return
        }
        let old = DecodedEntry(raw: event.old, format: format, level: event.level)
        let new = DecodedEntry(raw: event.new, format: format, level: event.level)
        rules.check(
            .frozenFinal, !old.isFrozen || new.isFrozen, at: moment,
            "gfn \(hex(event.frame)), level \(event.level): the frozen value was overwritten by \(hex(event.new)); only "
                + "the thread that removes the table writes frozen, and for good")
        checkEntry(new, frame: event.frame, at: moment)
        checkLegal(event, old, new, at: moment)
        checkChain(event, old, at: moment)
        if old.isLeaf, new.isLeaf { checkLeafToLeaf(event, old, new, at: moment) }
        if old.isLeaf, !new.isPresent { tally.zappedLeaves[min(event.level, 5)] += 1 }
        if new.isLeaf, event.addressSpace == 0 { checkShadowed(event.frame, new, at: moment) }
        remember(event, old, new, at: moment)
    }

    private func checkLegal(_ event: EntryChanged, _ old: DecodedEntry, _ new: DecodedEntry, at moment: Moment) {
        guard !old.isPresent, !new.isPresent, event.old != event.new else { return }
        rules.check(
            .changeLegal, old.isMMIO || new.isMMIO || new.isFrozen, at: moment,
            "gfn \(hex(event.frame)), level \(event.level): \(hex(event.old)) became \(hex(event.new)); neither is "
                + "present, so one should be MMIO or the new one frozen")
    }

    private func checkLeafToLeaf(_ event: EntryChanged, _ old: DecodedEntry, _ new: DecodedEntry, at moment: Moment) {
        rules.check(
            .sameHostFrame, old.hostFrame == new.hostFrame, at: moment,
            "gfn \(hex(event.frame)), level \(event.level): a present leaf went from pfn \(hex(old.hostFrame)) to "
                + "\(hex(new.hostFrame)) in one write; it has to be zapped first")
        guard old.hostFrame == new.hostFrame else { return }
        rules.check(
            .hostWritableKept, !old.hostWritable || new.hostWritable, at: moment,
            "gfn \(hex(event.frame)), level \(event.level): host-writable was cleared in a present leaf "
                + "(\(hex(event.old)) to \(hex(event.new))); it may only be set, or go with a zap")
    }

    /// Holds while the machine has one root: two trees hold different values for one frame. Bits that hardware or a
    /// lockless path change without this event are left out. Spec: x86 3.3.
    private func checkChain(_ event: EntryChanged, _ old: DecodedEntry, at moment: Moment) {
        if let why = why(.changeChain) { return rules.skip(.changeChain, why) }
        guard directRoots == 1 else {
            return rules.skip(
                .changeChain,
                directRoots == 0
                    ? "the creation of the root is not in the recording" : "the machine has more than one root")
        }
        let known = history.entry(space: event.addressSpace, level: event.level, frame: event.frame)
        guard known.chained, UInt64(known.setAt) > directRootAt else { return }
        let last = DecodedEntry(raw: known.entry, format: old.format, level: event.level)
        rules.check(
            .changeChain, Self.summary(last) == Self.summary(old), at: moment,
            "gfn \(hex(event.frame)), level \(event.level): the change starts from \(hex(event.old)), but line "
                + "\(known.setAt) left \(hex(known.entry)): a change in between is missing")
    }

    private static func summary(_ entry: DecodedEntry) -> [UInt64] {
        if entry.isPresent { return [1, entry.isLeaf ? 1 : 0, entry.hostFrame] }
        return [0, entry.isMMIO ? 1 : 0, entry.isFrozen ? 1 : 0]
    }

    private func remember(_ event: EntryChanged, _ old: DecodedEntry, _ new: DecodedEntry, at moment: Moment) {
        let line = Self.short(moment.line)
        if event.level > 1, event.level <= 3, old.isPresent != new.isPresent || old.isLeaf != new.isLeaf || !new.isLeaf
        {
            // The table below is another one now: filled by a split without events, or being removed.
            let below = event.frame...(event.frame | (pages(level: event.level) - 1))
            history.forEach(in: below, levels: 1...(event.level - 1)) { $0.chained = false }
        }
        guard event.level <= 3 else { return }
        if new.isLeaf {
            history.recordLeaf(
                new, space: event.addressSpace, frame: event.frame, table: 0, line: line, chained: true)
            return
        }
        history.update(space: event.addressSpace, level: event.level, frame: event.frame) { known in
            // A split leaves the same translations one level down, and says nothing about them.
            known.state = old.isLeaf && new.isPresent ? .unknown : known.state == .never ? .never : .lost
            if known.state == .lost, known.lostAt == 0 { known.lostAt = KnownEntry.open }
            known.entry = event.new
            known.setAt = line
            known.chained = !new.isFrozen
            if known.state == .never { known.state = .unknown }
        }
    }
}
