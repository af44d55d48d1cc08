/// Live shadow pages of one guest page table.
struct ShadowedTable {
    /// Shadow pages of level 2 to 4: the guest's table is write-tracked while there is one.
    var upper = 0
    /// Shadow pages of level 1, and how many of them are unsync.
    var lowest = 0
    var unsync = 0

    /// The guest's table must not be writable through any entry.
    var isProtected: Bool { upper > 0 || lowest > unsync }
}

/// The rules on shadow pages: which guest tables may be written, which pages may be unsync.
/// Spec: x86 X48, X49; 4.1, 4.7, 4.9.
extension MachineAudit {
    func table(_ kind: EventKind, _ event: TableEvent, at moment: Moment) {
        tally.countTable(kind, event)
        if !event.direct { sawShadowTable = true }
        if event.unsync || kind == .unsyncTable {
            rules.check(
                .unsyncLevel, event.level == 1 && !event.direct, at: moment,
                "the \(event.direct ? "direct " : "")level \(event.level) page of gfn \(hex(event.frame)) is unsync: "
                    + "only level-1 pages that shadow a guest table can be")
        }
        switch kind {
        case .getTable:
            if event.created == true, event.direct, event.level >= 4 {
                directRoots += 1
                directRootAt = moment.line
            }
            follow(event) { table in
                let isNew = event.created == true
                if event.level > 1 {
                    table.upper = isNew ? table.upper + 1 : max(table.upper, 1)
                } else {
                    table.lowest = isNew ? table.lowest + 1 : max(table.lowest, 1)
                }
            }
        case .zapTable:
            zap(event, at: moment)
        case .unsyncTable: follow(event) { $0.unsync += 1 }
        case .syncTable: follow(event) { $0.unsync = max($0.unsync - 1, 0) }
        default: break
        }
    }

    /// Changes what is known of the guest table that `event` shadows. Level 5 may be a pass-through page, which
    /// shadows nothing; the events do not print that.
    private func follow(_ event: TableEvent, _ change: (inout ShadowedTable) -> Void) {
        guard !event.direct, event.level < 5, shadowedTables.count < 1 << 20 else { return }
        var table = shadowedTables[event.frame] ?? ShadowedTable()
        change(&table)
        shadowedTables[event.frame] = table.upper == 0 && table.lowest == 0 && table.unsync == 0 ? nil : table
    }

    private func zap(_ event: TableEvent, at moment: Moment) {
        // A zapped root comes by a second time when its last user lets go.
        guard !event.invalid else { return }
        follow(event) { table in
            if event.level > 1 {
                table.upper = max(table.upper - 1, 0)
            } else {
                table.lowest = max(table.lowest - 1, 0)
            }
        }
        // The page's entries are gone, but which frames they mapped is known for direct pages only.
        if event.direct, event.level <= 3 {
            let last = event.frame | (pages(level: event.level + 1) - 1)
            history.forEach(in: event.frame...max(last, event.frame), levels: 1...event.level) { known in
                if known.state == .present { known.state = .unknown }
                known.chained = false
            }
        } else {
            history.makeUnknown(before: Self.short(moment.line))
        }
    }

    /// Slots of the SMM address space are tracked apart from the others, so callers leave its entries out.
    func checkShadowed(_ frame: UInt64, _ entry: DecodedEntry, at moment: Moment) {
        guard entry.canWrite || entry.mmuWritable else { return }
        guard entry.level == 1, let table = shadowedTables[frame] else {
            if sawShadowTable { rules.held(.shadowedReadOnly) }
            return
        }
        if let why = why(.shadowedReadOnly) { return rules.skip(.shadowedReadOnly, why) }
        rules.check(
            .shadowedReadOnly, !table.isProtected, at: moment,
            "gfn \(hex(frame)) holds a guest page table that is shadowed "
                + (table.upper > 0 ? "at level 2 or higher" : "at level 1 and in sync")
                + ", and leaf \(hex(entry.raw)) makes it writable: the guest could change it unseen")
    }

    /// Tells whether a thread that writes entries does so for this section's machine. With process ids the section
    /// is the process; without, a thread belongs to it if it wrote a mark or writes into a table that is known.
    func link(_ thread: inout TracedThread, table: UInt32, at moment: Moment) {
        guard process == nil else { return }
        if !thread.linked {
            if !tables.isEmpty, !tables.contains(table), !conflated {
                conflated = true
                recording.note(
                    "line \(moment.line): thread \(thread.id) writes entries into tables of its own; without process "
                        + "ids (trace option record-tgid) it may be another virtual machine")
            }
            thread.linked = true
        }
        if table != lastTable, tables.count < 1 << 18 { tables.insert(table) }
        lastTable = table
    }
}
