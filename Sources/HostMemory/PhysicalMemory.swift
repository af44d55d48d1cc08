import Audit
import Frames
import Synchronization
import Synchrony

/// The host's physical memory: real bytes in one arena, a page frame for each frame of RAM, and after RAM a stretch of
/// device memory without page frames (a BAR, VRAM).
///
/// Frame numbers: RAM is `ram`, device memory `device`, directly after it. Frame 0 is never handed out.
/// The caller owns the arena and keeps it alive longer than this object.
public final class PhysicalMemory: @unchecked Sendable {
    // Unchecked: the arena is raw memory, changed through atomics or by the one owner of a frame; the page frames'
    // plain fields belong to the allocator (under the zone lock) or to the frame's one user.
    @usableFromInline let arena: UnsafeMutableRawPointer
    @usableFromInline let frames: UnsafeMutablePointer<PageFrame>
    private let ownsPageFrames: Bool
    private let storage: MemoryStorage?
    /// Whether the arena's bytes were zero at the start.
    let arenaIsZero: Bool
    /// The watermark: this frame and all after it were never used, are free, and stand in no free list; their page
    /// frames are all zero. Under the zone lock.
    var virgin = 1
    public let ram: Range<HostFrame>
    public let device: Range<HostFrame>
    /// The journal of the run, if there is one.
    public let journal: Journal?
    /// Whether there is one.
    public let isObserved: Bool
    let zone = SpinLock(.zone)
    /// Reclaim's lists, on a host that has any. Set before the first page is handed out.
    var lists: PageLists?
    /// Pools of huge pages. Changed while nothing is used yet.
    var hugePools: [HugePagePool] = [] {
        didSet { hasHugePools = !hugePools.isEmpty }
    }
    /// Whether there is any: asked at each walk.
    @exclusivity(unchecked) private(set) var hasHugePools = false
    /// One past the last frame that the allocator may hand out; above it are pools' gigantic pages. Under the zone lock.
    var ceiling: Int
    /// Heads of the free lists by order; 0 for none. Under the zone lock. No array: its checks cost as much as the rest
    /// of an allocation.
    let freeHeads: UnsafeMutablePointer<UInt32>
    var freeCount: Int
    /// The allocation that fails next, counted from the next one on; 0: none. Under the zone lock.
    var failingAllocation = 0
    /// Device frames handed out so far.
    var deviceNext: UInt64

    /// The largest order of the buddy allocator: 2^10 frames, 4 MiB. Kernel: `MAX_PAGE_ORDER`.
    public static let largestOrder = 10

    /// - Parameters:
    ///   - arena: page-aligned, `(ramFrames + deviceFrames) * 4096` bytes.
    ///   - pageFrameStorage: where the page frames go, 64 bytes for each frame of RAM, all zero, 64-byte aligned, the
    ///     caller's to keep; nil allocates. Linux maps its page frames with huge pages (`vmemmap`); a caller can do the
    ///     same. Fresh anonymous memory makes a start whose price does not depend on the size.
    ///   - arenaIsZero: whether the arena's bytes are zero (fresh anonymous memory), so that frames need no clearing.
    public init(
        arena: UnsafeMutableRawPointer, ramFrames: Int, deviceFrames: Int = 0, arenaIsZero: Bool,
        journal: Journal? = nil, pageFrameStorage: UnsafeMutableRawPointer? = nil
    ) {
        precondition(MemoryLayout<PageFrame>.size == 64 && MemoryLayout<PageFrame>.stride == 64)
        precondition(UInt(bitPattern: arena) % UInt(pageSize) == 0, "the arena must be page-aligned")
        precondition(ramFrames >= 16, "at least 16 frames of RAM")
        precondition(ramFrames <= Int(UInt32.max), "links have 32 bits")
        self.arena = arena
        self.arenaIsZero = arenaIsZero
        self.journal = journal
        isObserved = journal != nil
        ram = HostFrame(0)..<HostFrame(UInt64(ramFrames))
        device = HostFrame(UInt64(ramFrames))..<HostFrame(UInt64(ramFrames + deviceFrames))
        deviceNext = UInt64(ramFrames)
        ownsPageFrames = pageFrameStorage == nil
        storage = nil
        frames =
            pageFrameStorage?.bindMemory(to: PageFrame.self, capacity: ramFrames)
            ?? PageFrame.allocateZeroed(ramFrames)
        freeHeads = Self.emptyLists()
        freeCount = ramFrames - 1
        ceiling = ram.count
        reserveFirstFrame()
    }

