import TraceAudit

/// What is shown of one event of a recording: a few words, the same for all of a kind, and the facts.
struct RecordedInstant {
    var name: String
    var facts: KeyValuePairs<StaticString, PerfettoTrace.Value>

    /// Nil for events that are shown otherwise, or only extend a fault.
    init?(_ body: EventBody) {
        switch body {
        case .entrySet(let set):
            name = "map \(PageCounters.size(set.level))"
            facts = ["gfn": .address(set.frame), "entry": .address(set.entry), "rights": .text(set.rights)]
        case .entryChanged(let change):
            // A new entry shows as set.
            guard change.wasLeaf else { return nil }
            name = "\(change.isLeaf ? "change" : "zap") \(PageCounters.size(change.level))"
            facts = ["gfn": .address(change.frame), "old": .address(change.old), "new": .address(change.new)]
        case .table(let kind, let table):
            name = Self.name(kind, table)
            facts = ["gfn": .address(table.frame), "level": .count(UInt64(table.level))]
        case .unmapRange(let range):
            name = "unmap range"
            facts = ["start": .address(range.start), "end": .address(range.end)]
        case .ageRange(let range):
            name = "age range"
            facts = ["start": .address(range.start), "end": .address(range.end)]
        case .fastPageFault(let fault):
            name = fault.fixed ? "fast fault fixed" : fault.spurious ? "fast fault spurious" : "fast fault"
            facts = ["address": .address(fault.address), "old": .address(fault.old), "new": .address(fault.new)]
        case .splitHugePage(let frame, let level, let errno):
            name = "split \(PageCounters.size(level))"
            facts = ["gfn": .address(frame), "errno": .text("\(errno)")]
        case .zapAllFast(let generation, let pages):
            name = "zap all"
            facts = ["generation": .count(generation), "tables": .count(pages)]
        case .emulate:
            name = "emulate"
            facts = [:]
        // Steps of a walk.
        case .walkedElement, .setFlag, .walkerError: return nil
        case .tableWithoutFrame(let kind), .counted(let kind):
            name = kind.rawValue
            facts = [:]
        case .pageFault, .tableWalk, .entryRequested, .checkMMIO, .testAge, .mark: return nil
        }
    }

    private static func name(_ kind: EventKind, _ table: TableEvent) -> String {
        switch kind {
        case .getTable: table.created == false ? "reuse table" : "new table"
        // A root comes by a second time when its last user lets go. Spec: x86 10.
        case .zapTable: table.invalid ? "free root" : "end table"
        case .syncTable: "sync table"
        default: "unsync table"
        }
    }
}

extension EntrySet {
    fileprivate var rights: String {
        "r\(printedWrite ? "w" : "-")\(printedExecute ? "x" : "-")" + (printedUser.map { $0 ? "u" : "-" } ?? "")
    }
}

/// Both formats have the same bits for "present" and "huge". Spec: x86 1.4.
extension EntryChanged {
    var wasLeaf: Bool { isLeaf(old) }
    var isLeaf: Bool { isLeaf(new) }

    private func isLeaf(_ entry: UInt64) -> Bool { entry & 1 << 11 != 0 && (level == 1 || entry & 1 << 7 != 0) }
}
