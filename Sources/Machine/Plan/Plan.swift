// A plan: a guest-memory situation as plain data. `Scenario` makes one from YAML; on bare metal it is decoded from
// bytes (`PlanCodec`). Nothing here does anything; `World` runs it.

import Frames

/// A situation: host memory, a VM, and what happens, phase by phase.
public struct Plan: Sendable, Equatable {
    public var name: [UInt8] = []
    public var architecture: Architecture = .x86TDP
    /// Frames of RAM and of device memory that the host has.
    public var ramFrames = 4096
    public var deviceFrames = 0
    /// Pages of device memory, and of system memory, that graphics buffers may have together; 0: no limit.
    /// Kernel: the size of VRAM, TTM's `pages_limit`.
    public var videoMemoryPages = 0
    public var graphicsSystemPages = 0
    public var transparentHugePages = false
    /// Pages of the swap device; 0: none.
    public var swapPages = 0
    /// Reading from it must be waited for.
    public var swapIsSlow = false
    /// Whether the host knows its pages' age, without a swap device too.
    public var reclaims = false
    /// Huge pages set aside, of 2 MiB and of 1 GiB. Kernel: `hugepagesz=`, `hugepages=`.
    public var hugePages2M = 0
    public var hugePages1G = 0
    /// Kernel: the module parameter `allow_unsafe_mappings`. Spec: generic 2.13.
    public var allowUnsafeMappings = false
    public var virtualCPUs = 1
    /// Bytes of each vCPU's dirty ring; 0: slots have bitmaps. Kernel: `KVM_CAP_DIRTY_LOG_RING_ACQ_REL`.
    public var dirtyRingBytes: UInt64 = 0
    /// Guest frames can be private: x86 only. Kernel: `KVM_X86_SW_PROTECTED_VM`.
    public var hasPrivateMemory = false
    /// vCPUs leave pages that must be waited for to others. Kernel: asynchronous page faults.
    public var asyncFaults = false
    /// Where shadow paging needs them, the guest's page tables lie at this region's start, in `Plan.regions`, which a slot
    /// shows from there on; nil: in memory and a slot of their own.
    public var pageTables: Int?
    public var regions: [RegionPlan] = []
    /// Slots that exist when the first phase starts.
    public var slots: [SlotPlan] = []
    public var phases: [PhasePlan] = []
    public var expectations: [StatisticExpectation] = []
    public init() {}
}

/// An MMU of the model.
public enum Architecture: UInt8, Sendable, CaseIterable {
    case x86TDP
    case riscvSv39x4
    case riscvSv48x4
    /// The guest has page tables of its own, and KVM shadows them. Spec: x86 section 4.
    case x86Shadow

    /// Those whose guests need no page tables: hardware translates guest physical addresses.
    public static let twoStage: [Architecture] = [.x86TDP, .riscvSv39x4, .riscvSv48x4]
}

/// Which references the model takes. Spec: generic 0.5, section 10.
public enum PolicyName: UInt8, Sendable, CaseIterable {
    case precise, tracked, guess
}

/// A stretch of the VMM's address space.
public struct RegionPlan: Sendable, Equatable {
    public var name: [UInt8] = []
    public var kind: RegionKind = .anonymous
    public var address = UserAddress(0)
    /// Bytes, a multiple of 4096.
    public var size: UInt64 = 0
    public var read = true
    public var write = true
    /// Allocation order of a graphics buffer's blocks.
    public var order = 0
    /// Advice for anonymous memory: madvise(MADV_HUGEPAGE).
    public var hugePages = false
    /// Of a udmabuf: index in `Plan.regions` of the memfd whose pages it has.
    public var source: Int?
    /// Of a memfd or a file: pages that are not in memory must be waited for.
    public var slow = false
    /// Faults that the VMM serves itself: `UserFaults.Modes`.
    public var userFaults: UInt8 = 0
    /// Of hugetlb memory: the size of its pages, 2 MiB or 1 GiB.
    public var pageLevel: PageLevel = .page2M
    public init() {}
}

