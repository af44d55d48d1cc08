// X86/TDP: KVM's two-dimensional paging MMU, for EPT and NPT, 4 and 5 levels. Kernel: `tdp_mmu.c`.
//
// It guarantees: a fault changes an entry only by compare-exchange, with the bookkeeping after it succeeded; a table is
// freed only when it is unlinked, every entry is frozen, the TLBs were flushed (or its root is invalid and no vCPU is on
// it) and a grace period has passed. It never looks at a page frame, and never writes over a frozen entry.
//
// Read `Configuration.swift` and `../Entry/EntryBits.swift` next, then `Fault.swift`.

import Audit
import Frames
import GuestMemory
import HostMemory
import Synchronization
import Synchrony

/// The stage-2 tables of one VM, as x86 KVM keeps them with EPT or NPT.
///
/// Locks: faults, root changes and the recovery of huge pages hold `mmu_lock` for reading, everything else for writing.
/// Whoever reads tables without the lock, or with it held for reading, is inside a read-side section (`withTables`).
/// `pages` protects the list of roots and of removed tables. Spec: x86 section 7.
public final class TDPMMU: SecondaryMMU, @unchecked Sendable {
    // Unchecked: restates the base class's; each mutable property names its lock.

    public let configuration: TDPConfiguration
    /// The bits of an entry, as the processor and KVM have them.
    let bits: EntryBits

    public var accessDirty: Bool { configuration.accessDirty }
    public var largestPage: PageLevel { configuration.largestPage }
    public var zapsOnlySlot: Bool { configuration.zapsOnlySlot }

    /// Whether pages may be mapped ahead of use. Kernel: `pre_fault_allowed`: not before an SNP guest's launch is
    /// finished. Set before the VM runs.
    public var allowsPreFault = true

    /// Kernel: RCU, as far as tables are concerned.
    let tables = ReadSideSections(atomic: true, spread: true)
    /// Kernel: `tdp_mmu_pages_lock`.
    let pages = SpinLock(.tdpPages)
    /// Root tables, in order of their making. Written under `pages` and mmu_lock; read under either.
    var roots: [HostFrame] = []
    /// Whether huge leaves are never executable. Written under mmu_lock for writing, read under mmu_lock.
    @exclusivity(unchecked) var nxHugePages: Bool
    /// Tables that only a fetch keeps from being a huge leaf, those of nested guests among them.
    let possibleHugePages = PossibleHugePages()
    /// Tables that nothing reachable points to. Under `pages`.
    var removed: [HostFrame] = [] {
        didSet { hasRemoved.store(!removed.isEmpty, ordering: .relaxed) }
    }
    /// Whether there are any: for whoever looks without the lock. Who removes a table frees it, so no other need be sure.
    let hasRemoved = Atomic<Bool>(false)
    /// The page of the VM's APIC.
    let apic = APICAccessPage()
    /// The tables of nested guests whose guest hypervisors have such of their own. Nil: there can't be any. Set when this is
    /// made. Kernel: what `guest_mmu` builds.
    public private(set) var nested: ShadowMMU?

    public init(_ configuration: TDPConfiguration) {
        configuration.check()
        self.configuration = configuration
        bits = configuration.entryBits
        bits.checkLayout()
        nxHugePages = configuration.nxHugePages
        super.init()
        if configuration.nested { nested = ShadowMMU(nestedIn: self) }
    }

    override public func attached() { nested?.attach(vm) }

    /// EPT with four levels, and no caching of MMIO.
    /// - Parameters:
    ///   - accessDirty: whether the processor has A and D in EPT entries.
    ///   - largestPage: up to 1 GiB.
    ///   - zapsOnlySlot: see `TDPConfiguration`.
    ///   - addressSpaces: 2 with system management mode.
    public convenience init(
        accessDirty: Bool = true, largestPage: PageLevel = .page2M, zapsOnlySlot: Bool = false, addressSpaces: Int = 1
    ) {
        var configuration = TDPConfiguration()
        configuration.accessDirty = accessDirty
        configuration.largestPage = largestPage
        configuration.zapsOnlySlot = zapsOnlySlot
        configuration.addressSpaces = addressSpaces
        configuration.cachesMMIO = false
        self.init(configuration)
    }

    // MARK: What generic code asks

