/// What happened in one section, counted.
struct MachineTally {
    var firstLine: UInt64 = 0
    var lastLine: UInt64 = 0
    var events: UInt64 = 0
    var marks: UInt64 = 0
    var otherMarks: UInt64 = 0
    var scenarios: UInt64 = 0

    var pageFaults: UInt64 = 0
    var fastFaults: UInt64 = 0
    var fastFixed: UInt64 = 0
    var fastSpurious: UInt64 = 0
    var walks: UInt64 = 0
    var walksRead: UInt64 = 0
    var walksWrite: UInt64 = 0
    var walksFetch: UInt64 = 0
    var walksPresent: UInt64 = 0
    var requests: UInt64 = 0
    var emulated: UInt64 = 0

    /// By level and permission bits (1 read, 2 write, 4 execute, 8 user).
    private var entries = [UInt64](repeating: 0, count: 6 * 16)
    var entriesNotPresent: UInt64 = 0
    var prefetched: UInt64 = 0
    var changes: UInt64 = 0
    var splits: UInt64 = 0
    var failedSplits: UInt64 = 0

    var notifierRanges: UInt64 = 0
    var notifierRangesInSlots: UInt64 = 0
    var notifierPages: UInt64 = 0
    var notifierGuestFrames: UInt64 = 0
    var ageRanges: UInt64 = 0

    var fastZaps: UInt64 = 0
    var zappedLeaves = [UInt64](repeating: 0, count: 6)
    var zappedTables = [UInt64](repeating: 0, count: 6)
    var newTables: UInt64 = 0
    var foundTables: UInt64 = 0
    var synced: UInt64 = 0
    var unsynced: UInt64 = 0
    var mmioEvents: UInt64 = 0
    var mmioChecks: UInt64 = 0
    var asyncFaults: UInt64 = 0
    var ringEvents: UInt64 = 0
    var logFull: UInt64 = 0

    var dirtyLogReads: UInt64 = 0
    var dirtyPages: UInt64 = 0
    var failedSlotChanges: UInt64 = 0
    private(set) var slotChanges: [ReportedSlot] = []
    private(set) var slotChangeCount: UInt64 = 0
    private(set) var runs: [ReportedRun] = []
    private(set) var runCount: UInt64 = 0
    private(set) var failedRuns: UInt64 = 0

    mutating func countWalk(address: UInt64, errorCode: UInt64) {
        walks += 1
        if errorCode & 1 != 0 { walksPresent += 1 }
        if errorCode & 2 != 0 {
            walksWrite += 1
        } else if errorCode & 16 != 0 {
            walksFetch += 1
        } else {
            walksRead += 1
        }
    }

    mutating func countEntry(_ entry: DecodedEntry, prefetched isPrefetch: Bool) {
        guard entry.isPresent else {
            entriesNotPresent += 1
            return
        }
        let bits =
            (entry.canRead || entry.isAccessTracked ? 1 : 0) | (entry.canWrite ? 2 : 0) | (entry.canExecute ? 4 : 0)
            | (entry.format == .legacy && entry.isUser ? 8 : 0)
        entries[entry.level * 16 + bits] += 1
        if isPrefetch { prefetched += 1 }
    }

    mutating func countTable(_ kind: EventKind, _ event: TableEvent) {
        switch kind {
        case .getTable: if event.created == true { newTables += 1 } else { foundTables += 1 }
        case .zapTable:
            // A root comes by a second time, invalid, when its last user lets go.
            if !event.invalid { zappedTables[event.level] += 1 }
        case .syncTable: synced += 1
        case .unsyncTable: unsynced += 1
        default: break
        }
    }

    mutating func count(_ kind: EventKind) {
        switch kind {
        case .markMMIO, .handleMMIO, .fastMMIO, .matchMMIO, .accessMMIO: mmioEvents += 1
        case .ringPush, .ringReset, .ringExit: ringEvents += 1
        case .asyncTry, .asyncRepeated, .asyncNotPresent, .asyncReady, .asyncCompleted: asyncFaults += 1
        case .dirtyLogFull: logFull += 1
        default: break
        }
    }

    mutating func slotChange(_ request: SlotRequest, line: UInt64) {
        slotChangeCount += 1
        guard slotChanges.count < TraceAuditLimits.listed else { return }
        slotChanges.append(
            ReportedSlot(
                line: line, slot: request.slot, guestAddress: hex(request.guestAddress), size: request.size,
                hostAddress: hex(request.hostAddress), flags: request.flags))
    }

    mutating func run(_ run: GuestRun, line: UInt64, result: Int64, exit: Int64) {
        runCount += 1
        if result != 0 || exit != 2 { failedRuns += 1 }
        guard runs.count < TraceAuditLimits.listed else { return }
        runs.append(
            ReportedRun(
                line: line, vcpu: run.vcpu, operation: run.operation.rawValue, guestAddress: hex(run.guestAddress),
                count: run.count, stride: run.stride, result: result, exit: exit))
    }

    var entryCounts: [EntryCount] {
        entries.indices.compactMap { index in
            guard entries[index] > 0 else { return nil }
            let bits = index % 16
            let text =
                (bits & 1 != 0 ? "r" : "-") + (bits & 2 != 0 ? "w" : "-") + (bits & 4 != 0 ? "x" : "-")
                + (bits & 8 != 0 ? "u" : "-")
            return EntryCount(level: index / 16, permissions: text, count: entries[index])
        }
    }

    static func levels(_ counts: [UInt64]) -> [LevelCount] {
        counts.indices.compactMap { counts[$0] > 0 ? LevelCount(level: $0, count: counts[$0]) : nil }
    }
}
