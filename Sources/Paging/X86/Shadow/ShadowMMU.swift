// X86/Shadow: KVM's shadow MMU. The guest keeps page tables of its own; KVM keeps tables that do at once what the guest's
// and the host's do one after the other, and notices when the guest changes its own. Kernel: `mmu.c`, `paging_tmpl.h`.
//
// It guarantees: an entry says what the guest's entries said when it was made, and those can't change unnoticed: a guest
// table is write-protected, or known to be out of sync until the guest flushes. Every leaf is in the reverse map of its
// frame, so that a notifier finds it. It never looks at a page frame.
//
// Read `ShadowPage.swift` next, then `ShadowFault.swift`, `NestedTables.swift`, `DirectTables.swift`.

import Audit
import Frames
import GuestMemory
import HostMemory
import Synchronization
import Synchrony

/// The tables of a VM whose guests' own page tables are shadowed. Spec: x86 section 4.
///
/// Locks: everything changes under mmu_lock held for writing. `unsyncPages` besides where a fault that holds it for
/// reading could mark a page unsync. Spec: x86 section 7.
public final class ShadowMMU: SecondaryMMU, @unchecked Sendable {
    // Unchecked: restates the base class's; each mutable property names its lock.

    let bits: EntryBits
    private let spaces: Int
    /// The tables of all else that the VM does, if these are for nested guests alone. It owns this one.
    unowned(unsafe) let base: TDPMMU?
    /// The second-stage tables of a host without the TDP MMU, if these are such: all pages are direct, from the root down.
    let direct: TDPConfiguration?
    /// Whether every slot has its reverse map. Without `base` they are made with the slot. Kernel:
    /// `shadow_root_allocated`.
    private let hasReverseMaps = Atomic<Bool>(false)
    /// Under mmu_lock.
    let index = PageIndex()
    /// Pages in use, and roots that are zapped but still some vCPU's. Kernel: `n_used_mmu_pages`. Under mmu_lock.
    var usedPages = 0
    /// Pages ever made. Under mmu_lock.
    var pagesMade: UInt64 = 0
    /// Kernel: `n_max_mmu_pages`; 0: a fiftieth of the guest's pages, at least 64. Under mmu_lock.
    public var pageLimit = 0
    /// Kernel: `mmu_valid_gen`, one bit. Under mmu_lock and slots_lock. Spec: X62.
    var generation: UInt8 = 0
    /// Pages that shadow entries of the guest's. Kernel: `indirect_shadow_pages`. Under mmu_lock. Spec: X55.
    var indirectPages = 0
    /// Kernel: `mmu_unsync_pages_lock`.
    let unsyncPages = SpinLock(.tdpPages)
    /// Of direct tables: whether huge leaves are never executable. Under mmu_lock.
    var executesNoHugePage = false
    /// Direct pages that only a fetch keeps from being a huge leaf; those of nested guests are on the TDP MMU's list.
    let possibleHugePages: PossibleHugePages

    /// Entries that may map one guest frame. Kernel: `RMAP_RECYCLE_THRESHOLD`.
    let longestChain: Int

    /// - Parameters:
    ///   - addressSpaces: 2 with system management mode.
    ///   - longestChain: less than KVM's for tests.
    public init(addressSpaces: Int = 1, longestChain: Int = 1000) {
        precondition(addressSpaces == 1 || addressSpaces == 2, "a vCPU is in system management mode or not")
        spaces = addressSpaces
        self.longestChain = longestChain
        bits = .legacy
        base = nil
        direct = nil
        possibleHugePages = PossibleHugePages()
        super.init()
    }

    /// The second-stage tables of a VM on a host whose TDP MMU is switched off. Kernel: the module parameter `tdp_mmu=N`.
    /// Spec: x86 2.5.
    ///
    /// `eagerSplit` is not asked: it needs the TDP MMU (Spec: x86 3.6). Left out, and refused: the page-modification log,
    /// frames that others track, guest hypervisors.
    public init(direct configuration: TDPConfiguration, longestChain: Int = 1000) {
        configuration.check()
        precondition(configuration.modificationLogEntries == 0, "no page-modification log without the TDP MMU")
        precondition(!configuration.nested, "no nested guests without the TDP MMU")
        precondition(!configuration.tracksWrites, "frames are tracked for their tables alone without the TDP MMU")
        spaces = configuration.addressSpaces
        self.longestChain = longestChain
        bits = configuration.entryBits
        bits.checkLayout()
        base = nil
        direct = configuration
        executesNoHugePage = configuration.nxHugePages
        possibleHugePages = PossibleHugePages()
        super.init()
    }

    /// The tables of nested guests, in a VM whose other tables are `tdp`'s, which forwards to this what it is asked.
    init(nestedIn tdp: TDPMMU) {
        spaces = tdp.configuration.addressSpaces
        longestChain = 1000
        bits = tdp.bits
        base = tdp
        direct = nil
        possibleHugePages = tdp.possibleHugePages
        super.init()
    }

