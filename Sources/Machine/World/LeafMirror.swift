import Audit
import Frames
import GuestMemory

/// The leaves of all stage-2 tables as the events tell of them, for checks that can't walk tables at every step. `Checks`
/// walks them at rest, and then both must agree.
///
/// A leaf may stand here twice: in a root that is being emptied, and in the one that took its place; under shadow paging
/// wherever the guest's tables map its frame, with other rights perhaps.
struct LeafMirror {
    struct Leaf: Equatable {
        var guest: GuestFrame
        var frame: HostFrame
        var level: PageLevel
        var writable: Bool

        var guestFrames: Range<GuestFrame> { guest..<GuestFrame(guest.number + level.frames) }

        /// The host frame behind `page`, if the leaf maps it.
        func frame(for page: GuestFrame) -> HostFrame? {
            let inside = page.number &- guest.number
            return inside < level.frames ? HostFrame(frame.number + inside) : nil
        }

        func maps(_ first: UInt64, _ count: UInt64) -> Bool {
            frame.number < first + count && first < frame.number + level.frames
        }
    }

    private(set) var leaves: [Leaf] = []

    /// The leaf that an event is about, as it is now.
    static func leaf(_ event: Event, _ mmu: SecondaryMMU) -> Leaf {
        Leaf(
            guest: GuestFrame(event.guest), frame: HostFrame(event.frame), level: PageLevel(event.level),
            writable: mmu.isWritable(event.value))
    }

    /// A leaf was put in, perhaps over one with other rights.
    mutating func install(_ leaf: Leaf, over old: UInt64, _ mmu: SecondaryMMU) {
        if mmu.isLeaf(old, leaf.level) { remove(leaf.guest, leaf.level, leaf.frame, wasWritable: mmu.isWritable(old)) }
        leaves.append(leaf)
    }

    /// A leaf's rights changed. Whether the guest may write now and could not before.
    mutating func change(_ leaf: Leaf, wasWritable: Bool) -> Bool {
        func isOf(_ other: Leaf) -> Bool { other.guest == leaf.guest && other.level == leaf.level }
        let found = leaves.firstIndex { isOf($0) && $0.writable == wasWritable } ?? leaves.firstIndex(where: isOf)
        guard let i = found else { return false }
        let gained = leaf.writable && !leaves[i].writable
        leaves[i].writable = leaf.writable
        return gained
    }

    mutating func remove(_ guest: GuestFrame, _ level: PageLevel, _ frame: HostFrame, wasWritable: Bool) {
        func isOf(_ leaf: Leaf) -> Bool { leaf.guest == guest && leaf.level == level && leaf.frame == frame }
        let found =
            leaves.firstIndex { isOf($0) && $0.writable == wasWritable } ?? leaves.firstIndex(where: isOf)
            ?? leaves.firstIndex { $0.guest == guest && $0.level == level }
        if let found { leaves.remove(at: found) }
    }

    /// A table was linked where a huge leaf stood: its 512 parts map what it did, with its rights.
    mutating func split(_ guest: GuestFrame, _ level: PageLevel) {
        guard let found = leaves.firstIndex(where: { $0.guest == guest && $0.level == level }) else { return }
        let huge = leaves.remove(at: found)
        let below = level.below
        for i in 0..<UInt64(512) {
            leaves.append(
                Leaf(
                    guest: GuestFrame(guest.number + i * below.frames),
                    frame: HostFrame(huge.frame.number + i * below.frames), level: below, writable: huge.writable))
        }
    }

    /// The first guest frame at which the tables, walked, have something else; nil: they agree. `walked` is sorted by
    /// guest frame.
    func difference(from walked: [StageTwoLeaf]) -> GuestFrame? {
        let told = leaves.sorted(by: Self.isBefore)
        let found = walked.map {
            Leaf(guest: $0.guestFrame, frame: $0.frame, level: $0.level, writable: $0.writable)
        }.sorted(by: Self.isBefore)
        for (i, leaf) in found.enumerated() {
            guard i < told.count, told[i] == leaf else { return leaf.guest }
        }
        return told.count > walked.count ? told[walked.count].guest : nil
    }

    private static func isBefore(_ a: Leaf, _ b: Leaf) -> Bool {
        if a.guest != b.guest { return a.guest < b.guest }
        if a.frame != b.frame { return a.frame.number < b.frame.number }
        if a.level != b.level { return a.level < b.level }
        return !a.writable && b.writable
    }
}
