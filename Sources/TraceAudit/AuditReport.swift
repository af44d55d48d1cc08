/// What one recording says. Every list has a fixed order, so two runs give the same bytes.
public struct AuditReport: Sendable, Codable, Equatable {
    public enum Verdict: String, Sendable, Codable {
        /// Some rule was checked and none is broken.
        case clean
        case violated
        /// No rule could be checked: nothing was found, and nothing could have been.
        case nothingToCheck
    }

    /// Name of the recording as it was given.
    public var file: String
    public var verdict: Verdict
    public var lines: UInt64
    public var events: UInt64
    public var malformedLines: UInt64
    /// One-based; nil if there is none.
    public var firstMalformedLine: UInt64?
    public var lostEvents: UInt64
    public var firstLossAtLine: UInt64?
    /// Trace clock of the first and last event, seconds.
    public var firstTime: String?
    public var lastTime: String?
    public var entryFormat: EntryFormat?
    public var machines: [MachineReport]
    public var findings: [Finding]
    public var rules: [RuleStatus]
    public var understood: [EventCount]
    public var unknown: [EventCount]
    public var notes: [String]
}

public struct EventCount: Sendable, Codable, Equatable {
    public var name: String
    public var count: UInt64
    /// Events of this name whose text does not have its format.
    public var malformed: UInt64
}

/// A broken rule: what is wrong, where, and what would be right.
public struct Finding: Sendable, Codable, Equatable {
    /// ``RuleStatus/id`` of the rule.
    public var rule: String
    /// One-based line of the recording.
    public var line: UInt64
    /// Trace clock, seconds.
    public var time: String
    /// Index into ``AuditReport/machines``.
    public var machine: Int?
    public var text: String
}

public struct RuleStatus: Sendable, Codable, Equatable {
    public enum Verdict: String, Sendable, Codable { case held, violated, notCheckable }
    public var id: String
    public var statement: String
    /// Where the specification has the rule.
    public var source: String
    public var verdict: Verdict
    public var checks: UInt64
    public var violations: UInt64
    /// Checks that could not be done.
    public var notCheckable: UInt64
    /// Why they could not: the first reason.
    public var reason: String?
}

/// One virtual machine, or what could not be told apart.
public struct MachineReport: Sendable, Codable, Equatable {
    public enum Kind: String, Sendable, Codable { case tdp, shadow, unknown }
    /// Thread group, where the recording has it.
    public var process: UInt32?
    /// Threads that wrote events, by id.
    public var threads: [UInt32]
    /// Command name of the first thread.
    public var command: String
    public var kind: Kind
    /// What ``kind`` was told from.
    public var kindReason: String
    public var firstLine: UInt64
    public var lastLine: UInt64
    public var events: UInt64
    public var marks: UInt64
    public var slotChanges: [ReportedSlot]
    public var slotChangeCount: UInt64
    public var runs: [ReportedRun]
    public var runCount: UInt64
    public var failedRuns: UInt64
    public var dirtyLogReads: UInt64
    public var dirtyPages: UInt64
    public var faults: FaultCounts
    public var entries: [EntryCount]
    /// Of ``entries``, those that no fault asked for.
    public var prefetched: UInt64
    public var notifier: NotifierCounts
    public var zaps: ZapCounts
    public var otherEvents: [EventCount]
}

public struct ReportedSlot: Sendable, Codable, Equatable {
    public var line: UInt64
    public var slot: UInt64
    public var guestAddress: String
    /// Bytes; 0 deletes the slot.
    public var size: UInt64
    public var hostAddress: String
    public var flags: UInt64
}

public struct ReportedRun: Sendable, Codable, Equatable {
    public var line: UInt64
    public var vcpu: Int64
    /// `r` read, `w` store, `l` locked increment.
    public var operation: String
    public var guestAddress: String
    public var count: UInt64
    public var stride: UInt64
    public var result: Int64
    public var exit: Int64
}

public struct FaultCounts: Sendable, Codable, Equatable {
    public var pageFaults: UInt64
    public var fastFixed: UInt64
    public var fastSpurious: UInt64
    public var fastOther: UInt64
    public var walksRead: UInt64
    public var walksWrite: UInt64
    public var walksFetch: UInt64
    public var requests: UInt64
    public var emulated: UInt64
}

public struct EntryCount: Sendable, Codable, Equatable {
    public var level: Int
    public var permissions: String
    public var count: UInt64
}

public struct LevelCount: Sendable, Codable, Equatable {
    public var level: Int
    public var count: UInt64
}

public struct NotifierCounts: Sendable, Codable, Equatable {
    public var unmapRanges: UInt64
    public var unmappedPages: UInt64
    /// Ranges and guest frames that lie in marked slots.
    public var rangesInSlots: UInt64
    public var guestFrames: UInt64
    public var ageRanges: UInt64
}

public struct ZapCounts: Sendable, Codable, Equatable {
    public var fastZaps: UInt64
    public var tables: [LevelCount]
    /// TDP only: the shadow MMU zaps leaves without an event.
    public var leaves: [LevelCount]
    public var newTables: UInt64
    public var foundTables: UInt64
    public var unsynced: UInt64
    public var synced: UInt64
    public var splits: UInt64
    public var changes: UInt64
}

/// Trace clock values as text.
enum Timestamp {
    static func text(_ nanoseconds: UInt64) -> String {
        let micro = String(nanoseconds / 1000 % 1_000_000)
        return "\(nanoseconds / 1_000_000_000)." + String(repeating: "0", count: 6 - micro.count) + micro
    }
}
