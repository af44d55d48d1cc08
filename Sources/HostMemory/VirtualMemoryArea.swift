import Frames
import Synchronization

/// What a mapping allows its process to do. Kernel: `PROT_*`.
public struct Protection: Sendable, Equatable {
    public var read: Bool
    public var write: Bool
    public var execute: Bool

    @inlinable public init(read: Bool = false, write: Bool = false, execute: Bool = false) {
        self.read = read
        self.write = write
        self.execute = execute
    }

    public static let none = Protection()
    public static let read = Protection(read: true)
    public static let readWrite = Protection(read: true, write: true)
    public static let readExecute = Protection(read: true, execute: true)
    public static let readWriteExecute = Protection(read: true, write: true, execute: true)
}

/// What a stretch of an address space is. Kernel: `vm_flags`.
public struct VMAFlags: Equatable, Sendable {
    public var read = false
    public var write = false
    public var execute = false
    /// Kernel: `VM_SHARED`; a private mapping copies on write.
    public var shared = false
    /// Kernel: `VM_PFNMAP`: entries name frames, whether or not a page frame stands behind them.
    public var pfnMap = false
    /// Kernel: `VM_MIXEDMAP`: some entries are special, others map counted pages.
    public var mixedMap = false
    /// Kernel: `VM_IO`.
    public var io = false
    /// Kernel: `VM_HUGEPAGE`, by madvise.
    public var hugePage = false
    /// Kernel: `VM_NOHUGEPAGE`, by madvise.
    public var noHugePage = false
    /// Kernel: `VM_MERGEABLE`, by madvise.
    public var mergeable = false
    /// Kernel: `VM_LOCKED`: of memfd_secret's memory, not of mlock. A child of fork does not have it.
    public var locked = false
    /// Kernel: `VM_ACCOUNT`: private pages of it count against the overcommit limit, since it can be written or once could.
    public var accounted = false

    @inlinable public init() {}

    @inlinable public var protection: Protection {
        get { Protection(read: read, write: write, execute: execute) }
        set {
            read = newValue.read
            write = newValue.write
            execute = newValue.execute
        }
    }
    /// Whether the process may do anything at all here. Kernel: `vma_is_accessible`.
    @inlinable public var isAccessible: Bool { read || write || execute }
    /// Whether a write to a shared page makes a private copy. Kernel: `is_cow_mapping`.
    @inlinable public var copiesOnWrite: Bool { !shared }
}

/// What a caller outside this module sees of a VMA. Good only while the address space's `mmapLock` is held since the
/// lookup; after the lock was dropped the VMA must be looked up again. Kernel: `struct vm_area_struct`.
public struct VMAInfo: Sendable {
    public let range: Range<UserAddress>
    public let flags: VMAFlags
    /// Unique in the address space; a part split off gets one of its own.
    public let identity: UInt64
    /// The page of the backing that `range.lowerBound` shows. Kernel: `vm_pgoff`.
    public let firstPage: Int
    /// Whether a guard was ever put in. Kernel: `VM_MAYBE_GUARD`.
    public let mayHoldGuards: Bool

    public var pageCount: Int { Int(range.upperBound.page - range.lowerBound.page) }

    /// The page of the backing that `address` shows.
    public func backingPage(of address: UserAddress) -> Int {
        firstPage + Int(address.page - range.lowerBound.page)
    }
    public func contains(_ address: UserAddress) -> Bool { range.contains(address) }
}

/// What a mapping shows. Kernel: the file and flags given to `mmap`.
public enum Backing: Sendable {
    /// Kernel: `MAP_PRIVATE|MAP_ANONYMOUS`.
    case anonymous
    /// Kernel: `MAP_SHARED|MAP_ANONYMOUS`: a memory object of its own, shared over fork.
    case anonymousShared
    /// A memfd, from `firstPage` on.
    case object(MemoryObject, firstPage: Int = 0, shared: Bool = true)
    /// A device driver's memory, from `firstPage` on.
    case driver(DriverMapping, firstPage: Int = 0, shared: Bool = true)
    /// Huge pages of a pool, from the huge page `firstPage` on. Kernel: hugetlbfs, `MAP_HUGETLB`.
    case huge(HugePageFile, firstPage: Int = 0, shared: Bool = true)
}

