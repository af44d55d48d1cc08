import Audit
import Frames
import Synchronization
import Synchrony

/// What an MMU keeps for a vCPU.
open class CPUExtra: @unchecked Sendable {
    // Unchecked: the vCPU's own task's, but for what subclasses say.
    public init() {}
}

/// A vCPU, as far as memory is concerned. Kernel: `struct kvm_vcpu`. `Machine` derives the one that runs programs.
///
/// Modes: `outside` → `inGuest` → `outside`, and likewise `readingTables`. Whoever needs the guest out of the way posts a
/// request and, if the mode is not `outside`, waits. The vCPU sets `inGuest` *before* its last look at the requests (Spec:
/// X64).
open class VirtualCPU: @unchecked Sendable {
    // What is not `open` is `final`, as in `SecondaryMMU`.
    // Unchecked: the state shared with other tasks is atomic; the rest belongs to the vCPU's own task.
    public enum Mode: UInt8, Sendable { case outside, inGuest, readingTables }
    public struct Request {
        public static let flushTLB: UInt32 = 1
        /// The root is obsolete; load a new one (which flushes). Kernel: `KVM_REQ_MMU_FREE_OBSOLETE_ROOTS`.
        public static let reloadRoot: UInt32 = 2
        /// The dirty ring has filled up to its soft limit. Kernel: `KVM_REQ_DIRTY_RING_SOFT_FULL`.
        public static let dirtyRingSoftFull: UInt32 = 4
        /// A page that was waited for is there. Kernel: `KVM_REQ_APF_READY`.
        public static let asyncFaultReady: UInt32 = 8
        /// Halt until a page is there. Kernel: `KVM_REQ_APF_HALT`.
        public static let asyncFaultHalt: UInt32 = 16
        /// Nothing but to leave guest mode. Kernel: `kvm_vcpu_kick`.
        public static let leave: UInt32 = 32
        /// The page of the VM's APIC may have moved. Kernel: `KVM_REQ_APIC_PAGE_RELOAD`.
        public static let reloadAPICPage: UInt32 = 64
    }

    /// Why guest mode was not entered.
    public enum EntryRefusal: Sendable, Equatable {
        /// Userspace must empty the dirty ring. Kernel: `KVM_EXIT_DIRTY_RING_FULL`; KVM_RUN returns 0.
        case dirtyRingFull
        /// The vCPU waits for a page: `sleepUntilReady`.
        case halted
    }

    public final let number: Int
    public final let vm: VirtualMachine
    public final let statistics = CPUStatistics()
    /// The processor may have logged writes that the MMU takes at each exit.
    private final let logsInHardware: Bool
    final let mode = Atomic<UInt8>(Mode.outside.rawValue)
    final let requests = Atomic<UInt32>(0)
    /// The root of the stage-2 tables in use, 0 for none; the MMU's own. Written by the vCPU's task.
    public final var root: HostFrame? {
        get { currentRoot }
        set { currentRoot = newValue }
    }
    // Unchecked, here and below: one word, or read by the vCPU's own task alone; the check costs more than the access.
    @exclusivity(unchecked) private final var currentRoot: HostFrame?
    /// Times that guest mode was entered. Written by the vCPU's task.
    public final var entries: UInt64 = 0
    public final let identity = ObjectIdentity()
    /// What the MMU keeps for the vCPU; the vCPU's own task's. Kernel: `vcpu->arch.mmu`.
    public private(set) final lazy var extra: CPUExtra? = vm.mmu.makeExtra(for: self)
    /// What the last fault said to userspace, if it ended in a memory fault; whoever begins a run clears it. Written by
    /// the vCPU's task. Kernel: `run->memory_fault`.
    public final var memoryFault: MemoryFaultExit?
    /// What the vCPU wrote, in a VM with dirty rings.
    public internal(set) final var ring: DirtyRing?
    /// Whether a fault on a page that must be read may be left to others. Kernel: `kvm_can_do_async_pf`: the guest knows
    /// the paravirtual interface, or halting serves as well. The vCPU's own task's, or set before it runs.
    public final var allowsAsyncFaults = false
    public private(set) final lazy var asyncFaults = AsyncFaultQueue(self)
    /// The vCPU waits for a page. Kernel: `apf.halted`. The vCPU's own task's.
    public internal(set) final var isHalted = false