    // MARK: What generic code asks

    override public func isWritable(_ entry: UInt64) -> Bool { entry & EntryBits.write != 0 }
    override public func isLeaf(_ entry: UInt64, _ level: PageLevel) -> Bool { EntryBits.isLeaf(entry, level.rawValue) }
    override public func awaitsAccess(_ entry: UInt64) -> Bool { bits.isAccessTracked(entry) }
    override public var addressSpaceCount: Int { spaces }
    override public var protectsNewSlots: Bool { false }
    override public var guestAddressBits: Int { direct.map { $0.levels == 5 ? 57 : 48 } ?? 52 }
    override public var retryLooksAtRange: Bool { true }
    override public var hasReferenceBit: Bool { true }
    override public var marksPagesFromEntries: Bool { true }
    override public var elidesFlushIfYoung: Bool { true }
    override public var isTotalStoreOrder: Bool { true }

    override public func makeExtra(for cpu: VirtualCPU) -> CPUExtra? { ShadowCPU() }

    /// What the MMU keeps for `cpu`: the guest's registers, and what its last access came to. The vCPU's own task's.
    public func state(of cpu: VirtualCPU) -> ShadowCPU {
        if let base { return base.shadowState(of: cpu) }
        guard let extra = cpu.extra else { preconditionFailure("a vCPU of another MMU") }
        return unsafeDowncast(extra, to: ShadowCPU.self)
    }

    override public func handleFault(_ cpu: VirtualCPU, _ fault: GuestFault) -> FaultOutcome {
        if let direct { return handleDirect(cpu, fault, direct) }
        note(
            Event(
                .fault, guest: fault.frame.number,
                level: (fault.entryPresent ? 1 : 0) | (state(of: cpu).isUser ? 4 : 0),
                value: UInt64(fault.access.rawValue), extra: UInt64(cpu.number),
                task: task(cpu)))
        CPUStatistics.bump(cpu.statistics.pf_taken)
        let outcome = serve(cpu, fault)
        cpu.statistics.count(outcome)
        note(
            Event(
                .faultResolved, guest: fault.frame.number, value: outcome.code, extra: UInt64(cpu.number),
                task: task(cpu)))
        return outcome
    }

    override public func loadRoot(_ cpu: VirtualCPU) { takeRoot(cpu) }
    override public func freeObsoleteRoot(_ cpu: VirtualCPU) {
        dropObsoleteRoots(cpu)
        if let direct { changeSpace(cpu, direct) }
    }

    override public func preFault(_ cpu: VirtualCPU, _ address: GuestAddress) throws(Errno) -> PageLevel {
        guard let direct else { throw .EOPNOTSUPP }
        return try mapAhead(cpu, address, direct)
    }
    override public func asyncFaultReady(_ cpu: VirtualCPU, _ fault: GuestFault) {
        if let direct { mapFetched(cpu, fault, direct) }
    }

    // MARK: The notifier. mmu_lock is held for writing.

    override public func unmap(
        _ frames: Range<GuestFrame>, in space: UInt8, holding guardian: borrowing MMUGuard, mayBlock: Bool
    ) -> Bool { zapLeaves(of: frames, in: space) }

    override public func age(
        _ frames: Range<GuestFrame>, in space: UInt8, holding guardian: borrowing MMUGuard
    ) -> Bool { anyAccessed(frames, in: space, clearing: true) }
    override public func testAge(
        _ frames: Range<GuestFrame>, in space: UInt8, holding guardian: borrowing MMUGuard
    ) -> Bool { anyAccessed(frames, in: space, clearing: false) }

    // MARK: Dirty logging

    override public func protect(
        _ slot: MemorySlot, first: GuestFrame, mask: UInt64, holding guardian: borrowing MMUGuard
    ) { protectPages(slot, first, mask) }
    override public func loggingEnabled(_ slot: MemorySlot) { startLogging(slot) }
    override public func loggingDisabled(_ slot: MemorySlot) { dropSmallLeaves(slot) }

    // MARK: Slots and the end

    override public func prepare(_ slot: MemorySlot) throws(Errno) {
        let bits = direct?.slotAddressBits ?? UInt64(guestAddressBits)
        guard slot.frames.upperBound.number <= 1 << (bits - 12) else { throw .EINVAL }
        // A change of flags hands both on.
        if slot.largePages == nil {
            guard vm.memory.allowsObject() else { throw .ENOMEM }
            slot.largePages = LargePageCounts(slot)
        }
        try makeReverseMap(of: slot)
    }

    private func makeReverseMap(of slot: MemorySlot) throws(Errno) {
        guard slot.extra == nil else { return }
        guard vm.memory.allowsObject() else { throw .ENOMEM }
        slot.extra = ReverseMap(slot)
    }

    /// Whether the slots have reverse maps: before the first nested guest none needs any. Any lock may be held.
    var knowsSlots: Bool { base == nil || hasReverseMaps.load(ordering: .acquiring) }

