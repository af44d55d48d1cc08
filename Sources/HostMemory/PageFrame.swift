import Audit
import Frames
import Synchronization

/// The state of one 4 KiB frame of RAM: 64 bytes, like the kernel's. Kernel: `struct page`.
///
/// Reference and pin counts of a compound page are kept in its head. A frame of a *non-compound* higher-order
/// allocation has its own count: 1 in the first frame, 0 in the others, which is what a graphics driver's buffer looks
/// like and what this project is about.
///
/// All bytes zero means: never used, free, and the frame's bytes are as the arena was at the start. So page frames on
/// zeroed memory need no initialising, and those of memory that nobody asks for are never touched.
///
/// Only this module sees page frames. Stage-2 code has frame numbers and can't get here from them (Spec: I-4).
@usableFromInline struct PageFrame: ~Copyable {
    /// `PageFlags` bits.
    @usableFromInline let flags = Atomic<UInt64>(0)
    @usableFromInline let referenceCount = Atomic<Int32>(0)
    /// Host page-table entries that map this very frame.
    @usableFromInline let mapCount = Atomic<Int32>(0)
    /// FOLL_PINs of a large folio; a small one adds `pinBias` to `referenceCount` instead.
    @usableFromInline let pinCount = Atomic<Int32>(0)
    /// Frames to go back to the head of the compound page; 0 in heads and ordinary pages. A lookup without locks may read
    /// it while the page is freed, and looks again. Kernel: `READ_ONCE(page->compound_head)`.
    @usableFromInline let headDistance = Atomic<UInt32>(0)
    /// The order of a head or of a free block.
    @usableFromInline var order: UInt8 = 0
    @usableFromInline var reserved0: UInt8 = 0
    @usableFromInline var reserved1: UInt16 = 0
    /// Links of the free list, or of the frame's user: indices of page frames, 0 for none (frame 0 is
    /// nobody's).
    @usableFromInline var next: UInt32 = 0
    @usableFromInline var previous: UInt32 = 0
    @usableFromInline var reserved2: UInt32 = 0
    /// For the frame's user: a table keeps its guest frame, level and parent here; an anonymous page its place in the
    /// mappings (`word0`) and, in the swap cache, its slot (`word1`); an object's page its index and the object.
    /// Kernel: `ptdesc`, `page_private`, `folio->index`, `folio->mapping`.
    @usableFromInline var word0: UInt64 = 0
    @usableFromInline var word1: UInt64 = 0
    /// Fills the page frame up to 64 bytes.
    @usableFromInline var reserved3: UInt64 = 0

    /// Page frames of memory that nobody has used, the caller's to deallocate.
    static func allocateZeroed(_ count: Int) -> UnsafeMutablePointer<PageFrame> {
        let bytes = UnsafeMutableRawPointer.allocate(
            byteCount: count * MemoryLayout<PageFrame>.stride, alignment: MemoryLayout<PageFrame>.stride)
        zero(bytes, count)
        return bytes.bindMemory(to: PageFrame.self, capacity: count)
    }

    /// Makes `count` page frames at `bytes` those of memory that nobody has used.
    static func zero(_ bytes: UnsafeMutableRawPointer, _ count: Int) {
        bytes.initializeMemory(
            as: UInt64.self, repeating: 0, count: count * MemoryLayout<PageFrame>.stride / 8)
    }

    /// What a pin adds to a small folio's reference count. Kernel: `GUP_PIN_COUNTING_BIAS`. Spec: generic 1.9.
    static let pinBias: Int32 = 1024
}

/// Flag bits of a page frame, with who set accessed and dirty kept apart. Spec: generic 1.9 (side marks), section 8.
public struct PageFlags: Sendable, Equatable {
    public var bits: UInt64
    @inlinable public init(_ bits: UInt64) { self.bits = bits }
    /// The allocator's: the first frame of a block in a free list, or memory that was never handed out.
    public var isFree: Bool { bits & Self.free != 0 }
    public var isKnownZero: Bool { bits & Self.written == 0 }

