import Frames
import HostMemory
import Synchronization
import Synchrony

/// One entry of a dirty ring, 16 bytes in memory that userspace shares. Kernel: `struct kvm_dirty_gfn`.
///
/// Its flags say whose turn it is: 0, KVM may fill it → `dirty`, userspace may read it → `reset`, KVM may consume it → 0.
public struct DirtyRingEntry: Sendable, Equatable {
    public var flags: UInt32
    /// The address space in the high half, the slot's identity in the low one.
    public var slot: UInt32
    /// Pages from the slot's first.
    public var offset: UInt64
    public init(flags: UInt32, slot: UInt32, offset: UInt64) {
        self.flags = flags
        self.slot = slot
        self.offset = offset
    }

    /// Kernel: `KVM_DIRTY_GFN_F_DIRTY`.
    public static let dirty: UInt32 = 1
    /// Kernel: `KVM_DIRTY_GFN_F_RESET`.
    public static let reset: UInt32 = 2
    /// Bytes of an entry.
    public static let bytes: UInt64 = 16
}

/// The dirty log of one vCPU: what it wrote, in the order of its first writes. Kernel: `struct kvm_dirty_ring`.
/// Spec: generic 5.6, I-27.
///
/// Three parties: the vCPU's task pushes; userspace reads and marks; whoever holds slots_lock consumes. Indices run free,
/// in 32 bits; an entry's place is its index modulo the size. Userspace may write anything into the entries: what it finds
/// there is never trusted to be in a slot, and the indices are not in its memory.
public final class DirtyRing: @unchecked Sendable {
    // Unchecked: the entries are atomics, `frames` changes only when the ring ends.
    /// Entries; a power of two.
    public let size: UInt32
    /// From so many used entries on the vCPU may not enter the guest: the rest is for what is still underway.
    public let softLimit: UInt32
    /// Written by the vCPU's task.
    private let dirtyIndex = Atomic<UInt32>(0)
    /// Written under slots_lock.
    private let resetIndex = Atomic<UInt32>(0)
    private let entries = ObjectIdentity()
    private let indices = ObjectIdentity()
    private let host: Host
    private var frames: [HostFrame]

    /// Kernel: `KVM_DIRTY_RING_MAX_ENTRIES`.
    public static let mostEntries: UInt64 = 65536
    /// Entries that a vCPU may fill after it was told that the ring is full. Kernel: `KVM_DIRTY_RING_RSVD_ENTRIES`.
    static let reservedEntries: UInt32 = 64

    /// Nil without memory. `bytes`: as `enableDirtyRings` has checked it. `start`: where both indices begin, for tests of
    /// their wrap-around. Kernel: `kvm_dirty_ring_alloc`.
    init?(host: Host, bytes: UInt64, reserved: UInt32, startingAt start: UInt32 = 0) {
        precondition(bytes & (bytes - 1) == 0 && bytes >= pageSize, "a ring is a power of two, and whole pages")
        guard let frames = host.allocateKernelPages(Int(bytes / pageSize)) else { return nil }
        self.host = host
        self.frames = frames
        size = UInt32(bytes / DirtyRingEntry.bytes)
        softLimit = size - reserved
        dirtyIndex.store(start, ordering: .relaxed)
        resetIndex.store(start, ordering: .relaxed)
    }

    /// Gives the memory back. Nobody uses the ring any more. Kernel: `kvm_dirty_ring_free`.
    func free() {
        let frames = frames
        self.frames = []
        host.freeKernelPages(frames)
    }

    // MARK: How full it is

    /// Entries pushed and not yet consumed. Kernel: `kvm_dirty_ring_used`.
    public var used: UInt32 {
        schedulingNote(.atomicLoad, indices.value)
        return dirtyIndex.load(ordering: .acquiring) &- resetIndex.load(ordering: .acquiring)
    }
    public var isSoftFull: Bool { used >= softLimit }
    public var isFull: Bool { used >= size }

    /// The free-running indices, for reports: pushed, consumed.
    public var progress: (pushed: UInt32, consumed: UInt32) {
        (dirtyIndex.load(ordering: .acquiring), resetIndex.load(ordering: .acquiring))
    }

    // MARK: KVM's side

