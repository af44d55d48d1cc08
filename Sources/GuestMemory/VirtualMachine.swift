// GuestMemory: the half of KVM that is the same on every architecture: slots, translation of guest frames, the
// notifier protocol, the dirty log.
//
// It guarantees: every page reference taken for a guest is released exactly once, and nothing is mapped without the
// retry check. It never derives a page from a stage-2 entry. Read `Translation/FollowFrame.swift` next, then
// `Invalidation/Protocol.swift`.

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
    /// The policy is `precise`.
    let isPrecise: Bool
    // What the MMU has said when the VM was made.
    let faultsInParallel: Bool
    let retryLooksAtRange: Bool
    public let statistics = Statistics()
    /// Kernel: `allow_unsafe_mappings`. Spec: generic 2.13.
    public let allowUnsafeMappings: Bool

    public let slotsLock = SleepingLock(.slots)
    public let slotsArchLock = SleepingLock(.slotsArch)
    /// Kernel: `kvm->srcu`.
    public let slotReaders = ReadSideSections(atomic: false, spread: true)
    public let mmuLock: ReadWriteLock
    public let type: VirtualMachineType
    /// Whether slots can have a file of private memory. Kernel: `CONFIG_KVM_GUEST_MEMFD`, of every VM since 6.18; before,
    /// of those with private memory.
    public let hasGuestMemory: Bool
    let privateMemory = PrivateMemory()
    /// The VM's own descriptor, and its files of private memory. Kernel: `users_count`.
    private let references = Atomic<Int>(1)
    private var isClosed = false
    /// By address space. Kernel: `__memslots`. Spec: generic 1.5.
    let slotSets: [SlotSets]
    /// Pages of all slots. Kernel: `nr_memslot_pages`; under `slotsLock`.
    var slotPages: UInt64 = 0 {
        didSet { publishedPages.store(slotPages, ordering: .relaxed) }
    }
    private let publishedPages = Atomic<UInt64>(0)
    /// Pages of all slots. Any task.
    public var pagesOfSlots: UInt64 { publishedPages.load(ordering: .relaxed) }
    /// Something impossible happened, or the process said so: every call fails from now on. Kernel: `vm_dead`.
    private let dead = Atomic<Bool>(false)

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
    /// Writes may be in no log from now on, as Linux has it too: see `noteLogHole`. For checks.
    public var logHasHoles: Bool { logHole.load(ordering: .relaxed) }
    private let logHole = Atomic<Bool>(false)

    /// The user has done one of two things after which Linux loses writes, and so does this: marked ring entries of a slot
    /// that has shrunk since (a reset then leaves out the whole batch), or asked for logs that begin all ones in a VM
    /// that has rings alone (nothing is protected, and there is no bitmap that could be all ones). Spec: generic 5.2, 5.6.
    func noteLogHole() { logHole.store(true, ordering: .relaxed) }

    /// Slots with dirty logging. Kernel: `nr_memslots_dirty_logging`.
    let loggingSlots = Atomic<Int>(0)
    /// Whether any slot is logged.
    public var isLogging: Bool { loggingSlots.load(ordering: .relaxed) != 0 }
    /// Under `slotsLock`, and before any vCPU exists: whoever runs one may read it.
    public internal(set) var dirtyRings = DirtyRings()
    /// What fetches pages for vCPUs that go on meanwhile.
    public let asyncFaults = AsyncFaultWork()

    /// Makes a VM for the process that owns `addressSpace` and registers its notifier there.
    public init(
        addressSpace: AddressSpace, mmu: SecondaryMMU, policy: PolicyKind = .precise, allowUnsafeMappings: Bool = false,
        type: VirtualMachineType = .standard, bindsGuestMemory: Bool = false
    ) {
        precondition(!type.hasPrivateMemory || mmu.hasPrivateFaults, "the MMU knows no private memory")
        self.type = type
        hasGuestMemory = type.hasPrivateMemory || bindsGuestMemory
        host = addressSpace.host
        self.addressSpace = addressSpace
        memory = addressSpace.host.memory
        self.mmu = mmu
        self.policy = Policy(policy, memory: addressSpace.host.memory, entryHasSoftwareBit: mmu.hasReferenceBit)
        self.allowUnsafeMappings = allowUnsafeMappings
        isPrecise = policy == .precise
        faultsInParallel = mmu.faultsInParallel
        retryLooksAtRange = mmu.retryLooksAtRange
        mmuLock = ReadWriteLock(.mmu, spinning: true, spread: mmu.faultsInParallel)
        // Generations never repeat among the address spaces: each begins with its number and goes on by their count.
        // With private memory there is one. Spec: generic 1.1.
        slotSets = (0..<(type.hasPrivateMemory ? 1 : mmu.addressSpaceCount)).map { SlotSets(generation: UInt64($0)) }
        mmu.attach(self)
        let notifier = VirtualMachineNotifier(self)
        self.notifier = notifier
        addressSpace.register(notifier)
    }

    /// Adds a vCPU. Before any vCPU runs. A VM with dirty rings has `create(_:)` instead, which can fail.
    public func add(_ cpu: VirtualCPU) {
        precondition(!usesDirtyRings, "a vCPU with a ring is made by create(_:)")
        append(cpu)
    }
    func append(_ cpu: VirtualCPU) { virtualCPUs.append(cpu) }

    /// Closes the VM, whose vCPUs run no more. It ends with its last file of private memory (Spec: generic 2.15); without
    /// any, now. No lock held. Kernel: the release of the VM's descriptor.
    public func destroy() {
        guard !isClosed else { return }
        isClosed = true
        runPostponedWork()
        dropReference()
    }

    /// Kernel: `kvm_get_kvm`.
    func takeReference() { references.add(1, ordering: .relaxed) }

    /// Kernel: `kvm_put_kvm`.
    func dropReference() {
        if references.subtract(1, ordering: .acquiringAndReleasing).newValue == 0 { tearDown() }
    }

    /// Ends the VM: no callback begins afterwards, every entry and table goes, the slots go, and the vCPUs belong to it no
    /// more; none may run. Kernel: `kvm_destroy_vm`. Spec: generic 4.7, I-28.
    private func tearDown() {
        guard let notifier else { return }
        frameCaches.removeAll(memory.journal)
        addressSpace.unregister(notifier)
        self.notifier = nil
        for cpu in virtualCPUs { cpu.end() }
        mmu.destroy()
        for sets in slotSets { sets.removeAll() }
        slotPages = 0
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
    /// Kernel: `gfn_to_memslot`; of the first address space if none is said.
    @inline(__always)
    public func slot(containing frame: GuestFrame, in space: UInt8 = 0) -> MemorySlot? {
        activeSet(of: space)._withUnsafeGuaranteedRef { $0.slot(containing: frame) }
    }

    /// The slot with the user's number, address space and identity: (space << 16 | id). Caller as above.
    public func slot(numbered number: UInt32) -> MemorySlot? {
        guard number >> 16 < slotSets.count else { return nil }
        return slotSets[Int(number >> 16)].active.slot(id: UInt16(truncatingIfNeeded: number))
    }

    /// Whether the guest has memory there that its user gave it. Caller as above. Kernel: `kvm_is_visible_gfn`.
    public func isVisible(_ frame: GuestFrame, in space: UInt8 = 0) -> Bool {
        guard let slot = slot(containing: frame, in: space) else { return false }
        return slot.id < Self.userSlots && !slot.isInvalid
    }

    /// Every slot of the active sets, by address space and guest frame. Caller as for `slot(containing:)`.
    public var activeSlots: [MemorySlot] {
        var all: [MemorySlot] = []
        for sets in slotSets { all += sets.active.byFrame.all }
        return all
    }

    /// Address spaces that slots can be in. Kernel: `kvm_arch_nr_memslot_as_ids`.
    public var addressSpaceCount: Int { slotSets.count }

    /// Kernel: `kvm_memslots.generation`. Spec: generic 4.2.
    public var slotsGeneration: UInt64 { slotsGeneration(of: 0) }
    @inline(__always)
    public func slotsGeneration(of space: UInt8) -> UInt64 {
        activeSet(of: space)._withUnsafeGuaranteedRef { $0.generation.load(ordering: .acquiring) }
    }

    @inline(__always)
    func activeSet(of space: UInt8) -> Unmanaged<SlotSet> {
        Unmanaged.passUnretained(slotSets[Int(space)])._withUnsafeGuaranteedRef { $0.unretainedActive }
    }

    // MARK: Who may call. Spec: generic 0.3, 4.4 row 0.

    /// Every call fails from now on. Kernel: `kvm_vm_dead`, `KVM_BUG_ON`.
    public func die() { dead.store(true, ordering: .releasing) }
    public var isDead: Bool { dead.load(ordering: .acquiring) }

    /// EIO: the process is not the one that made the VM, or the VM is dead. Kernel: the first check of each VM, vCPU and
    /// device ioctl.
    public func checkCaller(_ process: AddressSpace) throws(Errno) {
        if process !== addressSpace || isDead { throw .EIO }
    }

    /// Records an event where a journal listens.
    @inline(__always)
    public func record(_ event: @autoclosure () -> Event) {
        if memory.isObserved { tell(event()) }
    }

    /// Apart, so that nothing of it burdens who is not listened to.
    @inline(never)
    public func tell(_ event: Event) { memory.tell(event) }
}

/// Kernel: `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`. Spec: generic 5.2.
public struct ManualProtect: Sendable, Equatable {
    public var enabled = false
    /// A new bitmap starts all ones and nothing is protected until CLEAR. Only with `enabled`.
    public var initiallySet = false
    public init() {}
}