    /// The address space that the vCPU is in: 1 in system management mode. Kernel: `kvm_arch_vcpu_memslots_id`.
    public final var addressSpaceNumber: UInt8 { currentSpace.load(ordering: .relaxed) }
    private final let currentSpace = Atomic<UInt8>(0)
    /// The slot that the last lookup found, and the generation in which it did. Kernel: `last_used_slot`,
    /// `last_used_slot_gen`. Generations differ between address spaces, so a change of those invalidates it too.
    @exclusivity(unchecked) private final var hintedSlot: Unmanaged<MemorySlot>?
    @exclusivity(unchecked) private final var hintGeneration = UInt64.max

    public init(number: Int, vm: VirtualMachine) {
        self.number = number
        self.vm = vm
        vm.statistics.count(statistics)
        logsInHardware = vm.mmu.hardwareLogEntries != 0
    }

    /// The slot that contains `frame` in the vCPU's address space. Caller: the vCPU's task, inside `withSlots`.
    /// Kernel: `kvm_vcpu_gfn_to_memslot`. Spec: generic 2.1.
    public final func slot(containing frame: GuestFrame) -> MemorySlot? {
        unretainedSlot(containing: frame)?.takeUnretainedValue()
    }

    /// The same, for the short of time: good as long as the section.
    public final func unretainedSlot(containing frame: GuestFrame) -> Unmanaged<MemorySlot>? {
        let generation = vm.slotsGeneration(of: addressSpaceNumber)
        return hint(for: frame, generation) ?? findSlot(containing: frame, generation)
    }

    @inline(never)
    private final func findSlot(containing frame: GuestFrame, _ generation: UInt64) -> Unmanaged<MemorySlot>? {
        guard let slot = vm.slot(containing: frame, in: addressSpaceNumber) else { return nil }
        hintedSlot = Unmanaged.passUnretained(slot)
        hintGeneration = generation
        return hintedSlot
    }

    /// The hinted slot, if it still is one and contains `frame`. While the generation is the same nobody frees it.
    @inline(__always)
    private final func hint(for frame: GuestFrame, _ generation: UInt64) -> Unmanaged<MemorySlot>? {
        guard generation == hintGeneration, let hinted = hintedSlot else { return nil }
        let isHit = hinted._withUnsafeGuaranteedRef { frame.number &- $0.baseFrame.number < $0.pageCount }
        return isHit ? hinted : nil
    }

    /// The user's address of `frame` if the hint knows it.
    @inline(__always)
    final func hintedAddress(of frame: GuestFrame, write: Bool) -> UserAddress? {
        hint(for: frame, vm.slotsGeneration(of: addressSpaceNumber))?._withUnsafeGuaranteedRef {
            $0.checkedAddress(of: frame, write: write)
        }
    }

    /// Enters or leaves system management mode: another address space, other tables. Caller: the vCPU's task, outside of
    /// guest mode; the VM has that many address spaces. Kernel: `kvm_smm_changed`.
    public final func switchAddressSpace(to space: UInt8) {
        precondition(Int(space) < vm.slotSets.count, "the VM has no such address space")
        guard space != addressSpaceNumber else { return }
        currentSpace.store(space, ordering: .relaxed)
        vm.mmu.freeObsoleteRoot(self)
    }

    /// Drops every cached translation. Called by the vCPU's own task, outside of guest mode.
    open func dropTranslations() {}