    override public func isWritable(_ entry: UInt64) -> Bool { entry & EntryBits.write != 0 }
    override public func isLeaf(_ entry: UInt64, _ level: PageLevel) -> Bool {
        EntryBits.isLeaf(entry, level.rawValue)
    }
    override public func awaitsAccess(_ entry: UInt64) -> Bool { bits.isAccessTracked(entry) }
    override public var addressSpaceCount: Int { configuration.addressSpaces }
    override public var protectsNewSlots: Bool { false }
    override public var guestAddressBits: Int { configuration.levels == 5 ? 57 : 48 }
    override public var faultsInParallel: Bool { true }
    override public var retryLooksAtRange: Bool { true }
    override public var hasReferenceBit: Bool { true }
    override public var marksPagesFromEntries: Bool { true }
    override public var elidesFlushIfYoung: Bool { true }
    override public var hasPrivateFaults: Bool { true }
    override public var isTotalStoreOrder: Bool { true }
    override public var hardwareLogEntries: UInt32 { configuration.modificationLogEntries }
    override public func guestLeft(_ cpu: VirtualCPU) { drainLog(of: cpu) }

    /// What points a vCPU's hardware to the tables: the EPTP or, of NPT, nCR3, a bare address. Without a root it names the
    /// host's page of zeros, where every access misses. Kernel: `construct_eptp`, the dummy root.
    public func rootPointer(for cpu: VirtualCPU) -> UInt64 {
        let root = cpu.root ?? vm.host.zeroPage
        guard bits.isEPT else { return root.physicalAddress }
        if let role = nestedRole(of: cpu) {
            return EPT.pointer(root: root, levels: role.level, accessDirty: !role.accessDirtyDisabled)
        }
        return EPT.pointer(root: root, levels: configuration.levels, accessDirty: accessDirty)
    }

    /// The same, of EPT.
    public func eptPointer(for cpu: VirtualCPU) -> UInt64 {
        precondition(bits.isEPT, "nested paging has no EPT pointer")
        return rootPointer(for: cpu)
    }

    override public func makeExtra(for cpu: VirtualCPU) -> CPUExtra? {
        TDPCPUState(vm.host, logs: configuration.modificationLogEntries != 0, nested: configuration.nested)
    }

    /// Runs `body` in a read-side section: no table that it reaches is freed before it ends. It may not sleep.
    /// Kernel: `rcu_read_lock`.
    public func withTables<R>(_ body: () -> R) -> R {
        let section = tables.enter()
        defer { tables.exit(section) }
        return body()
    }

    // MARK: Faults and roots

    override public func handleFault(_ cpu: VirtualCPU, _ fault: GuestFault) -> FaultOutcome {
        if configuration.nested, let outcome = handleNestedFault(cpu, fault) { return outcome }
        return lending(cpu.vm) { handleFault(cpu, fault, $0) }
    }

    @inline(never)
    private func handleNestedFault(_ cpu: VirtualCPU, _ fault: GuestFault) -> FaultOutcome? {
        guard let nested, nested.isInUse(by: cpu) else { return nil }
        return nested.handleFault(cpu, fault)
    }

    private func handleFault(_ cpu: VirtualCPU, _ fault: GuestFault, _ vm: VirtualMachine) -> FaultOutcome {
        if fault.isReserved, cpu.root != nil, let outcome = handleMMIO(cpu, fault) { return outcome }
        // Of a misconfiguration KVM tells nothing.
        let isTold = !fault.isReserved || !bits.isEPT
        if isTold {
            vm.record(
                Event(
                    .fault, guest: fault.frame.number,
                    level: (fault.entryPresent ? 1 : 0) | (fault.isReserved ? 8 : 0),
                    value: UInt64(fault.access.rawValue), extra: UInt64(cpu.number),
                    task: UInt8(truncatingIfNeeded: cpu.number)))
        }
        var served = fault
        lending(cpu.statistics) { CPUStatistics.bump($0.pf_taken) }
        var outcome = serve(cpu, &served, vm)
        if case .writeProtected = outcome { outcome = unprotecting(outcome, fault) }
        lending(cpu.statistics) { $0.count(outcome) }
        if isTold {
            vm.record(
                Event(
                    .faultResolved, guest: fault.frame.number, value: outcome.code, extra: UInt64(cpu.number),
                    task: UInt8(truncatingIfNeeded: cpu.number)))
        }
        if hasRemoved.load(ordering: .relaxed) { freeRemovedTables() }
        return outcome
    }

    override public func preFault(_ cpu: VirtualCPU, _ address: GuestAddress) throws(Errno) -> PageLevel {
        try mapAhead(cpu, address)
    }
    override public func asyncFaultReady(_ cpu: VirtualCPU, _ fault: GuestFault) { mapFetched(cpu, fault) }

