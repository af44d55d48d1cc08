/// # TraceAudit: does a recording of a real kernel break an invariant?
///
/// What it is: a streaming auditor of recordings with KVM's MMU events: ftrace text, `perf script` text, trace-cmd's
/// `trace.dat`. A ``RecordingSource`` gives any of them as text; its bytes go into ``TraceAuditor``, an ``AuditReport``
/// comes out; ``auditRecording(path:progress:)`` does both.
///
/// Read in this order: `RecordingSource.swift` (where text comes from), `Rules.swift` (what is checked),
/// `EventBodies.swift` (what is understood), `TraceAuditor.swift` (how a line finds its virtual machine), then the files
/// named after their rules.
///
/// What it guarantees:
/// - A finding is only raised where the recording proves it. What the recording cannot show (shadow-MMU zaps of
///   leaves, lost events, slots without marks) makes a rule "not checkable", with the reason, never "violated".
/// - Memory is bounded whatever the input: lines, names, tasks, entries and findings all have limits, and a limit
///   that was reached is said in the report.
/// - The report of one recording is the same byte for byte in every run.
///
/// A process is taken for one virtual machine; a recording without process ids is one section, and says so.
///
/// What it never does: open a device, follow a file that grows, or read a binary format itself: trace-cmd knows its own.
///
/// Spec: x86 10 (formats), x86 8 (invariants), x86 12 item 6 (what a trace alone can show).
enum TraceAuditLimits {
    /// A longer line is counted as malformed and skipped; ftrace's own limit is one page.
    static let lineBytes = 64 * 1024
    /// Distinct event names that are counted apart.
    static let eventNames = 2048
    /// Threads whose requests, notifier calls and guest runs are followed.
    static let tasks = 65_536
    /// Sections of the report.
    static let machines = 256
    /// Groups of 64 entries that are remembered (2 KiB each), over all machines.
    static let entryGroups = 65_536
    /// Guest pages of marked runs that are looked at, over the whole recording.
    static let guestPages: UInt64 = 1 << 26
    /// Findings kept with their text, for each rule; the others are only counted.
    static let findingsPerRule = 50
    /// Guest runs, slots and notes listed in one section.
    static let listed = 200
}