    /// Gives every slot its reverse map, when the first root is made; from then on slots get theirs with their making.
    /// False: there is no memory. Caller: no lock held; inside `withSlots` or not. Kernel: `mmu_first_shadow_root_alloc`.
    func prepareSlots() -> Bool {
        guard !knowsSlots else { return true }
        vm.slotsArchLock.lock()
        defer { vm.slotsArchLock.unlock() }
        do throws(Errno) {
            for slot in vm.activeSlots { try makeReverseMap(of: slot) }
        } catch { return false }
        // Who sees this sees the maps.
        hasReverseMaps.store(true, ordering: .releasing)
        return true
    }

    override public func slotsWillChange(to generation: UInt64) {
        if let direct, direct.cachesMMIO, wrapsMMIO(generation) { zapAllFast() }
    }

    override public func flushSlot(_ slot: MemorySlot) {
        guard let direct, direct.zapsOnlySlot else { return zapAllFast() }
        let guardian = vm.lockMMU()
        if zapSlot(slot) { vm.flushRemoteTLBs() }
        guardian.unlock()
    }
    override public func flushAll() { zapAll() }

    override public func destroy() {
        zapAll()
        for cpu in vm.virtualCPUs {
            dropRoots(cpu)
            emptyStock(cpu)
        }
    }

    override public func forEachLeaf(_ body: (StageTwoLeaf) -> Void) {
        index.forEachPage { page in
            let level = page.role.level
            for i in 0..<512 {
                let value = entry(page, i).peek()
                guard EntryBits.isLeaf(value, level) else { continue }
                body(
                    StageTwoLeaf(
                        guestFrame: page.guestFrame(of: i), space: page.role.space,
                        frame: EntryBits.field.frame(in: value), level: page.level, writable: isWritable(value),
                        accessed: value & bits.accessed != 0, dirty: value & bits.dirty != 0, entry: value))
            }
        }
    }

    /// The largest leaf where no tables of the guest's count. Spec: x86 2.5.
    var largestDirectLevel: UInt8 { direct?.largestPage.rawValue ?? 2 }

    /// Kernel: `nx_huge_pages`. Under mmu_lock.
    var nxHugePages: Bool { base?.nxHugePages ?? executesNoHugePage }
    /// Of second-stage tables, this VM's or its nested guests'.
    var configuration: TDPConfiguration? { base?.configuration ?? direct }

    // MARK: Small change

    func entry(_ page: ShadowPage, _ index: Int) -> StageTwoEntry {
        StageTwoEntry(vm.memory.entry(index, of: page.table), EntryBits.field)
    }

    /// The entry at a physical address.
    func entry(at place: UInt64) -> StageTwoEntry {
        let place = EntryPlace(place)
        return StageTwoEntry(vm.memory.entry(place.index, of: place.table), EntryBits.field)
    }

    /// The page that has the entry at a physical address, and which of its entries that is. Kernel: `sptep_to_sp`,
    /// `spte_index`.
    func holder(of place: UInt64) -> (page: ShadowPage, index: Int) {
        let place = EntryPlace(place)
        return (page(of: place.table), place.index)
    }

    /// The page of a table. Kernel: `spte_to_child_sp`.
    func page(of table: HostFrame) -> ShadowPage {
        let word = vm.host.tableWords(table).0
        guard let pointer = UnsafeRawPointer(bitPattern: UInt(word)) else {
            preconditionFailure("a table without its page")
        }
        return Unmanaged<ShadowPage>.fromOpaque(pointer).takeUnretainedValue()
    }

    func child(_ entry: UInt64) -> ShadowPage { page(of: EntryBits.field.frame(in: entry)) }

    func reverseMap(_ slot: MemorySlot) -> ReverseMap {
        guard knowsSlots, let extra = slot.extra else { preconditionFailure("a slot without a reverse map") }
        return unsafeDowncast(extra, to: ReverseMap.self)
    }

    /// The slot of a frame that some entry maps or some page shadows: it is there as long as they are.
    func slot(_ frame: GuestFrame, _ role: PageRole) -> MemorySlot? { vm.slot(containing: frame, in: role.space) }

    @inline(__always)
    func note(_ event: @autoclosure () -> Event) {
        if let journal = vm.memory.journal { journal.record(event()) }
    }

    func task(_ cpu: VirtualCPU) -> UInt8 { UInt8(truncatingIfNeeded: cpu.number) }

    /// An event of a page's life. `extra`: roots, then bit 32 unsync, bit 33 made just now, 34 on the generation.
    func note(_ kind: Event.Kind, _ page: ShadowPage, isNew: Bool = false) {
        note(
            Event(
                kind, frame: page.table, guest: page.frame.number, level: page.role.level,
                value: UInt64(page.role.rawValue),
                extra: UInt64(page.rootCount) | (page.isUnsync ? 1 << 32 : 0) | (isNew ? 1 << 33 : 0)
                    | UInt64(page.generation) << 34))
    }
}