public enum RegionKind: UInt8, Sendable, CaseIterable {
    case anonymous
    /// A shared memory object. Kernel: memfd, MAP_SHARED.
    case sharedMemory
    /// The same, MAP_PRIVATE.
    case privateObject
    /// A TTM-style buffer: VM_PFNMAP|VM_IO, non-compound blocks of `order`, filled by fault.
    case graphicsBuffer
    /// Device memory without page frames: VM_PFNMAP|VM_IO.
    case deviceBAR
    /// Reserved RAM, PFN-mapped.
    case reservedMemory
    /// Order-0 pages with count 1, PFN-mapped.
    case countedPFNMap
    /// VM_MIXEDMAP with counted pages.
    case mixedMap
    /// PFN-mapped, present read-only until the driver's pfn_mkwrite.
    case writeNotifyPFNMap
    /// A file on persistent memory: counted pages without a page cache, write notification. Kernel: fsdax.
    case daxFile
    /// The pinned pages of a memfd, PFN-mapped. Kernel: udmabuf.
    case udmabuf
    /// The window of a virtual GPU, into which buffers are mapped. Kernel: virtio-gpu's host-visible region, in the VMM.
    case blobWindow
    /// A file with a page cache and a disk, MAP_SHARED.
    case file
    /// The same, MAP_PRIVATE.
    case privateFile
    /// Kernel: `memfd_secret`.
    case secretMemory
    /// Huge pages of a pool, MAP_SHARED. Kernel: `memfd_create(MFD_HUGETLB)`.
    case hugeShared
    /// The same, MAP_PRIVATE.
    case hugePrivate
}

/// A task of the host's own. Kernel: a kernel thread, or work that one does.
public enum BackgroundTask: UInt8, Sendable, CaseIterable {
    case kswapd, kcompactd, khugepaged, ksmd, flusher, oomReaper, memoryFailure
    /// The VMM's own task that serves userfaults.
    case userFaultServer
    /// The VMM's own thread that migrates and takes snapshots.
    case vmm
    /// A device that the VMM emulates or has passed through.
    case device
    /// KVM itself, where it writes guest memory for devices of its own.
    case kvm
    /// Who fetches pages for vCPUs. Kernel: the work queue of `async_pf_execute`.
    case asyncWorker

    /// The name in scenarios and reports.
    public var name: StaticString {
        switch self {
        case .kswapd: "kswapd"
        case .kcompactd: "kcompactd"
        case .khugepaged: "khugepaged"
        case .ksmd: "ksmd"
        case .flusher: "flusher"
        case .oomReaper: "oom_reaper"
        case .memoryFailure: "memory_failure"
        case .userFaultServer: "uffd"
        case .vmm: "vmm"
        case .device: "device"
        case .kvm: "kvm"
        case .asyncWorker: "async_worker"
        }
    }
}

/// madvise's advices but DONTNEED, which has an action of its own.
public enum AdviceName: UInt8, Sendable, CaseIterable {
    case free, cold, pageOut, collapse, mergeable, unmergeable, hugePage, noHugePage, populateRead, populateWrite,
        remove
    case guardInstall, guardRemove
}

/// What a driver's fault handler answers instead of doing its work. Kernel: `vm_fault_t`.
public enum DriverAnswer: UInt8, Sendable, CaseIterable {
    case busError, outOfMemory, poisoned, retry
    /// `VM_FAULT_NOPAGE`, though no entry was made.
    case nothingInserted
}

/// What an entry of the guest's own tables permits.
public enum GuestRights: UInt8, Sendable, CaseIterable {
    case read
    case write
    /// The same, and D is not set yet: KVM lets no write pass unseen.
    case clean
}

/// What happens to the VMM's signals.
public enum SignalName: UInt8, Sendable, CaseIterable {
    case plain, fatal
    /// The plain one was taken: none is pending any more.
    case handled
}

/// A step of a pre-copy migration.
public enum PrecopyStep: UInt8, Sendable, CaseIterable {
    case start, round, stop
}

public enum SnapshotKind: UInt8, Sendable, CaseIterable {
    case full, difference
}