    /// The entry that the processor's page-modification log takes next, of 512, from the last one down; out of that range,
    /// it is full. Of a processor without one: empty. The vCPU's own task's, or nobody runs. Kernel: `GUEST_PML_INDEX`.
    open var modificationLogIndex: UInt16 { 511 }
    /// The log has been read. Kernel: the same field, written.
    open func resetModificationLog() {}

    /// A page is being fetched: whether the guest was told, and can do something else. If not, the vCPU halts. Called by
    /// the vCPU's own task. Kernel: `kvm_arch_async_page_not_present`.
    open func pageNotPresent(_ frame: GuestFrame) -> Bool { false }

    /// Serves requests and enters guest mode; nil if it did. Kernel: the entry half of `vcpu_enter_guest`.
    @discardableResult
    public final func enterGuest() -> EntryRefusal? {
        while true {
            vm.runPostponedWork()
            if let refusal = serveRequests() { return refusal }
            if root == nil { vm.mmu.loadRoot(self) }
            schedulingPoint(.guestEnter, identity.value)
            entries &+= 1
            mode.store(Mode.inGuest.rawValue, ordering: .sequentiallyConsistent)
            schedulingPoint(.atomicLoad, identity.value)
            if requests.load(ordering: .sequentiallyConsistent) == 0 {
                isExecuting = true
                return nil
            }
            exitGuest()
        }
    }

    /// A root to start from that is not obsolete. Caller: the vCPU's task, outside of guest mode, no lock held. Kernel:
    /// `kvm_mmu_reload`.
    public final func reloadRoot() {
        if take(Request.reloadRoot) {
            vm.mmu.freeObsoleteRoot(self)
            dropTranslations()
        }
        if root == nil { vm.mmu.loadRoot(self) }
    }

    public final func exitGuest() {
        // Like the release of a lock: it only lets others go on.
        schedulingNote(.guestExit, identity.value)
        if isExecuting { CPUStatistics.bump(statistics.exits) }
        isExecuting = false
        mode.store(Mode.outside.rawValue, ordering: .sequentiallyConsistent)
        if logsInHardware { vm.mmu.guestLeft(self) }
    }

    /// Begins to read tables without mmu_lock: what is reached from the vCPU's root is not freed before the end, for whoever
    /// frees a table has unlinked it, and then waits in a flush. Until then no lock is taken that is held over a flush.
    /// Caller: the vCPU's task, outside of guest mode. Kernel: `walk_shadow_page_lockless_begin`,
    /// `READING_SHADOW_PAGE_TABLES`. Spec: x86 2.6, X56.
    public final func beginReadingTables() {
        schedulingPoint(.guestEnter, identity.value)
        mode.store(Mode.readingTables.rawValue, ordering: .sequentiallyConsistent)
        // The mode is seen before anything is read.
        atomicMemoryFence(ordering: .sequentiallyConsistent)
    }

    /// Kernel: `walk_shadow_page_lockless_end`.
    public final func endReadingTables() {
        schedulingNote(.guestExit, identity.value)
        mode.store(Mode.outside.rawValue, ordering: .sequentiallyConsistent)
    }

    /// Spec: x86 section 6, the order of requests. What ends the entry leaves all others for the next.
    private final func serveRequests() -> EntryRefusal? {
        schedulingPoint(.atomicUpdate, identity.value)
        if let ring, take(Request.dirtyRingSoftFull), ring.isSoftFull {
            post(Request.dirtyRingSoftFull)
            vm.record(Event(.ringExit, task: UInt8(truncatingIfNeeded: number)))
            return .dirtyRingFull
        }
        // In this order: any page that is there ends the halt, and the guest looks whether it was the one.
        if take(Request.asyncFaultHalt) { isHalted = true }
        // A vCPU that halts looks for itself: what is done is on the list before the request is posted, and whoever is to
        // post it may be off the processor.
        if take(Request.asyncFaultReady) || isHalted { completeAsyncFaults() }
        if isHalted { return .halted }
        let pending = requests.exchange(0, ordering: .sequentiallyConsistent)
        if pending & Request.reloadRoot != 0 { vm.mmu.freeObsoleteRoot(self) }
        if pending & (Request.flushTLB | Request.reloadRoot) != 0 {
            CPUStatistics.bump(statistics.tlb_flush)
            isFlushing = true
            dropTranslations()
            isFlushing = false
        }
        if pending & Request.reloadAPICPage != 0 { vm.mmu.reloadAPICPage(for: self) }
        return nil
    }

