import Frames

/// What a step does.
public enum Action: Sendable, Equatable {
    // The guest, on a vCPU.
    /// `count` accesses of 8 bytes, `stride` bytes apart. `value` for writes: the first; each next is one more.
    case guest(AccessKind, at: GuestAddress, count: Int, stride: UInt64, value: UInt64)

    // The guest's own page tables, on a vCPU; `at` is a linear address. Shadow paging only. ENOENT: no such table.
    /// The guest stores an entry. `level`: 1, or 2 for a page of 2 MiB.
    case mapPage(at: GuestAddress, to: GuestAddress, level: UInt8, GuestRights)
    case unmapPage(at: GuestAddress, level: UInt8)
    /// The guest loads an entry and stores it with other rights.
    case protectPage(at: GuestAddress, level: UInt8, GuestRights)
    /// The guest stores the entry that was there at the start.
    case restorePage(at: GuestAddress, level: UInt8)
    /// INVLPG.
    case flushPage(at: GuestAddress)
    /// A move to CR3 that keeps its value.
    case loadCR3

    // The VMM's own accesses and calls; `region` is an index in `Plan.regions`, offsets and lengths in bytes.
    case load(region: Int, offset: UInt64)
    case store(region: Int, offset: UInt64, value: UInt64)
    case munmap(region: Int, offset: UInt64, length: UInt64)
    case mprotect(region: Int, offset: UInt64, length: UInt64, read: Bool, write: Bool)
    case madviseDontNeed(region: Int, offset: UInt64, length: UInt64)
    case advise(region: Int, offset: UInt64, length: UInt64, AdviceName)
    /// mremap to a place in region `target`'s part of the address space, what is there goes. Kernel: `MREMAP_FIXED`.
    case moveMapping(region: Int, offset: UInt64, length: UInt64, target: Int, targetOffset: UInt64)
    /// The VMM pins a page for DMA, for long, until `unpin`. Kernel: `FOLL_PIN|FOLL_LONGTERM`.
    case pin(region: Int, offset: UInt64, write: Bool)
    case unpin(region: Int, offset: UInt64)
    /// fork(); later `child…` steps act in the youngest child.
    case fork
    case childStore(region: Int, offset: UInt64, value: UInt64)
    case childLoad(region: Int, offset: UInt64)
    case childExit

    // The host on its own.
    case reclaim(pages: Int)
    case migrate(region: Int, offset: UInt64, length: UInt64)
    /// Kernel: `compact_zone` for a block of 2^order pages. ENOMEM: none could be made.
    case compact(order: Int)
    case mergePages
    case collapsePages
    /// The VMM is killed for its memory, which goes at once. EAGAIN: somebody changes its address space.
    case reap
    case hintNUMA(region: Int, offset: UInt64, length: UInt64)
    /// The frame behind the page breaks. Kernel: `memory_failure`. EFAULT: there is none.
    case breakMemory(region: Int, offset: UInt64)
    /// The `count`-th allocation from now on fails.
    case failAllocation(count: Int)
    /// The next transfer of the swap device, or of the region's disk, fails.
    case failTransfer(region: Int?, write: Bool)
    /// A signal reaches the VMM, or is handled by it.
    case signal(SignalName)
    /// How many huge pages of this size nobody uses; `reserved`: are promised. ENOENT: there is no such pool.
    case countHugePages(PageLevel, reserved: Bool)

    // Whoever serves userfaults.
    /// Sleeps until there is a fault to serve.
    case userFaultWait
    /// A page that begins with `value`, zeros behind it.
    case userFaultCopy(region: Int, offset: UInt64, value: UInt64)
    case userFaultZero(region: Int, offset: UInt64)
    case userFaultContinue(region: Int, offset: UInt64)
    case userFaultProtect(region: Int, offset: UInt64, length: UInt64, on: Bool)

    // Drivers.
    case moveBuffer(region: Int, toDeviceMemory: Bool)
    case evictBuffer(region: Int)
    /// The owner unmaps its buffer everywhere and gives the pages back.
    case freeBuffer(region: Int)
    case driverStore(region: Int, offset: UInt64, value: UInt64)
    case driverLoad(region: Int, offset: UInt64)
    case disableDevice(region: Int)
    /// The driver's fault handler gives `answer` to the next `count` faults; 0: it works again.
    case failFault(region: Int, answer: DriverAnswer, count: Int)
    /// Every mapping of the BAR goes; faults bring them back. Kernel: `VFIO_DEVICE_RESET`.
    case resetDevice(region: Int)
    /// The VMM maps what is behind region `resource` into a blob window. Kernel: virtio-gpu's RESOURCE_MAP_BLOB.
    case mapBlob(window: Int, offset: UInt64, resource: Int)
    case unmapBlob(window: Int, offset: UInt64)
    /// Kernel: `ftruncate` of what is behind the region, to `size` bytes.
    case truncate(region: Int, size: UInt64)
    /// Kernel: `fallocate(FALLOC_FL_PUNCH_HOLE)`.
    case punchHole(region: Int, offset: UInt64, length: UInt64)
    /// Kernel: `fsync`.
    case writeBack(region: Int)

    // KVM's ioctls.
    case setMemoryRegion(SlotPlan)
    case deleteMemoryRegion(id: UInt16)
    case getDirtyLog(id: UInt16)
    /// Pages of the slot, both multiples of 64.
    case clearDirtyLog(id: UInt16, firstPage: UInt64, pages: UInt64)
    case enableManualProtect(initiallySet: Bool)
    /// KVM maps a guest page for itself and unmaps it again. Kernel: `kvm_vcpu_map`.
    case mapGuestPage(at: GuestAddress, write: Bool)
    /// Kernel: `__gfn_to_page`, then a release.
    case getGuestPage(at: GuestAddress, write: Bool)
    /// Ages the region's entries through the notifier. Kernel: `clear_flush_young`.
    case age(region: Int, offset: UInt64, length: UInt64)

    // Dirty rings, by one task of the VMM.
    /// Reads what vCPU `cpu` has written and marks the entries to be reset; the guest frames, ascending. EINVAL: no ring.
    case collectRing(cpu: Int)
    /// Kernel: `KVM_RESET_DIRTY_RINGS`; how many entries.
    case resetRings

    // Private memory, sizes in bytes.
    /// Kernel: `KVM_SET_MEMORY_ATTRIBUTES`.
    case setAttributes(at: GuestAddress, size: UInt64, isPrivate: Bool)
    /// A hole in the file of the slot that shows the address. ENOENT: no such slot.
    case punchPrivate(at: GuestAddress, size: UInt64)

    // KVM's own use of guest memory, by a frame cache for each page, from its first use to the end.
    case cacheStore(at: GuestAddress, value: UInt64)
    case cacheLoad(at: GuestAddress)

    /// Kernel: `KVM_PRE_FAULT_MEMORY`, on a vCPU; how many bytes are left.
    case preFault(at: GuestAddress, size: UInt64)
    /// Fetches one page that a vCPU waits for. EAGAIN: none does.
    case fetchPage

    // Users of the dirty log, on the VMM's thread. EBUSY, EINVAL: out of order.
    case precopy(PrecopyStep)
    case snapshot(SnapshotKind)
    /// The guest's memory becomes what it was at the last snapshot.
    case restore
    // Writers that KVM's log does not see, and that mark the VMM's own.
    case ownStore(region: Int, offset: UInt64, value: UInt64)
    /// EFAULT: the page is not pinned.
    case deviceStore(region: Int, offset: UInt64, value: UInt64)
}