    /// Kernel: `PG_reserved`: nobody but the owner may touch the other flags. Spec: I-14.
    public static let reserved: UInt64 = 1 << 0
    /// The head of a compound page. Kernel: `PG_head`.
    public static let head: UInt64 = 1 << 1
    /// A tail of a compound page.
    public static let tail: UInt64 = 1 << 2
    /// In the buddy allocator's free list.
    public static let free: UInt64 = 1 << 3
    /// An anonymous page. Kernel: `PAGE_MAPPING_ANON`.
    public static let anonymous: UInt64 = 1 << 4
    /// Mapped by one address space only, and not shared with a child. Kernel: `PG_anon_exclusive`.
    public static let anonymousExclusive: UInt64 = 1 << 5
    /// The frame's bytes may be other than zero. The model's own: without it nobody has written here, and a fresh arena
    /// need not be touched.
    public static let written: UInt64 = 1 << 6
    /// Kernel: `PG_hwpoison`.
    public static let poisoned: UInt64 = 1 << 7
    /// A page-table page of a secondary or primary MMU.
    public static let table: UInt64 = 1 << 8
    /// In a driver's buffer.
    public static let driver: UInt64 = 1 << 9
    /// The shared page of zeros. Kernel: `ZERO_PAGE`.
    public static let zeroPage: UInt64 = 1 << 10

    /// In one of reclaim's lists. Kernel: `PG_lru`.
    public static let listed: UInt64 = 1 << 11
    /// Belongs in the active list. Kernel: `PG_active`.
    public static let active: UInt64 = 1 << 12
    /// Was found accessed once by reclaim. Kernel: `PG_referenced`, as the inactive list uses it.
    public static let referenced: UInt64 = 1 << 13
    /// An anonymous page whose content its owner gave up: reclaim drops it if nobody writes. Kernel: an anonymous page
    /// without `PG_swapbacked`.
    public static let lazilyFreed: UInt64 = 1 << 14
    /// The swap device's cache holds it. Kernel: `PG_swapcache`.
    public static let swapCache: UInt64 = 1 << 15
    /// Belongs to a memory object, whose address and page stand in the frame's words. Kernel: `folio->mapping`.
    public static let objectPage: UInt64 = 1 << 32

    /// Stands for several pages of equal content. Kernel: `folio_test_ksm`.
    public static let merged: UInt64 = 1 << 33
    /// Out of everybody's reach but its process's. Kernel: a page of `memfd_secret`.
    public static let secret: UInt64 = 1 << 34

    /// The head of a huge page of a pool. Kernel: `folio_test_hugetlb`.
    public static let hugeTLB: UInt64 = 1 << 35

    /// In a driver's buffer that is no file's. Kernel: `folio->mapping` is null.
    public static let withoutOwner: UInt64 = 1 << 36

    /// Belongs to an `InaccessibleFile`; the frame's first word is its index there. Kernel: a guest_memfd's folio.
    public static let inaccessible: UInt64 = 1 << 40
    /// Of such a page: its content is the guest's. Kernel: `PG_uptodate`, as guest_memfd uses it.
    public static let prepared: UInt64 = 1 << 41

    /// Accessed and dirty, by originator: bit `16 + Originator`, bit `24 + Originator`.
    @inline(__always) public static func accessed(_ by: Originator) -> UInt64 { 1 << (16 + UInt64(by.rawValue)) }
    @inline(__always) public static func dirty(_ by: Originator) -> UInt64 { 1 << (24 + UInt64(by.rawValue)) }
    public static let anyAccessed: UInt64 = 0xff << 16
    public static let anyDirty: UInt64 = 0xff << 24

    public var isReserved: Bool { bits & Self.reserved != 0 }
    public var isAccessed: Bool { bits & Self.anyAccessed != 0 }
    public var isDirty: Bool { bits & Self.anyDirty != 0 }
    public func isAccessed(by originator: Originator) -> Bool { bits & Self.accessed(originator) != 0 }
    public func isDirty(by originator: Originator) -> Bool { bits & Self.dirty(originator) != 0 }
}

/// Who set a page's accessed or dirty state.
public enum Originator: UInt8, Sendable, CaseIterable {
    /// Get-user-pages, on behalf of its caller.
    case getUserPages
    /// The primary page table's entry, when it went away or was harvested.
    case primaryEntry
    /// KVM's release or, under the old policies, KVM's zap.
    case kvm
    /// The kernel or a driver itself.
    case driver
}