    /// Whether the request was posted; it is taken off.
    final func take(_ request: UInt32) -> Bool {
        guard requests.load(ordering: .sequentiallyConsistent) & request != 0 else { return false }
        return requests.bitwiseAnd(~request, ordering: .sequentiallyConsistent).oldValue & request != 0
    }

    /// Posts a request; waits for nobody. Kernel: `kvm_make_request`.
    public final func post(_ request: UInt32) {
        schedulingPoint(.requestPost, identity.value)
        requests.bitwiseOr(request, ordering: .sequentiallyConsistent)
    }

    /// Guest code runs: the last look at the requests has found none. For checks and for the processor's own walks; the
    /// vCPU's own task's.
    public final private(set) var isExecuting = false
    /// A request to flush has been taken and is being served. For checks; the vCPU's own task's.
    public final private(set) var isFlushing = false
    /// Whether a request waits. The run loop leaves guest mode when it sees one (the interrupt of a real kick).
    public final var isInGuest: Bool { mode.load(ordering: .sequentiallyConsistent) == Mode.inGuest.rawValue }

    public final var hasRequest: Bool { requests.load(ordering: .sequentiallyConsistent) != 0 }
    /// Whether one of `requests` waits. For checks.
    public final func hasRequest(_ requests: UInt32) -> Bool {
        self.requests.load(ordering: .sequentiallyConsistent) & requests != 0
    }

    /// Posts a request and waits until the vCPU is outside of guest mode, and of tables. Returns whether it had to wait.
    final func kick(_ request: UInt32) -> Bool {
        schedulingPoint(.requestPost, identity.value)
        requests.bitwiseOr(request, ordering: .sequentiallyConsistent)
        schedulingPoint(.conditionRead, identity.value)
        guard mode.load(ordering: .sequentiallyConsistent) != Mode.outside.rawValue else { return false }
        spinUntil(identity.value) { mode.load(ordering: .sequentiallyConsistent) == Mode.outside.rawValue }
        return true
    }
}

extension VirtualMachine {
    /// Makes every vCPU drop its translations before it runs guest code again; returns when none uses an old one.
    /// Kernel: `kvm_flush_remote_tlbs`. Any lock may be held. Spec: x86 section 5, I-13.
    public func flushRemoteTLBs() { makeAllCPUsRequest(VirtualCPU.Request.flushTLB) }

    /// Makes every vCPU leave guest mode once. Kernel: `kvm_vcpu_kick` of each.
    public func kickAllCPUs() {
        for cpu in virtualCPUs { _ = cpu.kick(VirtualCPU.Request.leave) }
    }

    /// Posts a request that is no flush to all vCPUs and waits until each has left guest mode. Any lock may be held.
    /// Kernel: `kvm_make_all_cpus_request`.
    public func postToAllCPUs(_ request: UInt32) {
        for cpu in virtualCPUs { _ = cpu.kick(request) }
    }

    /// Posts `request` to all vCPUs and waits until each has left guest mode. Kernel: `kvm_make_all_cpus_request`.
    public func makeAllCPUsRequest(_ request: UInt32) {
        Statistics.bump(statistics.remote_tlb_flush_requests)
        record(.init(.flush, value: UInt64(request)))
        var waited = false
        for cpu in virtualCPUs where cpu.kick(request) { waited = true }
        if waited { Statistics.bump(statistics.remote_tlb_flush) }
    }
}
