import Frames
import HostMemory

/// What a guest access that missed needs.
public struct GuestFault: Sendable, Equatable {
    public var address: GuestAddress
    /// All the rest in one word, which goes from function to function as it is: bits 0 to 7 the access, 8 to 15 the level,
    /// then the flags.
    private var traits: UInt64

    private static let present: UInt64 = 1 << 16
    private static let reserved: UInt64 = 1 << 17
    private static let prefetch: UInt64 = 1 << 18
    private static let onGuestTables: UInt64 = 1 << 19
    private static let saysWhose: UInt64 = 1 << 20
    private static let wantsPrivate: UInt64 = 1 << 21

    public var access: AccessKind {
        get { traits & 0xff == 0 ? .read : traits & 0xff == 1 ? .write : .execute }
        set { traits = traits & ~0xff | UInt64(newValue.rawValue) }
    }
    /// The tables had a present entry for the address. Kernel: PFERR_PRESENT.
    public var entryPresent: Bool {
        get { has(Self.present) }
        set { set(Self.present, newValue) }
    }
    /// Hardware did not accept an entry: a reserved bit, or a misconfiguration. Kernel: PFERR_RSVD.
    public var isReserved: Bool {
        get { has(Self.reserved) }
        set { set(Self.reserved, newValue) }
    }
    /// Whether the access wants private memory. Nil: it does not say, as in a VM without a shared bit in its guest's
    /// addresses. Kernel: PFERR_PRIVATE_ACCESS.
    public var isPrivate: Bool? {
        get { has(Self.saysWhose) ? has(Self.wantsPrivate) : nil }
        set {
            set(Self.saysWhose, newValue != nil)
            set(Self.wantsPrivate, newValue == true)
        }
    }
    /// No guest waits for it: it never changes an entry that is there (Spec: I-26). Kernel: `fault->prefetch`.
    public var isPrefetch: Bool {
        get { has(Self.prefetch) }
        set { set(Self.prefetch, newValue) }
    }
    /// What the processor was after was a table of the guest's own, not what the tables lead to. Kernel: PFERR_GUEST_PAGE.
    public var isOnGuestTables: Bool {
        get { has(Self.onGuestTables) }
        set { set(Self.onGuestTables, newValue) }
    }
    /// Out: the level of the mapping that serves it. Kernel: `fault->goal_level`.
    public var level: PageLevel {
        get { PageLevel(UInt8(truncatingIfNeeded: traits &>> 8)) }
        set { traits = traits & ~0xff00 | UInt64(newValue.rawValue) &<< 8 }
    }
    public init(
        address: GuestAddress, access: AccessKind, entryPresent: Bool, isReserved: Bool = false,
        isPrivate: Bool? = nil, isPrefetch: Bool = false
    ) {
        self.address = address
        traits =
            UInt64(access.rawValue) | 1 << 8 | (entryPresent ? Self.present : 0) | (isReserved ? Self.reserved : 0)
            | (isPrefetch ? Self.prefetch : 0)
        if let isPrivate { traits |= Self.saysWhose | (isPrivate ? Self.wantsPrivate : 0) }
    }
    public var frame: GuestFrame { address.frame }

    private func has(_ bit: UInt64) -> Bool { traits & bit != 0 }
    private mutating func set(_ bit: UInt64, _ on: Bool) { traits = on ? traits | bit : traits & ~bit }
}

/// How a fault ended. Kernel: `RET_PF_*`. Spec: x86 2.2.
public enum FaultOutcome: Sendable, Equatable {
    /// Nothing is wrong, run the guest again.
    case retry
    /// The access is emulated: MMIO, or a write to read-only memory.
    case emulate
    /// The frame is write-tracked.
    case writeProtected
    /// An entry was installed or upgraded.
    case fixed
    /// The entry already allowed it.
    case spurious
    /// KVM_RUN fails with this errno.
    case failed(Errno)
    /// The same, and the exit reason is a memory fault: the vCPU's `memoryFault` says which. Kernel:
    /// `KVM_EXIT_MEMORY_FAULT`.
    case memoryFault(Errno)

    /// For the journal.
    public var code: UInt64 {
        switch self {
        case .retry: 1
        case .emulate: 2
        case .writeProtected: 3
        case .fixed: 5
        case .spurious: 6
        case .failed(let errno): UInt64(100 + errno.rawValue)
        case .memoryFault(let errno): UInt64(1000 + errno.rawValue)
        }
    }
}

