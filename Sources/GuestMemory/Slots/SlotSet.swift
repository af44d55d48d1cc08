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
    private(set) var byFrame = OrderedSlots<ByFrame>()
    private(set) var byAddress = OrderedSlots<ByAddress>()
    /// The slot of each identity, up to the largest that there was. Kernel: `id_hash`.
    private var byIdentity: [MemorySlot?] = []
    /// The slot that the last search found; it is in this set. Kernel: `last_used_slot`.
    private let hint = Atomic<UnsafeRawPointer?>(nil)

    init(generation: UInt64) { self.generation = Atomic(generation) }

    var count: Int { byFrame.count }

    /// The slot that contains `frame`.
    @inline(__always)
    func slot(containing frame: GuestFrame) -> MemorySlot? {
        if let hinted = hint.load(ordering: .relaxed) {
            let slot = Unmanaged<MemorySlot>.fromOpaque(hinted)
            let offset = slot._withUnsafeGuaranteedRef { frame.number &- $0.baseFrame.number }
            if slot._withUnsafeGuaranteedRef({ offset < $0.pageCount }) { return slot.takeUnretainedValue() }
        }
        return search(frame)
    }

    /// The user's address of `frame`. The hinted slot is looked at where it lies: counting a reference up and down would
    /// cost more than the lookup.
    @inline(__always)
    func checkedAddress(of frame: GuestFrame, write: Bool) -> UserAddress? {
        if let hinted = hint.load(ordering: .relaxed) {
            let slot = Unmanaged<MemorySlot>.fromOpaque(hinted)
            let (isHit, address): (Bool, UserAddress?) = slot._withUnsafeGuaranteedRef {
                frame.number &- $0.baseFrame.number < $0.pageCount
                    ? (true, $0.checkedAddress(of: frame, write: write)) : (false, nil)
            }
            if isHit { return address }
        }
        return search(frame)?.checkedAddress(of: frame, write: write)
    }

    private func search(_ frame: GuestFrame) -> MemorySlot? {
        guard let slot = byFrame.last(startingAtOrBefore: frame.number), slot.frames.contains(frame) else { return nil }
        hint.store(UnsafeRawPointer(Unmanaged.passUnretained(slot).toOpaque()), ordering: .relaxed)
        return slot
    }

    func slot(id: UInt16) -> MemorySlot? { Int(id) < byIdentity.count ? byIdentity[Int(id)] : nil }

    /// Whether another slot than `id` intersects `frames`.
    func overlaps(_ frames: Range<GuestFrame>, except id: UInt16) -> Bool {
        var found = false
        forEach(intersecting: frames) { slot in
            found = slot.id != id
            return !found
        }
        return found
    }

    /// Calls `body` for each slot that has any of `frames`, in order, until it says false.
    func forEach(intersecting frames: Range<GuestFrame>, _ body: (MemorySlot) -> Bool) {
        byFrame.forEach(intersecting: frames.lowerBound.number, frames.upperBound.number, body)
    }

    /// Calls `body` for each slot whose user range intersects `range`, clipped, as guest frames.
    func forEach(intersecting range: Range<UserAddress>, _ body: (MemorySlot, Range<GuestFrame>) -> Void) {
        byAddress.forEach(intersecting: range.lowerBound.value, range.upperBound.value) { slot in
            if let frames = slot.frames(intersecting: range) { body(slot, frames) }
            return true
        }
    }

    /// Replaces `old` by `new` in all three indexes; nil adds or removes. Caller holds slotsLock; the set is inactive.
    func replace(_ old: MemorySlot?, by new: MemorySlot?) {
        hint.store(nil, ordering: .relaxed)
        if let old, let new, old.baseFrame == new.baseFrame, old.pageCount == new.pageCount, old.id == new.id,
            old.userAddress == new.userAddress
        {
            byFrame.substitute(old, by: new)
            byAddress.substitute(old, by: new)
            byIdentity[Int(new.id)] = new
            return
        }
        if let old {
            byFrame.remove(old)
            byAddress.remove(old)
            byIdentity[Int(old.id)] = nil
        }
        if let new {
            byFrame.insert(new)
            byAddress.insert(new)
            while byIdentity.count <= Int(new.id) { byIdentity.append(nil) }
            byIdentity[Int(new.id)] = new
        }
    }

    func removeAll() {
        hint.store(nil, ordering: .relaxed)
        byFrame.removeAll()
        byAddress.removeAll()
        byIdentity = []
    }

    /// I-20 within the set: every slot in all three indexes, no overlap of guest frames, the order kept.
    var isConsistent: Bool {
        let frames = byFrame.all
        let addresses = byAddress.all
        guard frames.count == addresses.count, frames.count == byIdentity.reduce(0, { $0 + ($1 == nil ? 0 : 1) })
        else { return false }
        for (index, slot) in frames.enumerated() {
            if self.slot(id: slot.id) !== slot { return false }
            if index > 0, slot.baseFrame < frames[index - 1].frames.upperBound { return false }
            if index > 0, addresses[index].userAddress < addresses[index - 1].userAddress { return false }
            var found = false
            forEach(intersecting: slot.userRange) { other, _ in found = found || other === slot }
            if !found { return false }
        }
        return true
    }
}

/// The two sets of one address space, and which one readers use. Spec: generic 4.1, I-20.
final class SlotSets: Sendable {
    private let first: SlotSet
    private let second: SlotSet
    private let activeIndex = Atomic<Int>(0)
    let identity = ObjectIdentity()

    /// - Parameter generation: what the set begins with: the number of its address space. Spec: generic 4.2.
    init(generation: UInt64) {
        first = SlotSet(generation: generation)
        second = SlotSet(generation: generation)
    }

    /// Read inside a section that was just entered, or under slots_lock: a switch before it shows nothing more.
    var active: SlotSet {
        schedulingNote(.atomicLoad, identity.value)
        return activeIndex.load(ordering: .acquiring) == 0 ? first : second
    }
    /// The same for the short of time: a lookup through the hint costs less than counting a reference up and down.
    @inline(__always)
    var unretainedActive: Unmanaged<SlotSet> {
        schedulingNote(.atomicLoad, identity.value)
        return activeIndex.load(ordering: .acquiring) == 0
            ? Unmanaged.passUnretained(first) : Unmanaged.passUnretained(second)
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
