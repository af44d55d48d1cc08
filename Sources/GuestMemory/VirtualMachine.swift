// GuestMemory: the half of KVM that is the same on every architecture: slots, translation of guest frames, the
// notifier protocol, the dirty log.
//
// It guarantees: every page reference taken for a guest is released exactly once, and nothing is mapped without the
// retry check. It never derives a page from a stage-2 entry. Read `Translation/FollowFrame.swift` next, then
// `Invalidation/Protocol.swift`.
//
// Of `spec/generic.md` not here yet: guest_memfd (2.15), dirty rings (5.6), asynchronous faults and pre-fault (6). Each has its place beside these folders.

import Audit
import Frames
import HostMemory
import Synchronization
import Synchrony

/// A virtual machine's memory. Kernel: `struct kvm`. Spec: generic 1.5.
///
/// Locks (see `LockRank`): `slotsLock` serialises slot updates and dirty-log calls; `slotReaders` (SRCU) is held by
/// every fault and lookup; `mmuLock` protects the stage-2 tables and the invalidation counters.
public final class VirtualMachine: @unchecked Sendable {
    // Unchecked: each mutable property names its lock.
    public let host: Host
    public let addressSpace: AddressSpace
    public let memory: PhysicalMemory
    public let mmu: SecondaryMMU
    public let policy: Policy
    public let statistics = Statistics()
    /// Kernel: `allow_unsafe_mappings`. Spec: generic 2.13.
    public let allowUnsafeMappings: Bool

    public let slotsLock = SleepingLock(.slots)
    public let slotsArchLock = SleepingLock(.slotsArch)
    /// Kernel: `kvm->srcu`.
    public let slotReaders = ReadSideSections(atomic: false)
    public let mmuLock: ReadWriteLock
    let slots: SlotSets

    // The notifier protocol. Spec: generic 3.2. The counters are written under mmuLock, read by anyone.
    let invalidateIdentity = ObjectIdentity()
    let invalidateSequence = Atomic<UInt64>(0)
    let invalidateInProgress = Atomic<Int>(0)
    let invalidateStart = Atomic<UInt64>(UInt64.max)
    let invalidateEnd = Atomic<UInt64>(UInt64.max)
    let invalidateLock = SpinLock(.mnInvalidate)
    /// Kernel: `mn_active_invalidate_count`; written under `invalidateLock`.
    let activeInvalidations = Atomic<Int>(0)
    /// Where a swap of slot sets waits for running invalidations. Kernel: `mn_memslots_update_rcuwait`.
    let invalidationsEnded = SleepQueue()
    private var notifier: VirtualMachineNotifier?
    /// Kernel: `gpc_list`.
    let frameCaches = FrameCaches()
    /// Whether the kernel can map memory without page frames. Set before anything runs. Kernel: `CONFIG_HAS_IOMEM`.
    public var remapsDeviceMemory = true

    /// vCPUs, in order of their numbers. Written before any of them runs.
    public private(set) var virtualCPUs: [VirtualCPU] = []
    /// Kernel: `manual_dirty_log_protect`; under `slotsLock`.
    public internal(set) var manualProtect = ManualProtect()
    /// Slots with dirty logging. Kernel: `nr_memslots_dirty_logging`.
    let loggingSlots = Atomic<Int>(0)

    /// Makes a VM for the process that owns `addressSpace` and registers its notifier there.
    public init(
        addressSpace: AddressSpace, mmu: SecondaryMMU, policy: PolicyKind = .precise, allowUnsafeMappings: Bool = false
    ) {
        host = addressSpace.host
        self.addressSpace = addressSpace
        memory = addressSpace.host.memory
        self.mmu = mmu
        self.policy = Policy(policy, memory: addressSpace.host.memory, entryHasSoftwareBit: mmu.hasReferenceBit)
        self.allowUnsafeMappings = allowUnsafeMappings
        mmuLock = ReadWriteLock(.mmu, spinning: true)
        slots = SlotSets()
        mmu.attach(self)
        let notifier = VirtualMachineNotifier(self)
        self.notifier = notifier
        addressSpace.register(notifier)
    }

    /// Adds a vCPU. Before any vCPU runs.
    public func add(_ cpu: VirtualCPU) { virtualCPUs.append(cpu) }

    /// Ends the VM: no callback begins afterwards, every entry and table goes, the slots go, and the vCPUs belong to it no
    /// more; none may run. Spec: generic 4.7, I-28.
    public func destroy() {
        guard let notifier else { return }
        frameCaches.removeAll(memory.journal)
        addressSpace.unregister(notifier)
        self.notifier = nil
        mmu.destroy()
        slots.removeAll()
        // Each vCPU holds the VM.
        virtualCPUs = []
    }

    /// Runs `body` inside a read-side section of the slots. Kernel: `srcu_read_lock(&kvm->srcu)`.
    public func withSlots<R>(_ body: () -> R) -> R {
        let side = slotReaders.enter()
        defer { slotReaders.exit(side) }
        return body()
    }

    /// The slot that contains `frame`, valid or being deleted. Caller: inside `withSlots`, or holds `slotsLock`.
    /// Kernel: `gfn_to_memslot`.
    public func slot(containing frame: GuestFrame) -> MemorySlot? { slots.active.slot(containing: frame) }

    /// Every slot of the active set, by guest frame. Caller as for `slot(containing:)`.
    public var activeSlots: [MemorySlot] { slots.active.byFrame }

    /// Kernel: `kvm_memslots.generation`. Spec: generic 4.2.
    public var slotsGeneration: UInt64 { slots.active.generation.load(ordering: .acquiring) }

    @inlinable func record(_ event: @autoclosure () -> Event) {
        if let journal = memory.journal { journal.record(event()) }
    }
}

/// Kernel: `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`. Spec: generic 5.2.
public struct ManualProtect: Sendable, Equatable {
    public var enabled = false
    /// A new bitmap starts all ones and nothing is protected until CLEAR. Only with `enabled`.
    public var initiallySet = false
    public init() {}
}
