import Frames
import Synchronization
import Synchrony

/// One set of slots with its three indexes. Kernel: `struct kvm_memslots`. Spec: generic 1.5, 4.1.
///
/// Readers see only the active set, inside a read-side section; writers edit only the inactive one.
final class SlotSet: @unchecked Sendable {
    // Unchecked: a set is edited only while it is inactive and its last reader has left (SRCU).
    /// Bit 63: an update is in progress.
    let generation: Atomic<UInt64>
    /// By guest frame, ascending, without overlap.
    var byFrame: [MemorySlot] = []
    /// By identity, ascending.
    var byIdentity: [MemorySlot] = []
    /// By user address, ascending; ranges may overlap.
    var byAddress: [MemorySlot] = []
    /// The index in `byFrame` that the last search found. Kernel: `last_used_slot`.
    let hint = Atomic<Int>(0)

    init(generation: UInt64) { self.generation = Atomic(generation) }

    /// The slot that contains `frame`.
    func slot(containing frame: GuestFrame) -> MemorySlot? {
        let hinted = hint.load(ordering: .relaxed)
        if hinted < byFrame.count {
            let slot = byFrame[hinted]
            if frame.number &- slot.baseFrame.number < slot.pageCount { return slot }
        }
        var low = 0
        var high = byFrame.count
        while low < high {
            let middle = (low + high) / 2
            if byFrame[middle].baseFrame <= frame { low = middle + 1 } else { high = middle }
        }
        guard low > 0 else { return nil }
        let slot = byFrame[low - 1]
        guard frame.number - slot.baseFrame.number < slot.pageCount else { return nil }
        hint.store(low - 1, ordering: .relaxed)
        return slot
    }

    func slot(id: UInt16) -> MemorySlot? {
        let index = position(id)
        return index < byIdentity.count && byIdentity[index].id == id ? byIdentity[index] : nil
    }

    private func position(_ id: UInt16) -> Int {
        var low = 0
        var high = byIdentity.count
        while low < high {
            let middle = (low + high) / 2
            if byIdentity[middle].id < id { low = middle + 1 } else { high = middle }
        }
        return low
    }

    /// Whether another slot than `id` intersects `frames`.
    func overlaps(_ frames: Range<GuestFrame>, except id: UInt16) -> Bool {
        for slot in byFrame where slot.id != id && slot.frames.overlaps(frames) { return true }
        return false
    }

    /// Calls `body` for each slot whose user range intersects `range`, clipped, as guest frames.
    func forEach(intersecting range: Range<UserAddress>, _ body: (MemorySlot, Range<GuestFrame>) -> Void) {
        for slot in byAddress {
            if slot.userAddress >= range.upperBound { break }
            if let frames = slot.frames(intersecting: range) { body(slot, frames) }
        }
    }

    /// Replaces `old` by `new` in all three indexes; nil adds or removes. Caller holds slotsLock; the set is inactive.
    func replace(_ old: MemorySlot?, by new: MemorySlot?) {
        if let old {
            byFrame.removeAll { $0.id == old.id }
            byIdentity.removeAll { $0.id == old.id }
            byAddress.removeAll { $0.id == old.id }
        }
        if let new {
            byFrame.insert(new, at: byFrame.firstIndex { $0.baseFrame > new.baseFrame } ?? byFrame.count)
            byIdentity.insert(new, at: position(new.id))
            byAddress.insert(new, at: byAddress.firstIndex { $0.userAddress > new.userAddress } ?? byAddress.count)
        }
        hint.store(0, ordering: .relaxed)
    }

    func removeAll() {
        byFrame = []
        byIdentity = []
        byAddress = []
    }
}

/// The two sets, and which one readers use. Spec: generic 4.1, I-20.
final class SlotSets: Sendable {
    private let first = SlotSet(generation: 0)
    private let second = SlotSet(generation: 0)
    private let activeIndex = Atomic<Int>(0)
    let identity = ObjectIdentity()

    /// Read inside a section that was just entered, or under slots_lock: a switch before it shows nothing more.
    var active: SlotSet {
        schedulingNote(.atomicLoad, identity.value)
        return activeIndex.load(ordering: .acquiring) == 0 ? first : second
    }
    var inactive: SlotSet { activeIndex.load(ordering: .acquiring) == 0 ? second : first }

    /// Makes the inactive set the active one. Readers of the other may still run.
    func publishInactive() {
        schedulingPoint(.atomicStore, identity.value)
        activeIndex.store(1 - activeIndex.load(ordering: .relaxed), ordering: .sequentiallyConsistent)
    }

    func removeAll() {
        first.removeAll()
        second.removeAll()
    }
}
