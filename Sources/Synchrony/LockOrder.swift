import CSchedule

/// The lock order: a task may take a lock only if every lock it holds has a *smaller* number here.
/// Spec: generic 3.7, x86 section 7. Ranks marked *sleeping* may not be taken while a spinning lock is held.
public enum LockRank: UInt8, Sendable, CaseIterable {
    /// The VMM's, sleeping: held shared by whoever writes guest memory, and for itself by whoever makes all of them stand
    /// still. Outermost: QEMU's `accel_ioctl_inhibit_begin` is such a lock around KVM_RUN.
    case writers = 0
    /// `kvm->slots_lock`, sleeping: memslot updates and the dirty-log ioctls.
    case slots = 1
    /// `kvm->slots_arch_lock`, sleeping: slot metadata; never held over an SRCU grace period.
    case slotsArch = 2
    /// A guest_memfd's `invalidate_lock`, sleeping, read-write: its bindings, and punching holes against everything else.
    case fileInvalidate = 3
    /// `gpc->refresh_lock`, sleeping: one refresh of a frame cache at a time. Never taken by a notifier.
    case frameCacheRefresh = 4
    /// `mm->mmap_lock`, sleeping: the VMAs of one address space.
    case mmap = 5
    /// A second address space's `mmap_lock` (the child's, in fork).
    case mmapNested = 6
    /// A graphics buffer's reservation, sleeping: where the buffer is.
    case buffer = 7
    /// `i_mmap_rwsem`, sleeping: the VMAs that map one object.
    case mapping = 8
    /// The pages of one memory object, sleeping.
    case objectPages = 9
    /// The list of an address space's notifiers, spinning.
    case notifierList = 10
    /// `kvm->mn_invalidate_lock`, spinning: the count of running invalidations against the swap of slot sets.
    case mnInvalidate = 11
    /// `kvm->gpc_lock`, spinning: the list of a VM's active frame caches.
    case frameCacheList = 12
    /// `gpc->lock`, spinning, read-write: what a frame cache maps; held for reading while its bytes are used.
    case frameCache = 13
    /// `kvm->mmu_lock`, spinning, read-write on x86 and arm64: the stage-2 tables.
    case mmu = 14
    /// `tdp_mmu_pages_lock`, spinning: the list of roots and of freed tables.
    case tdpPages = 15
    /// The page-table lock of one address space, spinning: host entries.
    case pageTable = 16
    /// A memory object's page array while a host entry is made, spinning.
    case objectIndex = 17
    /// The swap device's slots and its cache, spinning.
    case swap = 18
    /// The lists of reclaim, spinning. Kernel: `lruvec.lru_lock`.
    case pageLists = 19
    /// The buddy allocator's zone lock, spinning. Innermost.
    case zone = 20
    /// The journal, spinning; taken anywhere and takes nothing.
    case journal = 21
    /// `vcpu->async_pf.lock` and the queue of its work, spinning; taken with nothing held, and takes nothing.
    case asyncFault = 22
    /// The VMM's own dirty log, spinning; takes nothing.
    case writerLog = 40

    /// Kernel name, for messages.
    public var kernelName: StaticString {
        switch self {
        case .writers: "the VMM's writers"
        case .writerLog: "the VMM's dirty log"
        case .slots: "slots_lock"
        case .slotsArch: "slots_arch_lock"
        case .fileInvalidate: "invalidate_lock"
        case .frameCacheRefresh: "gpc->refresh_lock"
        case .mmap: "mmap_lock"
        case .mmapNested: "mmap_lock (nested)"
        case .buffer: "dma_resv"
        case .mapping: "i_mmap_rwsem"
        case .objectPages: "object pages"
        case .notifierList: "notifier list"
        case .mnInvalidate: "mn_invalidate_lock"
        case .frameCacheList: "gpc_lock"
        case .frameCache: "gpc->lock"
        case .mmu: "mmu_lock"
        case .tdpPages: "tdp_mmu_pages_lock"
        case .pageTable: "page_table_lock"
        case .objectIndex: "object index"
        case .swap: "swap"
        case .pageLists: "lru_lock"
        case .zone: "zone lock"
        case .journal: "journal"
        case .asyncFault: "async_pf.lock"
        }
    }
}

/// What the running task did against the lock order. Violations are counted, never hidden: a run reports them as
/// findings (Spec: X63).
public struct LockViolations: Sendable, Equatable {
    public var order: UInt32
    public var sleeping: UInt32
    public var firstHeld: LockRank?
    public var firstWanted: LockRank?

    /// The violations of the running task since `clear()`.
    public static func ofCurrentTask() -> LockViolations {
        let held = fl_held_current().pointee
        return LockViolations(
            order: held.order_violations, sleeping: held.sleep_violations,
            firstHeld: LockRank(rawValue: UInt8(truncatingIfNeeded: held.first_held)),
            firstWanted: LockRank(rawValue: UInt8(truncatingIfNeeded: held.first_wanted)))
    }

    public static func clear() {
        let held = fl_held_current()!
        held.pointee.order_violations = 0
        held.pointee.sleep_violations = 0
        held.pointee.first_held = 0
        held.pointee.first_wanted = 0
    }
}

/// Whether the running task holds a lock of `rank`. For assertions.
@inlinable @inline(__always)
public func isHeld(_ rank: LockRank) -> Bool {
    fl_held_current().pointee.ranks & (1 << UInt64(rank.rawValue)) != 0
}

/// Asserts that the running task may sleep; a violation is counted. Kernel: `might_sleep`. Spec: generic 2.3, row 13.
@inlinable @inline(__always)
public func mightSleep() {
    let held = fl_held_current()!
    if held.pointee.atomic_depth > 0 { held.pointee.sleep_violations &+= 1 }
}

/// Runs `body`, in which sleeping is a violation. Kernel: `non_block_start`, `non_block_end`.
public func withoutSleeping(_ body: () -> Void) {
    noteAtomicSection(entering: true)
    body()
    noteAtomicSection(entering: false)
}

@inlinable @inline(__always)
func noteAcquire(_ rank: LockRank, spinning: Bool) {
    let held = fl_held_current()!
    let bit: UInt64 = 1 << UInt64(rank.rawValue)
    if held.pointee.ranks & ~(bit &- 1) != 0 { noteViolation(rank) }
    if spinning {
        held.pointee.atomic_depth &+= 1
    } else if held.pointee.atomic_depth > 0 {
        held.pointee.sleep_violations &+= 1
    }
    held.pointee.ranks |= bit
}

@usableFromInline @inline(never)
func noteViolation(_ rank: LockRank) {
    let held = fl_held_current()!
    if held.pointee.order_violations == 0 {
        held.pointee.first_held = UInt32(63 - held.pointee.ranks.leadingZeroBitCount)
        held.pointee.first_wanted = UInt32(rank.rawValue)
    }
    held.pointee.order_violations &+= 1
}

@inlinable @inline(__always)
func noteRelease(_ rank: LockRank, spinning: Bool) {
    let held = fl_held_current()!
    held.pointee.ranks &= ~(1 << UInt64(rank.rawValue))
    if spinning { held.pointee.atomic_depth &-= 1 }
}

/// A section in which sleeping is forbidden though no lock is held (RCU). Kernel: `rcu_read_lock`.
@inlinable @inline(__always)
func noteAtomicSection(entering: Bool) {
    let held = fl_held_current()!
    if entering { held.pointee.atomic_depth &+= 1 } else { held.pointee.atomic_depth &-= 1 }
}
