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
    /// EPT whose tables the shadow MMU keeps. Kernel: `tdp_mmu=N`. Spec: x86 2.5.
    case x86TDPLegacy

    /// Those whose guests need no page tables: hardware translates guest physical addresses.
    public static let twoStage: [Architecture] = [.x86TDP, .riscvSv39x4, .riscvSv48x4, .x86TDPLegacy]
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