    /// On storage that was used before: starts as new, at a price that depends on what was used, not on the size.
    public init(_ storage: MemoryStorage, journal: Journal? = nil) {
        storage.renew()
        self.storage = storage
        self.journal = journal
        isObserved = journal != nil
        arena = storage.arena
        arenaIsZero = true
        frames = storage.frames
        ownsPageFrames = false
        ram = HostFrame(0)..<HostFrame(UInt64(storage.ramFrames))
        device = ram.upperBound..<HostFrame(UInt64(storage.ramFrames + storage.deviceFrames))
        deviceNext = storage.deviceNext
        freeHeads = Self.emptyLists()
        freeCount = storage.ramFrames - 1
        ceiling = ram.count
        reserveFirstFrame()
    }

    private static func emptyLists() -> UnsafeMutablePointer<UInt32> {
        let heads = UnsafeMutablePointer<UInt32>.allocate(capacity: largestOrder + 1)
        heads.initialize(repeating: 0, count: largestOrder + 1)
        return heads
    }

    /// Frame 0 is nobody's: its number means "none" in links, and in roots of tables.
    private func reserveFirstFrame() {
        frames[0].flags.store(PageFlags.reserved | (arenaIsZero ? 0 : PageFlags.written), ordering: .relaxed)
        frames[0].referenceCount.store(1, ordering: .relaxed)
    }

    deinit {
        freeHeads.deallocate()
        if let storage {
            storage.touched = max(storage.touched, ceiling < ram.count ? ram.count : virgin)
            storage.deviceNext = max(storage.deviceNext, deviceNext)
        }
        // Page frames are plain words: there is nothing to undo in them, and most may never have been touched.
        if ownsPageFrames { frames.deallocate() }
    }

    /// Whether a page frame exists for `frame`. Says nothing about counts. Kernel: `pfn_valid`.
    @inlinable public func hasPageFrame(_ frame: HostFrame) -> Bool { frame < ram.upperBound }

    /// Whether `frame` is memory at all.
    @inlinable public func exists(_ frame: HostFrame) -> Bool { frame < device.upperBound }

    /// The one question about a frame that stage-2 code may ask. Kernel: `PageReserved(pfn_to_page(pfn))`. Spec: I-4.
    @inlinable public func isReserved(_ frame: HostFrame) -> Bool {
        guard hasPageFrame(frame) else { return false }
        return frames[Int(frame.number)].flags.load(ordering: .relaxed) & PageFlags.reserved != 0
    }

    /// The bytes of `frame`.
    @inlinable @inline(__always)
    public func bytes(of frame: HostFrame) -> UnsafeMutableRawPointer {
        arena + Int(truncatingIfNeeded: frame.number << pageShift)
    }

    /// The 8-byte entry at physical address `address`. Precondition (checked): inside the arena, 8-byte aligned.
    @inlinable @inline(__always)
    public func word(at address: UInt64) -> AtomicWord {
        precondition(address & 7 == 0 && address >> pageShift < device.upperBound.number)
        return AtomicWord(at: arena + Int(truncatingIfNeeded: address))
    }

    /// See `TableArena.entry`.
    @inlinable @inline(__always)
    public func entry(_ index: Int, of frame: HostFrame) -> AtomicWord { tables.entry(index, of: frame) }

