import Audit
import Frames
import GuestMemory
import HostMemory

/// Taking entries and tables out. Kernel: `gstage_unmap_range`. Caller: mmu_lock held for writing. Spec: arches 2.3.
///
/// Each table counts its entries in use in its page frame, so that one that becomes empty is found at once. It is
/// unlinked first, then fenced, then freed: when `flushRemoteTLBs` returns, every vCPU has left guest mode, and with it
/// any walk that had seen the link (C7, arches 10).
extension GStageMMU {
    /// Removes every leaf that intersects `frames`, huge ones whole, and the tables that are empty then. Returns
    /// whether the caller must flush before it drops the lock; where tables were freed, that is done already.
    ///
    /// The kernel gives the lock away now and then if it may sleep here; a borrowed guard can't, and need not.
    func zap(_ frames: Range<GuestFrame>, holding guardian: borrowing MMUGuard) -> Bool {
        precondition(guardian.exclusive, "G-stage tables change only under mmu_lock held for writing")
        var zapped = false
        var detached: [HostFrame] = []
        for run in tables.runs(in: frames) {
            let removed = clear(run)
            guard removed > 0 else { continue }
            zapped = true
            discount(removed, in: run.table, level: run.level, at: run.base, into: &detached)
        }
        guard !detached.isEmpty else { return zapped }
        vm.flushRemoteTLBs()
        free(detached)
        return false
    }

    /// Empties the entries of a run; how many were in use.
    private func clear(_ run: LeafRun) -> Int {
        let tables = tables
        var removed = 0
        for i in 0..<run.count {
            let entry = tables.entry(run.firstIndex + i, of: run.table)
            guard entry.peek() != 0 else { continue }
            let old = entry.exchange(forEmpty: 0)
            removed += 1
            noteZap(old, run.level, run.base.advanced(by: i * Int(run.level.frames)))
        }
        return removed
    }

    /// Empties a whole table and those below it, which nothing links any more, and puts them on the list. `level` is
    /// that of its entries, `base` the first frame under it.
    func detach(_ table: HostFrame, level: PageLevel, base: GuestFrame, into detached: inout [HostFrame]) {
        let tables = tables
        let first = tables.entry(0, of: table)
        first.forEachIndex(below: 512, notHolding: 0) { i in
            let old = first.following(i).exchange(forEmpty: 0)
            let frame = base.advanced(by: i * Int(level.frames))
            if tables.format.isTable(old, level.rawValue) {
                detach(tables.format.field.frame(in: old), level: level.below, base: frame, into: &detached)
            } else {
                noteZap(old, level, frame)
            }
        }
        noteRemoval(table, level, base)
        detached.append(table)
    }

    /// Gives tables back. They are unlinked, and a flush has come since.
    func free(_ detached: [HostFrame]) {
        for table in detached { vm.host.freeTable(table) }
    }

    /// Frees what a quirk left under `table`, with no vCPU in the guest.
    func freeTables(below root: HostFrame) {
        var detached: [HostFrame] = []
        let level = PageLevel(mode.levels)
        let first = tables.entry(0, of: root)
        for i in 0..<2048 {
            let entry = first.following(i)
            let old = entry.peek()
            guard tables.format.isTable(old, level.rawValue) else { continue }
            _ = entry.exchange(forEmpty: 0)
            let base = GuestFrame(UInt64(i) * level.frames)
            detach(tables.format.field.frame(in: old), level: level.below, base: base, into: &detached)
        }
        free(detached)
    }

    // MARK: The count of entries in use, in the table's page frame.

    func entriesInUse(of table: HostFrame) -> Int { Int(vm.host.tableWords(table).0) }

    func count(_ more: Int, in table: HostFrame) {
        vm.host.setTableWords(table, UInt64(entriesInUse(of: table) + more), 0)
    }

    /// Counts down, and unlinks the table when nothing is left in it, and its parent when that was all there was.
    private func discount(
        _ fewer: Int, in table: HostFrame, level: PageLevel, at frame: GuestFrame, into detached: inout [HostFrame]
    ) {
        count(-fewer, in: table)
        guard level.rawValue < mode.levels, entriesInUse(of: table) == 0 else { return }
        let parent = tables.descend(to: frame, until: level.above)
        _ = parent.entry.exchange(forEmpty: 0)
        noteRemoval(table, level, frame.aligned(to: level.above))
        detached.append(table)
        discount(1, in: parent.table, level: level.above, at: frame, into: &detached)
    }

    // MARK: The journal and the statistics.

    func noteZap(_ old: UInt64, _ level: PageLevel, _ base: GuestFrame) {
        vm.statistics.addPages(level: level.rawValue, -1)
        note(
            Event(
                .entryZapped, frame: tables.format.field.frame(in: old), guest: base.number, level: level.rawValue,
                extra: old))
    }

    func noteChange(_ level: PageLevel, _ base: GuestFrame, _ old: UInt64, _ new: UInt64) {
        note(
            Event(
                .entryChanged, frame: tables.format.field.frame(in: new), guest: base.number, level: level.rawValue,
                value: new, extra: old))
    }

    /// `old` is the huge leaf that the table stands for, 0 if it is empty.
    func noteLink(_ table: HostFrame, at place: RadixPosition, over frame: GuestFrame, old: UInt64) {
        note(
            Event(
                .tableLinked, frame: table, guest: frame.aligned(to: place.level).number, level: place.level.rawValue,
                value: GStageBits.link | tables.format.field.bits(for: table), extra: old))
    }

    /// The event's level is that of the entry which linked the table, as in `noteLink`.
    private func noteRemoval(_ table: HostFrame, _ level: PageLevel, _ base: GuestFrame) {
        note(Event(.tableRemoved, frame: table, guest: base.number, level: level.above.rawValue))
    }
}

/// The unmap of the baseline, for `GStageQuirks.unmapSkips`.
extension GStageMMU {
    /// Removes a leaf only if the cursor stands at its start and it ends in the range; goes on by the size at which
    /// the walk ended, from wherever the cursor stands. Never frees a table. Spec: arches 2.3, unmap.
    func zapAsBaseline(_ frames: Range<GuestFrame>, holding guardian: borrowing MMUGuard) -> Bool {
        precondition(guardian.exclusive, "G-stage tables change only under mmu_lock held for writing")
        var zapped = false
        var cursor = frames.lowerBound
        while cursor < min(frames.upperBound, tables.end) {
            let place = tables.descend(to: cursor, until: .page4K)
            let next = GuestFrame(cursor.number + place.level.frames)
            if tables.format.isLeaf(place.value, place.level.rawValue), cursor.isAligned(to: place.level),
                next <= frames.upperBound
            {
                noteZap(place.entry.exchange(forEmpty: 0), place.level, cursor)
                count(-1, in: place.table)
                zapped = true
            }
            cursor = next
        }
        return zapped
    }
}
