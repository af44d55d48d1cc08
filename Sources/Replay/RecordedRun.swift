import TraceAudit

/// A recording as the replay needs it: the marks, and what the kernel told in between, thread by thread.
final class RecordedRun: RecordingFollower {
    enum Item: Sendable {
        case mark(ProbeMark)
        case told(ReplayObservation)
    }

    private(set) var items: [(thread: UInt32, item: Item)] = []
    /// Whether the inner steps of walks were recorded.
    private(set) var hasElements = false
    /// What the marks say of slots, in order.
    private(set) var slots: [SlotRequest] = []
    /// Frames for which the kernel wanted large entries.
    private(set) var largeFrames: [UInt64] = []
    /// Whether the guest's tables reach down to 4 KiB somewhere: a lowest page of the guest's is shadowed.
    private(set) var lowestTables: [UInt64] = []

    func follow(_ event: RecordedEvent) {
        if case .mark(let mark) = event.body {
            if case .setRegion(let request) = mark { slots.append(request) }
            items.append((event.thread, .mark(mark)))
            return
        }
        guard let told = ReplayObservation(event.body) else { return }
        switch told.event {
        case .element: hasElements = true
        case .requested(let frame, let level) where level > 1: largeFrames.append(frame)
        case .page(.taken, let page) where page.level == 1 && !page.isDirect: lowestTables.append(page.frame)
        default: break
        }
        items.append((event.thread, .told(told)))
    }

    func pass(_ name: String, thread: UInt32, time: UInt64) {}
    func restart() {}
}
