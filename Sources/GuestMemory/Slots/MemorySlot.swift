import Frames
import HostMemory
import Synchronization

/// Flags of a slot. Kernel: `KVM_MEM_*`.
public struct SlotFlags: Sendable, Equatable {
    /// Kernel: `KVM_MEM_LOG_DIRTY_PAGES`.
    public var logDirtyPages = false
    /// Kernel: `KVM_MEM_READONLY`.
    public var readOnly = false
    /// The slot has private memory too. Kernel: `KVM_MEM_GUEST_MEMFD`.
    public var guestMemory = false
    public init(logDirtyPages: Bool = false, readOnly: Bool = false, guestMemory: Bool = false) {
        self.logDirtyPages = logDirtyPages
        self.readOnly = readOnly
        self.guestMemory = guestMemory
    }
}

/// A stretch of guest memory backed by a stretch of the process's. Kernel: `struct kvm_memory_slot`.
/// Spec: generic 1.4.
///
/// A slot object never changes but for its bitmap's bits, its large-page counts and its hold on a file; an update replaces it.
public final class MemorySlot: @unchecked Sendable {
    // Unchecked: immutable but for `dirtyBitmap` (atomic words) and `largePages` (under mmuLock, or not shared yet).
    public let id: UInt16
    /// Kernel: `as_id`.
    public let addressSpace: UInt8
    public let baseFrame: GuestFrame
    public let pageCount: UInt64
    /// The user address of the first page.
    public let userAddress: UserAddress
    public let flags: SlotFlags
    /// Kernel: `KVM_MEMSLOT_INVALID`: the slot is being deleted or moved.
    public let isInvalid: Bool
    public let dirtyBitmap: DirtyBitmap?
    /// Why a block can't be a huge page, per level. Kernel: `lpage_info`. Made by the MMU's `prepare`.
    public var largePages: LargePageCounts? {
        get { counts }
        set { counts = newValue }
    }
    // Set before anybody else sees the slot.
    @exclusivity(unchecked) private var counts: LargePageCounts?
    /// What the MMU keeps for the slot besides. Made by its `prepare`; a change of flags hands it on. Kernel: `arch`.
    public var extra: SlotExtra?
    /// Where its private memory is. Nil: it has none; the INVALID copy has none either. Kernel: `slot->gmem`.
    public let guestMemory: SlotGuestMemory?

    init(
        id: UInt16, addressSpace: UInt8 = 0, baseFrame: GuestFrame, pageCount: UInt64, userAddress: UserAddress,
        flags: SlotFlags, isInvalid: Bool = false, dirtyBitmap: DirtyBitmap?, largePages: LargePageCounts? = nil,
        extra: SlotExtra? = nil, guestMemory: SlotGuestMemory? = nil
    ) {
        self.id = id
        self.addressSpace = addressSpace
        self.baseFrame = baseFrame
        self.pageCount = pageCount
        self.userAddress = userAddress
        self.flags = flags
        self.isInvalid = isInvalid
        self.dirtyBitmap = dirtyBitmap
        counts = largePages
        self.extra = extra
        self.guestMemory = guestMemory
    }

    /// A copy that every lookup refuses. Spec: generic 4.5.
    func invalidCopy() -> MemorySlot {
        MemorySlot(
            id: id, addressSpace: addressSpace, baseFrame: baseFrame, pageCount: pageCount,
            userAddress: userAddress, flags: flags, isInvalid: true, dirtyBitmap: dirtyBitmap, largePages: largePages,
            extra: extra)
    }

    /// What the user calls it: address space << 16 | identity.
    public var number: UInt32 { UInt32(addressSpace) << 16 | UInt32(id) }
    public var frames: Range<GuestFrame> { baseFrame..<GuestFrame(baseFrame.number + pageCount) }
    public var userRange: Range<UserAddress> { userAddress..<(userAddress + pageCount << pageShift) }
    /// Whether writes to pages of the slot are logged.
    public var isLogged: Bool { flags.logDirtyPages }

    /// The user address of `frame`. Kernel: `__gfn_to_hva_memslot`.
    public func userAddress(of frame: GuestFrame) -> UserAddress {
        userAddress + (frame.number - baseFrame.number) << pageShift
    }

    /// The guest frames whose user addresses intersect `range`: start rounded down, end up. Spec: generic 3.2.
    public func frames(intersecting range: Range<UserAddress>) -> Range<GuestFrame>? {
        let low = max(range.lowerBound, userRange.lowerBound)
        let high = min(range.upperBound, userRange.upperBound)
        guard low < high else { return nil }
        let first = baseFrame.number + (low.value - userAddress.value) >> pageShift
        let end = baseFrame.number + (high.value - userAddress.value + pageSize - 1) >> pageShift
        return GuestFrame(first)..<GuestFrame(end)
    }

