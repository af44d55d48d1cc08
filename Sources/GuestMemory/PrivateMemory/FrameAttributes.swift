import Frames
import Synchronization
import Synchrony

/// Which guest frames are private. Kernel: `kvm->mem_attr_array`, of which only `KVM_MEMORY_ATTRIBUTE_PRIVATE` exists.
///
/// A store replaces the whole map, so a reader sees a range change at once; Linux stores frame by frame, and its readers
/// go by the invalidation count as here (Spec: generic 2.15).
final class FrameAttributes: @unchecked Sendable {
    // Unchecked: an atomic pointer to an object that never changes.
    // Retained once for being published.
    private let published: Atomic<UnsafeMutableRawPointer>
    private let identity = ObjectIdentity()
    /// Readers need no lock. Kernel: RCU.
    private let readers = ReadSideSections(atomic: true)

    init() { published = Atomic(Unmanaged.passRetained(FrameRanges([])).toOpaque()) }

    deinit { Self.map(published.load(ordering: .acquiring)).release() }

    private static func map(_ pointer: UnsafeMutableRawPointer) -> Unmanaged<FrameRanges> {
        Unmanaged<FrameRanges>.fromOpaque(pointer)
    }

    private func read<R>(_ body: (FrameRanges) -> R) -> R {
        let section = readers.enter()
        defer { readers.exit(section) }
        schedulingPoint(.atomicLoad, identity.value)
        return Self.map(published.load(ordering: .acquiring))._withUnsafeGuaranteedRef(body)
    }

    /// Any lock may be held. Kernel: `kvm_mem_is_private`.
    func isPrivate(_ frame: GuestFrame) -> Bool { read { $0.contains(frame.number) } }

    /// Whether all of `frames` have this attribute. Kernel: `kvm_range_has_memory_attributes`.
    func areAll(_ frames: Range<GuestFrame>, isPrivate: Bool) -> Bool {
        let range = frames.lowerBound.number..<frames.upperBound.number
        return read { isPrivate ? $0.containsAll(of: range) : $0.containsNone(of: range) }
    }

    /// Caller holds slots_lock, and may sleep.
    func store(_ frames: Range<GuestFrame>, isPrivate: Bool) {
        let range = frames.lowerBound.number..<frames.upperBound.number
        let old = Self.map(published.load(ordering: .relaxed))
        let new = old._withUnsafeGuaranteedRef { $0.replacing(range, member: isPrivate) }
        schedulingPoint(.atomicStore, identity.value)
        published.store(Unmanaged.passRetained(new).toOpaque(), ordering: .releasing)
        readers.synchronize()
        old.release()
    }
}

/// A set of frame numbers, as ascending ranges that neither overlap nor touch. Never changes.
final class FrameRanges: Sendable {
    let ranges: [Range<UInt64>]
    init(_ ranges: [Range<UInt64>]) { self.ranges = ranges }

    /// The first range that ends after `number`.
    private func index(endingAfter number: UInt64) -> Int {
        var low = 0
        var high = ranges.count
        while low < high {
            let middle = (low + high) / 2
            if ranges[middle].upperBound <= number { low = middle + 1 } else { high = middle }
        }
        return low
    }

    func contains(_ number: UInt64) -> Bool {
        let index = index(endingAfter: number)
        return index < ranges.count && ranges[index].lowerBound <= number
    }

    func containsAll(of range: Range<UInt64>) -> Bool {
        let index = index(endingAfter: range.lowerBound)
        guard index < ranges.count else { return range.isEmpty }
        return ranges[index].lowerBound <= range.lowerBound && ranges[index].upperBound >= range.upperBound
    }

    func containsNone(of range: Range<UInt64>) -> Bool {
        let index = index(endingAfter: range.lowerBound)
        return index == ranges.count || ranges[index].lowerBound >= range.upperBound
    }

    /// The set with `range` in it, or not.
    func replacing(_ range: Range<UInt64>, member: Bool) -> FrameRanges {
        guard !range.isEmpty else { return self }
        var low = range.lowerBound
        var high = range.upperBound
        var new: [Range<UInt64>] = []
        var after: [Range<UInt64>] = []
        for old in ranges {
            if old.upperBound < low {
                new.append(old)
            } else if old.lowerBound > high {
                after.append(old)
            } else if member {
                low = min(low, old.lowerBound)
                high = max(high, old.upperBound)
            } else {
                if old.lowerBound < low { new.append(old.lowerBound..<low) }
                if old.upperBound > high { after.append(high..<old.upperBound) }
            }
        }
        if member { new.append(low..<high) }
        return FrameRanges(new + after)
    }
}
