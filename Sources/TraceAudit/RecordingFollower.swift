/// Hears of each event of a recording as ``TraceAuditor`` reads it, in the file's order.
package protocol RecordingFollower: AnyObject {
    /// An event that is understood.
    func follow(_ event: RecordedEvent)
    /// An event of another name.
    func pass(_ name: String, thread: UInt32, time: UInt64)
    /// Another recording begins in the same file, or the clock went back by more than a second.
    func restart()
}

/// One understood event, with the section of the report that it belongs to.
package struct RecordedEvent {
    /// Nanoseconds of the trace clock.
    package let time: UInt64
    package let thread: UInt32
    /// Thread group, where the recording has it.
    package let process: UInt32?
    /// Name of the thread when it was first seen.
    package let command: String
    /// Index into ``AuditReport/machines``.
    package let machine: Int
    /// Written by an interrupt that happened to hit the thread.
    package let inInterrupt: Bool
    package let body: EventBody
}