    /// For reports and tests: flags and counts of a frame, nil where no page frame exists.
    public func inspect(_ frame: HostFrame) -> PageState? {
        guard hasPageFrame(frame) else { return nil }
        let page = frames + Int(frame.number)
        let head = page - Int(page.pointee.headDistance.load(ordering: .relaxed))
        // What the flags of memory that was never used would say.
        var implied: UInt64 = 0
        if Int(frame.number) >= virgin, Int(frame.number) < ceiling {
            implied = PageFlags.free | (arenaIsZero ? 0 : PageFlags.written)
        }
        return PageState(
            flags: PageFlags(page.pointee.flags.load(ordering: .relaxed) | implied),
            headFlags: PageFlags(head.pointee.flags.load(ordering: .relaxed) | implied),
            referenceCount: Int(page.pointee.referenceCount.load(ordering: .relaxed)),
            headReferenceCount: Int(head.pointee.referenceCount.load(ordering: .relaxed)),
            mapCount: Int(page.pointee.mapCount.load(ordering: .relaxed)),
            pinCount: Int(head.pointee.pinCount.load(ordering: .relaxed)))
    }

    /// Makes every page clean and unaccessed, as writeback and ageing would in the long run. For benchmarks and tests,
    /// while nothing else runs.
    public func forgetAccessedAndDirty() {
        for i in 0..<virgin {
            frames[i].flags.bitwiseAnd(~(PageFlags.anyAccessed | PageFlags.anyDirty), ordering: .relaxed)
        }
    }

    @inlinable @inline(__always) func page(_ frame: HostFrame) -> UnsafeMutablePointer<PageFrame> {
        frames + Int(frame.number)
    }
    @inlinable @inline(__always) func head(of page: UnsafeMutablePointer<PageFrame>) -> UnsafeMutablePointer<PageFrame>
    {
        page - Int(page.pointee.headDistance.load(ordering: .relaxed))
    }
    @inlinable @inline(__always) func frame(of page: UnsafeMutablePointer<PageFrame>) -> HostFrame {
        HostFrame(UInt64(page - frames))
    }

    /// Records an event where a journal listens.
    @inlinable @inline(__always)
    public func record(_ event: @autoclosure () -> Event) {
        if isObserved { tell(event()) }
    }

    /// Apart, so that nothing of it burdens who is not listened to.
    @inline(never)
    public func tell(_ event: Event) { journal?.record(event) }

    /// Where entries of tables are found: without this object, so that nobody counts references to it on the way down.
    @inlinable public var tables: TableArena { TableArena(arena) }

    /// Sets `bits`, if they are not all set already; a reserved page is left alone (Spec: I-14). Returns whether it
    /// changed anything.
    @inlinable @inline(__always) @discardableResult
    func mark(_ page: UnsafeMutablePointer<PageFrame>, _ bits: UInt64) -> Bool {
        let old = page.pointee.flags.load(ordering: .relaxed)
        if old & bits == bits || old & PageFlags.reserved != 0 { return false }
        page.pointee.flags.bitwiseOr(bits, ordering: .relaxed)
        return true
    }
}

/// The arena, as far as tables are concerned. Good as long as its `PhysicalMemory` is kept.
@frozen
public struct TableArena: @unchecked Sendable {
    // Unchecked: what the pointer leads to is changed by atomic operations alone.
    @usableFromInline let arena: UnsafeMutableRawPointer
    @inlinable init(_ arena: UnsafeMutableRawPointer) { self.arena = arena }

    /// Entry `index` (0..<512, or ..<2048 for a 16 KiB root) of the table at `frame`, unchecked.
    @inlinable @inline(__always)
    public func entry(_ index: Int, of frame: HostFrame) -> AtomicWord {
        AtomicWord(at: arena + Int(truncatingIfNeeded: frame.number << pageShift) + index &* 8)
    }
}

/// What `PhysicalMemory.inspect` tells about one frame.
public struct PageState: Sendable, Equatable {
    public var flags: PageFlags
    /// The flags of the folio's head: where accessed and dirty are kept.
    public var headFlags: PageFlags
    /// This frame's own counter: 0 in every tail page.
    public var referenceCount: Int
    public var headReferenceCount: Int
    public var mapCount: Int
    public var pinCount: Int
}