    /// Appends an entry. The vCPU's own task; any lock may be held. Kernel: `kvm_dirty_ring_push`.
    ///
    /// The flags are published last, with release order: who sees them sees slot and offset. The index is raised before
    /// them (the kernel does so after): so who consumes an entry that userspace has marked knows that it was pushed, and
    /// a VMM may count on every entry that it has marked being consumed by its next reset.
    func push(slot: UInt32, offset: UInt64) {
        let index = dirtyIndex.load(ordering: .relaxed)
        let place = place(index)
        schedulingPoint(.atomicUpdate, indices.value)
        dirtyIndex.store(index &+ 1, ordering: .releasing)
        schedulingPoint(.atomicStore, identity(index))
        self.slot(place).pointee.store(slot, ordering: .relaxed)
        self.offset(place).pointee.store(offset, ordering: .relaxed)
        flags(place).pointee.store(DirtyRingEntry.dirty, ordering: .releasing)
    }

    /// Consumes the next entry if userspace has marked it. Caller holds slots_lock. Kernel: a step of
    /// `kvm_dirty_ring_reset`.
    ///
    /// Never goes past what was pushed, whatever the flags behind that say. The kernel does, if userspace marks entries
    /// that were never pushed; its count of used entries then wraps around (I-27).
    func takeReset() -> DirtyRingEntry? {
        let index = resetIndex.load(ordering: .relaxed)
        let place = place(index)
        schedulingPoint(.atomicUpdate, identity(index))
        guard flags(place).pointee.load(ordering: .acquiring) & DirtyRingEntry.reset != 0,
            index != dirtyIndex.load(ordering: .acquiring)
        else { return nil }
        let entry = DirtyRingEntry(
            flags: DirtyRingEntry.reset, slot: slot(place).pointee.load(ordering: .relaxed),
            offset: offset(place).pointee.load(ordering: .relaxed))
        flags(place).pointee.store(0, ordering: .releasing)
        schedulingNote(.atomicUpdate, indices.value)
        resetIndex.store(index &+ 1, ordering: .releasing)
        return entry
    }

    /// Whether an entry for the page is in the ring, harvested or not, but not consumed. For checks at rest.
    func holds(slot: UInt32, offset: UInt64) -> Bool {
        var index = resetIndex.load(ordering: .acquiring)
        let end = dirtyIndex.load(ordering: .acquiring)
        while index != end {
            let place = place(index)
            if self.slot(place).pointee.load(ordering: .relaxed) == slot,
                self.offset(place).pointee.load(ordering: .relaxed) == offset
            {
                return true
            }
            index &+= 1
        }
        return false
    }

    // MARK: Userspace's side: what it does in its mapping of the ring.

    /// Reads the entry at a free-running index: its flags first, with acquire order.
    public func entry(at index: UInt32) -> DirtyRingEntry {
        let place = place(index)
        schedulingPoint(.atomicLoad, identity(index))
        let seen = flags(place).pointee.load(ordering: .acquiring)
        return DirtyRingEntry(
            flags: seen, slot: slot(place).pointee.load(ordering: .relaxed),
            offset: offset(place).pointee.load(ordering: .relaxed))
    }

    /// Writes the flags of an entry, with release order.
    public func setFlags(_ value: UInt32, at index: UInt32) {
        schedulingPoint(.atomicStore, identity(index))
        flags(place(index)).pointee.store(value, ordering: .releasing)
    }

    /// Writes a whole entry, as no honest userspace does.
    public func scribble(_ entry: DirtyRingEntry, at index: UInt32) {
        let place = place(index)
        schedulingPoint(.atomicStore, identity(index))
        slot(place).pointee.store(entry.slot, ordering: .relaxed)
        offset(place).pointee.store(entry.offset, ordering: .relaxed)
        flags(place).pointee.store(entry.flags, ordering: .releasing)
    }

    // MARK: Where things are

    private func identity(_ index: UInt32) -> UInt64 { entries.part(Int(index & (size - 1))) }

    private func place(_ index: UInt32) -> UnsafeMutableRawPointer {
        let byte = UInt64(index & (size - 1)) * DirtyRingEntry.bytes
        return host.memory.bytes(of: frames[Int(byte / pageSize)]) + Int(byte % pageSize)
    }
    private func flags(_ place: UnsafeMutableRawPointer) -> UnsafeMutablePointer<Atomic<UInt32>> {
        place.assumingMemoryBound(to: Atomic<UInt32>.self)
    }
    private func slot(_ place: UnsafeMutableRawPointer) -> UnsafeMutablePointer<Atomic<UInt32>> {
        (place + 4).assumingMemoryBound(to: Atomic<UInt32>.self)
    }
    private func offset(_ place: UnsafeMutableRawPointer) -> UnsafeMutablePointer<Atomic<UInt64>> {
        (place + 8).assumingMemoryBound(to: Atomic<UInt64>.self)
    }
}