    /// The largest level, up to `largest`, of which nothing speaks against a huge page around `frame`; 4 KiB where the MMU
    /// keeps no counts. Caller holds mmuLock.
    public func largestAllowed(at frame: GuestFrame, upTo largest: PageLevel) -> PageLevel {
        guard let counts else { return .page4K }
        return lending(counts) { counts in
            var level = largest
            while level > .page4K, !counts.allows(frame, level) { level = level.below }
            return level
        }
    }

    /// Whether the whole block of `level` around `frame` lies in the slot and its user address is congruent, so that a
    /// huge leaf is possible at all. Spec: x86 3.5, X38.
    @inline(__always)
    public func allowsHugeLeaf(at frame: GuestFrame, _ level: PageLevel) -> Bool {
        guard level > .page4K else { return true }
        guard (baseFrame.number ^ userAddress.page) & (level.frames - 1) == 0 else { return false }
        let start = frame.aligned(to: level)
        return start >= baseFrame && start.number + level.frames <= baseFrame.number + pageCount
    }
}

/// What an MMU keeps for a slot. Kernel: `struct kvm_arch_memory_slot`.
open class SlotExtra: @unchecked Sendable {
    // Unchecked: subclasses name the lock of each property.
    public init() {}
}

/// Counts of reasons against a huge page, for levels 2 and 3. Kernel: `disallow_lpage`. Spec: x86 3.5.
public final class LargePageCounts: @unchecked Sendable {
    // Unchecked: changed under mmuLock held for writing only.
    let base: GuestFrame
    // No arrays: each fault asks, and their checks and counts cost as much as the rest of the answer.
    let level2: UnsafeMutableBufferPointer<Int32>
    let level3: UnsafeMutableBufferPointer<Int32>

    public init(_ slot: MemorySlot) {
        base = slot.baseFrame
        level2 = LargePageCounts.edges(slot, .page2M)
        level3 = LargePageCounts.edges(slot, .page1G)
    }

    deinit {
        level2.deallocate()
        level3.deallocate()
    }

    /// The reasons against a huge page of `level` around `frame`, and those among them that the slot's edges are.
    /// Caller holds mmuLock. For checks.
    public func reasons(_ frame: GuestFrame, _ level: PageLevel, in slot: MemorySlot) -> (all: Int, edges: Int) {
        let index = Int(frame.number / level.frames - base.number / level.frames)
        return (Int(level == .page2M ? level2[index] : level3[index]), slot.allowsHugeLeaf(at: frame, level) ? 0 : 1)
    }

    private static func edges(_ slot: MemorySlot, _ level: PageLevel) -> UnsafeMutableBufferPointer<Int32> {
        let first = slot.baseFrame.number / level.frames
        let last = (slot.baseFrame.number + slot.pageCount - 1) / level.frames
        let counts = UnsafeMutableBufferPointer<Int32>.allocate(capacity: Int(last - first + 1))
        counts.initialize(repeating: 0)
        for i in counts.indices {
            let frame = GuestFrame((first + UInt64(i)) * level.frames)
            if !slot.allowsHugeLeaf(at: frame, level) { counts[i] = 1 }
        }
        return counts
    }

    /// One reason more, or one less, against huge pages around `frame`. Caller holds mmuLock for writing.
    /// Kernel: `update_gfn_disallow_lpage_count`.
    public func add(_ count: Int32, at frame: GuestFrame) {
        level2[Int(frame.number / PageLevel.page2M.frames - base.number / PageLevel.page2M.frames)] += count
        level3[Int(frame.number / PageLevel.page1G.frames - base.number / PageLevel.page1G.frames)] += count
    }

    /// How many reasons are counted against a huge page of `level`, 2 or 3, around `frame`; that its frames are neither all
    /// private nor all shared is not among them. For checks.
    public func reasons(at frame: GuestFrame, _ level: PageLevel) -> Int32 {
        let index = Int(frame.number / level.frames - base.number / level.frames)
        return (level == .page2M ? level2[index] : level3[index]) & Int32.max
    }

    /// Whether nothing speaks against a huge page of `level` around `frame`. Caller holds mmuLock.
    @inline(__always)
    public func allows(_ frame: GuestFrame, _ level: PageLevel) -> Bool {
        let index = Int(frame.number / level.frames - base.number / level.frames)
        precondition(index >= 0 && index < (level == .page1G ? level3.count : level2.count), "a frame of another slot")
        switch level {
        case .page2M: return level2[index] == 0
        case .page1G: return level3[index] == 0
        default: return level == .page4K
        }
    }
}
