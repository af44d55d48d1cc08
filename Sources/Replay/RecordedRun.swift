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

    /// By thread, where its walks stand.
    private var walks: [UInt32: [(position: Int, address: UInt64)]] = [:]

    /// The address of the thread's next walk.
    func nextWalk(of thread: UInt32, after position: Int) -> UInt64? {
        guard let all = walks[thread] else { return nil }
        var low = 0
        var high = all.count
        while low < high {
            let middle = (low + high) / 2
            if all[middle].position > position { high = middle } else { low = middle + 1 }
        }
        return low < all.count ? all[low].address : nil
    }

    func follow(_ event: RecordedEvent) {
        if case .mark(let mark) = event.body {
            if case .setRegion(let request) = mark { slots.append(request) }
            items.append((event.thread, .mark(mark)))
            return
        }
        guard let told = ReplayObservation(event.body) else { return }
        switch told.event {
        case .element: hasElements = true
        case .walk(let address, _): walks[event.thread, default: []].append((items.count, address))
        case .requested(let frame, let level) where level > 1: largeFrames.append(frame)
        case .page(.taken, let page) where page.level == 1 && !page.isDirect: lowestTables.append(page.frame)
        default: break
        }
        items.append((event.thread, .told(told)))
    }

    /// What the harvest that begins at `position` reported.
    func dirtyPages(after position: Int) -> UInt64 {
        for (_, item) in items[position...] {
            if case .mark(.getDirtyLogResult(_, let dirty)) = item { return dirty }
        }
        return .max
    }

    func pass(_ name: String, thread: UInt32, time: UInt64) {}
    func restart() {}
}