/// Kernel: `madvise`.
public enum Advice: Sendable {
    /// Kernel: `MADV_DONTNEED`.
    case dontNeed
    /// Kernel: `MADV_HUGEPAGE`.
    case hugePage
    /// Kernel: `MADV_NOHUGEPAGE`.
    case noHugePage
    /// Kernel: `MADV_POPULATE_READ`.
    case populateRead
    /// Kernel: `MADV_POPULATE_WRITE`.
    case populateWrite
    /// Kernel: `MADV_REMOVE`.
    case remove
    /// Kernel: `MADV_COLD`.
    case cold
    /// Kernel: `MADV_PAGEOUT`.
    case pageOut
    /// Kernel: `MADV_FREE`.
    case free
    /// Kernel: `MADV_COLLAPSE`.
    case collapse
    /// Kernel: `MADV_MERGEABLE`.
    case mergeable
    /// Kernel: `MADV_UNMERGEABLE`.
    case unmergeable
    /// Kernel: `MADV_HWPOISON`.
    case hardwarePoison
    /// Kernel: `MADV_GUARD_INSTALL`.
    case guardInstall
    /// Kernel: `MADV_GUARD_REMOVE`.
    case guardRemove
}

/// A stretch of an address space with one backing and one set of flags.
///
/// `range`, `firstPage` and `flags` change only with the space's `mmapLock` held for write and the backing's mapping
/// lock held; whoever holds either may read them.
final class VMA: @unchecked Sendable {
    // Unchecked: see above for who may touch the mutable properties.
    let space: Unmanaged<AddressSpace>
    let backing: Backing
    let identity: UInt64
    var range: Range<UserAddress>
    var firstPage: Int
    var flags: VMAFlags
    /// Who may find private pages of this VMA: set for good before one is put in, 0 before. A VMA without needs no copying by
    /// fork, for the child's own faults fill it as well; two VMAs with different ones never become one. Kernel: `anon_vma`.
    let anonymous = Atomic<UInt64>(0)
    /// Whether a fork's parent may find them too. Kernel: an `anon_vma_chain` of more than one link.
    var hasInheritedAnonymous = false
    /// Whether a guard was ever put in: fork copies its entries. It does not keep areas from becoming one, and stays.
    /// Kernel: `VM_MAYBE_GUARD`.
    let mayHoldGuards = Atomic<Bool>(false)
    /// Huge pages that the pool has promised to this private mapping. Kernel: `resv_map`.
    let promises = Atomic<Int>(0)
    /// Changed with `mmapLock` held for write. Kernel: `vm_userfaultfd_ctx`.
    var userFaults: UserFaultRegistration?

    init(
        _ space: AddressSpace, identity: UInt64, range: Range<UserAddress>, firstPage: Int, flags: VMAFlags,
        backing: Backing
    ) {
        self.space = Unmanaged.passUnretained(space)
        self.identity = identity
        self.range = range
        self.firstPage = firstPage
        self.flags = flags
        self.backing = backing
    }

    var mayHoldAnonymous: Bool { anonymous.load(ordering: .acquiring) != 0 }

    var info: VMAInfo {
        VMAInfo(
            range: range, flags: flags, identity: identity, firstPage: firstPage,
            mayHoldGuards: mayHoldGuards.load(ordering: .relaxed))
    }

    func backingPage(of address: UserAddress) -> Int {
        firstPage + Int(address.page - range.lowerBound.page)
    }

    /// Kernel: `vma_is_secretmem`.
    var isSecret: Bool {
        if case .object(let object, _, _) = backing { return object.isSecret }
        return false
    }

    /// The list of everybody who maps the backing, if it has one.
    var mappings: MappingList? {
        switch backing {
        case .anonymous, .anonymousShared: nil
        case .object(let object, _, _): object.mappings
        case .driver(let driver, _, _): driver.mappings
        case .huge(let file, _, _): file.mappings
        }
    }

    /// Whose memory it is, if a driver's.
    var driver: DriverMapping? { if case .driver(let driver, _, _) = backing { driver } else { nil } }

    /// Whether entries are born read-only though the mapping is shared and writable, because the driver wants to hear
    /// of the first write, or the file must know its dirty pages. Kernel: `vma_wants_writenotify`.
    var wantsWriteNotification: Bool {
        switch backing {
        case .driver(let driver, _, _): driver.wantsWriteNotification
        case .object(let object, _, _): object.disk != nil
        case .anonymous, .anonymousShared, .huge: false
        }
    }

    /// Whether an entry for a frame of the backing is born writable. Kernel: the W bit of `vm_page_prot`.
    var entriesAreWritable: Bool { flags.shared && flags.write && !wantsWriteNotification }
}
