import Frames
import Synchronization

/// The frames that one driver may map: what its claims come to.
final class OwnedFrames: @unchecked Sendable {
    // Unchecked: `ranges` is touched only between `enter` and `leave`.
    /// As the journal's, innermost and without scheduling points: claims only check drivers, and would give the explorer
    /// orders to try that differ in nothing else. A driver that gives back what it inserts meanwhile is found by its pages.
    private let busy = Atomic<UInt32>(0)
    /// Ascending; no two overlap or touch.
    private var ranges: [Range<HostFrame>] = []

    private func enter() {
        while !busy.compareExchange(expected: 0, desired: 1, ordering: .acquiring).exchanged {}
    }
    private func leave() { busy.store(0, ordering: .releasing) }

    func add(_ new: Range<HostFrame>) {
        guard !new.isEmpty else { return }
        enter()
        insert(new)
        leave()
    }

    private func insert(_ new: Range<HostFrame>) {
        // Everything that overlaps or touches becomes one with it.
        var first = index(endingAt: new.lowerBound)
        var joined = new
        let start = first
        while first < ranges.count, ranges[first].lowerBound <= new.upperBound {
            joined = min(joined.lowerBound, ranges[first].lowerBound)..<max(joined.upperBound, ranges[first].upperBound)
            first += 1
        }
        ranges.replaceSubrange(start..<first, with: CollectionOfOne(joined))
    }

    /// False, and nothing changes: not all of `gone` is there.
    func remove(_ gone: Range<HostFrame>) -> Bool {
        guard !gone.isEmpty else { return true }
        enter()
        defer { leave() }
        guard let place = position(of: gone) else { return false }
        let whole = ranges[place]
        ranges.remove(at: place)
        if gone.upperBound < whole.upperBound { ranges.insert(gone.upperBound..<whole.upperBound, at: place) }
        if whole.lowerBound < gone.lowerBound { ranges.insert(whole.lowerBound..<gone.lowerBound, at: place) }
        return true
    }

    func contains(_ frames: Range<HostFrame>) -> Bool {
        enter()
        defer { leave() }
        return position(of: frames) != nil
    }

    /// A copy, ascending.
    var all: [Range<HostFrame>] {
        enter()
        defer { leave() }
        return ranges
    }

    /// The range that holds all of `frames`.
    private func position(of frames: Range<HostFrame>) -> Int? {
        let place = index(endingAt: frames.lowerBound.advanced(by: 1))
        guard place < ranges.count, ranges[place].lowerBound <= frames.lowerBound,
            frames.upperBound <= ranges[place].upperBound
        else { return nil }
        return place
    }

    /// The first range whose end is `frame` or later.
    private func index(endingAt frame: HostFrame) -> Int {
        var low = 0
        var high = ranges.count
        while low < high {
            let middle = (low + high) / 2
            if ranges[middle].upperBound < frame { low = middle + 1 } else { high = middle }
        }
        return low
    }
}