/// A memory slot. Kernel: `kvm_userspace_memory_region`.
public struct SlotPlan: Sendable, Equatable {
    public var id: UInt16 = 0
    public var guestAddress = GuestAddress(0)
    /// Index in `Plan.regions`.
    public var region = 0
    /// Bytes from the region's start.
    public var offset: UInt64 = 0
    public var size: UInt64 = 0
    public var logDirtyPages = false
    public var readOnly = false
    /// The slot has a file of private memory too, of its size. Kernel: `KVM_MEM_GUEST_MEMFD`.
    public var guestMemory = false
    public init() {}
}

/// Tasks that belong together. `run` runs them in the order written; the explorer interleaves them.
public struct PhasePlan: Sendable, Equatable {
    public var name: [UInt8] = []
    public var tasks: [TaskPlan] = []
    public init() {}
}

public struct TaskPlan: Sendable, Equatable {
    public enum Actor: Sendable, Equatable {
        case virtualCPU(Int)
        case host
        case background(BackgroundTask)
    }
    public var actor: Actor = .host
    public var steps: [StepPlan] = []
    public init() {}
}

public struct StepPlan: Sendable, Equatable {
    /// The line in the scenario's file, for messages; 0 if there is none.
    public var line = 0
    public var action: Action
    /// What must come of it, on every architecture that `exceptions` doesn't name.
    public var expectation: StepExpectation = .success
    /// KVM answers some steps differently by architecture. The sets are disjoint.
    public var exceptions: [ArchitectureExpectation] = []
    public init(_ action: Action) { self.action = action }
}

/// What a step must give.
public enum StepExpectation: Sendable, Equatable {
    /// It works; a value read is not looked at.
    case success
    /// The value read (every one of them, if the step repeats).
    case value(UInt64)
    /// The first value read is `from`, each next is one more: what a repeated write stored.
    case counting(from: UInt64)
    /// A guest access leaves for MMIO emulation. Kernel: `KVM_EXIT_MMIO`.
    case mmio
    /// The guest was not entered, its dirty ring is full. Kernel: `KVM_EXIT_DIRTY_RING_FULL`.
    case dirtyRingFull
    /// KVM_RUN fails with EFAULT and says of which page. Kernel: `KVM_EXIT_MEMORY_FAULT`.
    case memoryFault
    /// The guest's own page fault, by its own page tables.
    case pageFault
    /// It fails with this error. Guest accesses: what KVM_RUN returns.
    case error(Errno)
    /// Whatever comes of it is right: for a step that races with another task's; later steps say what must hold.
    case anything
    /// GET_DIRTY_LOG: exactly these pages of the slot, ascending.
    case pages([UInt64])
    /// Any of these, two at least, none of them `oneOf` or `anything`: a step that races with another task's can end in
    /// several ways, and each of them is right. `run` takes the tasks in one order, which must give one of them too.
    case oneOf([StepExpectation])

    /// The ways in which the step may end, one by one.
    public var alternatives: [StepExpectation] {
        if case .oneOf(let list) = self { list } else { [self] }
    }
}

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

/// A counter at the end of the run, by KVM's name.
public struct StatisticExpectation: Sendable, Equatable {
    public var statistic: StatisticName
    public var value: UInt64
    /// Where it holds; elsewhere the counter is not looked at.
    public var architectures: ArchitectureSet = .all
    public init(_ statistic: StatisticName, _ value: UInt64) {
        self.statistic = statistic
        self.value = value
    }
}

/// KVM's statistics that the model keeps. Spec: x86 section 9.
// swift-format-ignore: AlwaysUseLowerCamelCase
public enum StatisticName: UInt8, Sendable, CaseIterable {
    case pf_taken, pf_fixed, pf_fast, pf_emulate, pf_spurious, pf_mmio_spte_created
    case mmio_exits, signal_exits
    case pages_4k, pages_2m, pages_1g
    case remote_tlb_flush, remote_tlb_flush_requests
    case tlb_flush
    case mmu_shadow_zapped, mmu_pte_write, mmu_pde_zapped, mmu_flooded, mmu_recycled, mmu_cache_miss, mmu_unsync
    case nx_lpage_splits, max_mmu_rmap_size, max_mmu_page_hash_collisions
    case pf_guest, invlpg, exits, insn_emulation
}