    override public func loadRoot(_ cpu: VirtualCPU) {
        if let nested, nested.isInUse(by: cpu) { nested.takeRoot(cpu) } else { takeRoot(cpu) }
    }
    override public func freeObsoleteRoot(_ cpu: VirtualCPU) {
        nested?.dropObsoleteRoots(cpu)
        if nested?.isInUse(by: cpu) != true { dropObsoleteRoot(cpu) }
    }

    // MARK: The notifier. mmu_lock is held for writing.

    override public func unmap(
        _ frames: Range<GuestFrame>, in space: UInt8, holding guardian: borrowing MMUGuard, mayBlock: Bool
    ) -> Bool {
        if frames.lowerBound == APICAccessPage.frame { apicPageIsUnmapped(in: space) }
        let isNestedZapped = nested?.zapLeaves(of: frames, in: space) ?? false
        return zapLeaves(of: frames, in: space) || isNestedZapped
    }

    override public func age(
        _ frames: Range<GuestFrame>, in space: UInt8, holding guardian: borrowing MMUGuard
    ) -> Bool {
        let isNestedYoung = nested?.anyAccessed(frames, in: space, clearing: true) ?? false
        return ageLeaves(of: frames, in: space) || isNestedYoung
    }
    override public func testAge(
        _ frames: Range<GuestFrame>, in space: UInt8, holding guardian: borrowing MMUGuard
    ) -> Bool {
        anyAccessed(of: frames, in: space) || nested?.anyAccessed(frames, in: space, clearing: false) ?? false
    }

    override public func reloadAPICPage(for cpu: VirtualCPU) { loadAPICPage(for: cpu) }

    // MARK: Dirty logging

    override public func protect(
        _ slot: MemorySlot, first: GuestFrame, mask: UInt64, holding guardian: borrowing MMUGuard
    ) {
        nested?.protectPages(slot, first, mask)
        protectPages(slot, first, mask, holding: guardian)
    }

    override public func syncLog() {
        if hardwareLogEntries != 0 { vm.kickAllCPUs() }
    }

    override public func loggingEnabled(_ slot: MemorySlot) {
        nested?.startLogging(slot)
        startLogging(slot)
    }
    override public func loggingDisabled(_ slot: MemorySlot) {
        nested?.dropSmallLeaves(slot)
        recoverHugePages(slot)
    }

    // MARK: Slots and the end

    override public func prepare(_ slot: MemorySlot) throws(Errno) {
        let bits = configuration.slotAddressBits ?? UInt64(guestAddressBits)
        guard slot.frames.upperBound.number <= 1 << (bits - 12) else { throw .EINVAL }
        // A change of flags hands both on.
        let isNew = slot.largePages == nil
        guard !isNew || vm.memory.allowsObject() else { throw .ENOMEM }
        if slot.extra == nil, let extra = try makeExtra(of: slot) { slot.extra = extra }
        guard isNew else { return }
        slot.largePages = LargePageCounts(slot)
        vm.initializeMixed(slot)
    }

    /// Nested guests' tables need reverse maps, once there are any; their counts of tracked frames serve all.
    private func makeExtra(of slot: MemorySlot) throws(Errno) -> SlotExtra? {
        let isForNested = nested.map { configuration.tracksWrites || $0.knowsSlots } ?? false
        guard isForNested || configuration.tracksWrites else { return nil }
        guard vm.memory.allowsObject() else { throw .ENOMEM }
        return isForNested ? ReverseMap(slot) : TrackedFrames(slot)
    }

    override public func slotsWillChange(to generation: UInt64) { slotsChange(to: generation) }

    override public func flushSlot(_ slot: MemorySlot) { removeSlot(slot) }

    override public func flushAll() {
        nested?.zapAll()
        zapAllRoots()
        freeRemovedTables()
    }

    override public func destroy() {
        nested?.destroy()
        zapAllRoots()
        freeAllRoots()
        freeRemovedTables()
        unmapAPICPage()
    }

    override public func forEachLeaf(_ body: (StageTwoLeaf) -> Void) {
        for root in allRoots { visitLeaves(of: root, body) }
        nested?.forEachLeaf(body)
    }

    // MARK: Small change

    /// The tables under one root.
    @inline(__always)
    func view(_ root: HostFrame) -> RadixTables<TDPFormat> { view(root, vm) }

    /// The same for who has the VM at hand: a fault, which counts no reference to it.
    @inline(__always)
    func view(_ root: HostFrame, _ vm: VirtualMachine) -> RadixTables<TDPFormat> {
        RadixTables(memory: vm.memory.tables, format: TDPFormat(levels: configuration.levels), root: root)
    }

    @inline(__always)
    func record(_ event: @autoclosure () -> Event) { vm.record(event()) }
}
