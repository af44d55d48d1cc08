import Audit
import Frames
import GuestMemory

/// The leaves of all stage-2 tables as the events tell of them, for checks that can't walk tables at every step. `Checks`
/// walks them at rest, and then both must agree.
///
/// A leaf may stand here twice: in a root that is being emptied, and in the one that took its place.
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
        if mmu.isLeaf(old, leaf.level) { remove(leaf.guest, leaf.level, leaf.frame) }
        leaves.append(leaf)
    }

    /// A leaf's rights changed. Whether the guest may write now and could not before.
    mutating func change(_ leaf: Leaf) -> Bool {
        guard let i = leaves.firstIndex(where: { $0.guest == leaf.guest && $0.level == leaf.level }) else {
            return false
        }
        let gained = leaf.writable && !leaves[i].writable
        leaves[i].writable = leaf.writable
        return gained
    }

    mutating func remove(_ guest: GuestFrame, _ level: PageLevel, _ frame: HostFrame) {
        let found =
            leaves.firstIndex { $0.guest == guest && $0.level == level && $0.frame == frame }
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
        let told = leaves.sorted { $0.guest < $1.guest }
        for (i, leaf) in walked.enumerated() {
            let same = Leaf(guest: leaf.guestFrame, frame: leaf.frame, level: leaf.level, writable: leaf.writable)
            guard i < told.count, told[i] == same else { return leaf.guestFrame }
        }
        return told.count > walked.count ? told[walked.count].guest : nil
    }
}