/// The stage-2 page tables of one VM, for one architecture. `Paging` derives one for each format.
///
/// Every method says which lock its caller holds; none may sleep where a guard is passed in.
open class SecondaryMMU: @unchecked Sendable {
    // What is not `open` is `final`: of a method that could be overridden and is not, Embedded Swift 6.3 leaves a stub
    // in several modules, and the linker finds them twice.
    // Unchecked: subclasses protect their tables with `vm.mmuLock`.
    public final var vm: VirtualMachine { owner.takeUnretainedValue() }
    // Set once, before anybody reads it.
    @exclusivity(unchecked) private final var owner: Unmanaged<VirtualMachine>!
    /// Pages of the largest slot for whose reverse maps and counts there is memory: beyond, ENOMEM. Set before there is a
    /// slot. Spec: generic 4.4, row 22.
    @exclusivity(unchecked) public final var mostSlotPages = UInt64.max

    public init() {}

    /// Whether a leaf lets the guest write. For checks.
    open func isWritable(_ entry: UInt64) -> Bool { false }
    /// Whether an entry of a table of `level` is a present leaf. For checks.
    open func isLeaf(_ entry: UInt64, _ level: PageLevel) -> Bool { false }
    /// Whether a leaf's rights are set aside to see the next access, for which TLBs are not flushed. For checks. Spec: x86
    /// F6.
    open func awaitsAccess(_ entry: UInt64) -> Bool { false }

    /// Called once, by the VM that the MMU is made for, or by an MMU that this one is a part of.
    public final func attach(_ vm: VirtualMachine) {
        owner = Unmanaged.passUnretained(vm)
        attached()
    }

    /// Called once, when `vm` is set.
    open func attached() {}

    /// What the MMU keeps for a vCPU. Called once for each, by the vCPU's own task or before it runs.
    open func makeExtra(for cpu: VirtualCPU) -> CPUExtra? { nil }

    /// Address spaces of a vCPU: 2 on x86 with system management mode, else 1. Kernel: `KVM_MAX_NR_ADDRESS_SPACES`.
    open var addressSpaceCount: Int { 1 }
    /// Whether a slot may be read-only. Kernel: `CONFIG_HAVE_KVM_READONLY_MEM`.
    open var allowsReadOnlySlots: Bool { true }
    /// Whether a slot that is logged from its beginning, or that moves, is protected like one that logging finds in use.
    /// x86 does not: there is nothing to protect yet. Spec: generic 5.5.
    open var protectsNewSlots: Bool { true }
    /// Bits of a guest physical address.
    open var guestAddressBits: Int { 48 }
    /// Whether faults hold `mmuLock` for reading only (x86 TDP, arm64).
    open var faultsInParallel: Bool { false }
    /// Whether the retry check looks at the range of a running invalidation. Kernel: `mmu_invalidate_retry_gfn`.
    open var retryLooksAtRange: Bool { false }
    /// Whether an entry has a spare bit for `tracked`. Spec: generic 10.2.
    open var hasReferenceBit: Bool { false }
    /// Whether the old policies mark a page when its *entry* goes (x86), not when the fault ends. Spec: x86 3.12.
    open var marksPagesFromEntries: Bool { false }
    /// Whether ageing for `clear_flush_young` leaves the TLBs alone. Kernel: `CONFIG_KVM_ELIDE_TLB_FLUSH_IF_YOUNG`.
    open var elidesFlushIfYoung: Bool { false }

    /// Whether faults know private memory. Kernel: `kvm_arch_has_private_mem`, as far as the MMU is concerned.
    open var hasPrivateFaults: Bool { false }
    /// Makes a page of private memory the guest's before it is first mapped. The page is zeroed and locked.
    /// Kernel: `kvm_arch_gmem_prepare`.
    open func preparePrivatePage(_ page: HostFrame, at frame: GuestFrame) throws(Errno) {}

    // MARK: What the dirty rings ask. Spec: generic 5.6.

    /// Whether vCPUs may have dirty rings. Kernel: `HAVE_KVM_DIRTY_RING_TSO` or `_ACQ_REL`.
    open var supportsDirtyRings: Bool { true }
    /// Whether the processor orders stores, so that userspace need not. Kernel: `HAVE_KVM_DIRTY_RING_TSO` (x86).
    open var isTotalStoreOrder: Bool { false }
    /// Writes that the processor may have logged itself and that come out of it at the next exit: PML's 512, or none.
    open var hardwareLogEntries: UInt32 { 0 }
    /// Whether rings may have a bitmap beside them. Kernel: `NEED_KVM_DIRTY_RING_WITH_BITMAP`, which only arm64 selects,
    /// for interrupt tables that it writes without a vCPU. Set before the VM runs, to have it elsewhere.
    public final var offersBackupBitmap = false

    /// Handles a guest fault. Caller: the vCPU's task, outside guest mode, inside `vm.withSlots`, no lock held.
    open func handleFault(_ cpu: VirtualCPU, _ fault: GuestFault) -> FaultOutcome { .failed(.EIO) }

