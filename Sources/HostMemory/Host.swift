import Audit
import Frames
import Synchronization
import Synchrony

/// The host kernel, as far as it owns memory: the zero page, reserved frames, page tables of secondary MMUs, memory
/// failure. Kernel: `mm/`.
public final class Host: @unchecked Sendable {
    // Unchecked: `spaces`, `spacesEntered` and `inaccessibleFiles` are touched only under `registry`; all else is immutable.
    public let memory: PhysicalMemory
    /// The shared page of zeros: reserved, counted by GUP, never freed. Kernel: `ZERO_PAGE(0)`.
    public let zeroPage: HostFrame
    let hugeZeroPage = HugeZeroPage()
    /// Whether every suitable anonymous VMA gets huge pages on fault; otherwise only those advised to.
    /// Kernel: `/sys/kernel/mm/transparent_hugepage/enabled`: `always`, or `madvise`.
    public let transparentHugePages: Bool
    /// A read fault on an object's page also maps its neighbours that are there already, in an aligned block of so many
    /// pages; 1: none. Kernel: `fault_around_bytes` in debugfs.
    public let faultAroundPages: Int
    private let anonymousIdentities = Atomic<UInt64>(0)
    let registry = SpinLock(.notifierList)
    var spaces: [Unmanaged<AddressSpace>] = []
    /// Files that no process maps, from their making to `evict`. Under `registry`.
    var inaccessibleFiles: [InaccessibleFile] = []
    var spacesEntered: UInt64 = 0
    /// Where anonymous and shared memory goes when there is no room. Nil: it stays.
    public let swap: SwapDevice?

    /// - Parameter reclaims: whether the host keeps track of its pages' age, so that it can take some back. With a swap
    ///   device it does.
    public init(
        memory: PhysicalMemory, transparentHugePages: Bool, faultAroundPages: Int = 16, swap: SwapDevice? = nil,
        reclaims: Bool = false
    ) {
        precondition(faultAroundPages > 0 && faultAroundPages & (faultAroundPages - 1) == 0, "a power of two")
        self.faultAroundPages = faultAroundPages
        self.swap = swap
        if reclaims || swap != nil { memory.lists = PageLists(memory) }
        guard let zero = memory.allocatePages(order: 0) else { preconditionFailure("no frame for the zero page") }
        memory.clear(zero, count: 1)
        memory.page(zero).pointee.flags.bitwiseOr(PageFlags.reserved | PageFlags.zeroPage, ordering: .relaxed)
        self.memory = memory
        self.transparentHugePages = transparentHugePages
        zeroPage = zero
    }

    /// See `VMA.anonymous`.
    func newAnonymousIdentity() -> UInt64 { anonymousIdentities.add(1, ordering: .relaxed).newValue }

    /// Takes `count` frames of RAM out of the allocator's hands for good: firmware tables, a carve-out. Nil when no
    /// contiguous stretch is left. At most 1024. Kernel: `memblock_reserve`, `PG_reserved`.
    public func reserveFrames(_ count: Int) -> Range<HostFrame>? {
        precondition(count > 0)
        var order = 0
        while 1 << order < count { order += 1 }
        guard order <= PhysicalMemory.largestOrder, let first = memory.allocatePages(order: order, shape: .plain)
        else { return nil }
        for i in 0..<(1 << order) {
            let page = memory.page(first.advanced(by: i))
            page.pointee.flags.bitwiseOr(PageFlags.reserved, ordering: .relaxed)
            page.pointee.referenceCount.store(1, ordering: .relaxed)
        }
        for i in count..<(1 << order) { returnReserved(first.advanced(by: i)) }
        memory.clear(first, count: count)
        return first..<first.advanced(by: count)
    }

    /// Gives one frame of a rounded-up reservation back.
    private func returnReserved(_ frame: HostFrame) {
        let page = memory.page(frame)
        page.pointee.flags.bitwiseAnd(~PageFlags.reserved, ordering: .relaxed)
        memory.put(page)
    }

    // MARK: Page tables of a secondary MMU

    /// Takes 2^order frames for a page table of a secondary MMU and writes `fill` into every entry; order 2 is a
    /// 16 KiB Sv39x4 root. Nil when memory is used up. Kernel: `kvm_mmu_memory_cache_alloc`.
    public func allocateTable(order: Int, fill: UInt64) -> HostFrame? {
        guard let frame = memory.allocatePages(order: order) else { return nil }
        let count = 1 << order
        for i in 0..<count {
            memory.page(frame.advanced(by: i)).pointee.flags.bitwiseOr(PageFlags.table, ordering: .relaxed)
        }
        if fill == 0 {
            memory.clear(frame, count: count)
        } else {
            memory.bytes(of: frame).initializeMemory(as: UInt64.self, repeating: fill, count: count * 512)
        }
        memory.willWrite(frame, count: count)
        return frame
    }

    /// A table whose 512 entries the caller writes, each of them, before it links it. Nil when memory is used up.
    public func allocateUnwrittenTable() -> HostFrame? {
        guard let frame = memory.allocatePages(order: 0) else { return nil }
        memory.page(frame).pointee.flags.bitwiseOr(PageFlags.table | PageFlags.written, ordering: .relaxed)
        return frame
    }

    /// Gives a table back. Nobody may walk it any more.
    public func freeTable(_ frame: HostFrame) {
        let page = tablePage(frame)
        memory.put(page)
    }

    /// The two words that the owner of a table keeps in its page frame. Kernel: `page_private`, `struct ptdesc`.
    public func tableWords(_ frame: HostFrame) -> (UInt64, UInt64) {
        let page = tablePage(frame)
        return (Self.word(&page.pointee.word0).peek(), Self.word(&page.pointee.word1).peek())
    }

    public func setTableWords(_ frame: HostFrame, _ word0: UInt64, _ word1: UInt64) {
        let page = tablePage(frame)
        Self.word(&page.pointee.word0).initialize(to: word0)
        Self.word(&page.pointee.word1).initialize(to: word1)
    }

    /// Readers of the one word meet writers of the other.
    private static func word(_ place: UnsafeMutablePointer<UInt64>) -> AtomicWord {
        AtomicWord(at: UnsafeMutableRawPointer(place))
    }

    /// `frame` as something that an entry may link: it must be in use as a page table, any other frame traps.
    public func table(_ frame: HostFrame) -> TableFrame {
        _ = tablePage(frame)
        return TableFrame(frame)
    }

    /// The page frame of a table; any other frame traps, so that a leaf's frame number never leads here (Spec: I-4).
    private func tablePage(_ frame: HostFrame) -> UnsafeMutablePointer<PageFrame> {
        precondition(memory.hasPageFrame(frame))
        let page = memory.page(frame)
        precondition(page.pointee.flags.load(ordering: .relaxed) & PageFlags.table != 0, "not a page table")
        return page
    }
}

/// A frame that holds a page table of a secondary MMU. Only `Host.table` makes one, so that an entry can't be made to
/// point to a page of the guest as if that were a table. Kernel: `struct kvm_mmu_page`, as the parent entry sees it.
@frozen
public struct TableFrame: Sendable, Equatable {
    public let frame: HostFrame
    init(_ frame: HostFrame) { self.frame = frame }
}