    /// Maps `address` ahead of the guest's first access; the level of the mapping. Caller as for `handleFault`. Spec:
    /// generic 6.3. EOPNOTSUPP where the vCPU's mode or the architecture has no such faults.
    open func preFault(_ cpu: VirtualCPU, _ address: GuestAddress) throws(Errno) -> PageLevel { throw .EOPNOTSUPP }
    /// The page of a fault that `cpu` did not wait for is there: maps it. Caller as for `handleFault`. Kernel:
    /// `kvm_arch_async_page_ready`.
    open func asyncFaultReady(_ cpu: VirtualCPU, _ fault: GuestFault) {}

    /// Gives the vCPU a root. Caller: the vCPU's task, no lock held.
    open func loadRoot(_ cpu: VirtualCPU) {}
    /// Takes the vCPU's root away if it is obsolete. Caller as for `loadRoot`.
    open func freeObsoleteRoot(_ cpu: VirtualCPU) {}

    /// The page of the VM's APIC may have moved: tells the vCPU's hardware where it is. Caller: the vCPU's task, outside of
    /// guest mode, no lock held. Kernel: `kvm_vcpu_reload_apic_access_page`.
    open func reloadAPICPage(for cpu: VirtualCPU) {}

    /// Removes every leaf of address space `space` that intersects `frames`. Returns whether TLBs must be flushed. Kernel: `kvm_unmap_gfn_range`.
    open func unmap(
        _ frames: Range<GuestFrame>, in space: UInt8, holding guardian: borrowing MMUGuard, mayBlock: Bool
    ) -> Bool {
        false
    }
    /// Clears accessed bits; whether any was set. Kernel: `kvm_age_gfn`.
    open func age(_ frames: Range<GuestFrame>, in space: UInt8, holding guardian: borrowing MMUGuard) -> Bool {
        false
    }
    /// Whether any entry of `frames` was accessed. Kernel: `kvm_test_age_gfn`.
    open func testAge(_ frames: Range<GuestFrame>, in space: UInt8, holding guardian: borrowing MMUGuard) -> Bool {
        false
    }

    /// Protects the pages of one bitmap word for logging: page `first + i` for each bit i of `mask`; only 4 KiB leaves
    /// (larger ones were split or protected before). Kernel: `kvm_arch_mmu_enable_log_dirty_pt_masked`.
    open func protect(
        _ slot: MemorySlot, first: GuestFrame, mask: UInt64, holding guardian: borrowing MMUGuard
    ) {}
    /// Makes the vCPUs leave guest mode, if the processor logs writes itself, so that what it has logged is in the slots'
    /// logs before they are told. Caller holds slotsLock. Kernel: `kvm_arch_sync_dirty_log`.
    open func syncLog() {}
    /// The vCPU has left guest mode. Asked only of an MMU with `hardwareLogEntries`. Caller: the vCPU's task.
    open func guestLeft(_ cpu: VirtualCPU) {}
    /// Logging was turned on for `slot`: write-protects every leaf, splits huge ones. Takes mmuLock itself; flushes.
    open func loggingEnabled(_ slot: MemorySlot) {}
    /// Logging was turned off: huge mappings may come back. Takes mmuLock itself.
    open func loggingDisabled(_ slot: MemorySlot) {}
    /// A slot is about to appear: makes its metadata, or refuses. Caller holds slotsLock and slotsArchLock.
    open func prepare(_ slot: MemorySlot) throws(Errno) {}
    /// An update of slots is over, and `generation` is about to be theirs. Caller holds slotsLock. Kernel:
    /// `kvm_arch_memslots_updated`.
    open func slotsWillChange(to generation: UInt64) {}
    /// Removes everything mapped through `slot`, which is INVALID now. Takes mmuLock itself. Kernel:
    /// `kvm_arch_flush_shadow_memslot`.
    open func flushSlot(_ slot: MemorySlot) {}
    /// The address space died: removes everything. Kernel: `kvm_flush_shadow_all`.
    open func flushAll() {}
    /// The VM ends; no vCPU runs. Frees every table.
    open func destroy() {}

    /// Calls `body` for each present leaf: for checks and reports, with nobody else running.
    open func forEachLeaf(_ body: (StageTwoLeaf) -> Void) {}
}

/// A present leaf, decoded for checks and reports.
public struct StageTwoLeaf: Sendable, Equatable {
    public var guestFrame: GuestFrame
    /// The address space whose tables hold it. Kernel: `as_id`.
    public var space: UInt8
    public var frame: HostFrame
    public var level: PageLevel
    public var writable: Bool
    public var accessed: Bool
    public var dirty: Bool
    /// The raw entry.
    public var entry: UInt64
    public init(
        guestFrame: GuestFrame, space: UInt8 = 0, frame: HostFrame, level: PageLevel, writable: Bool, accessed: Bool,
        dirty: Bool, entry: UInt64
    ) {
        self.space = space
        self.guestFrame = guestFrame
        self.frame = frame
        self.level = level
        self.writable = writable
        self.accessed = accessed
        self.dirty = dirty
        self.entry = entry
    }
}
