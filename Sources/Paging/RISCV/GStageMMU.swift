import Audit
import Frames
import GuestMemory
import HostMemory

/// The G-stage tables of one RISC-V VM. Kernel: `arch/riscv/kvm/mmu.c`. Spec: arches section 2.
///
/// One root for the VM's life, 16 KiB, shared by all vCPUs. Everything that reads or changes the tables holds mmu_lock
/// for writing: on RISC-V it is a plain spinlock, so faults do not run side by side. The only others who write are the
/// harts, and they write A and D alone. Every change is fenced before the lock is dropped (RV-7).
///
/// Read next: `GStageFormat` (what an entry is), `GStageFault` (how a fault is served), `GStageMap`, `GStageUnmap`,
/// `GStageLogging`.
///
/// Policies: RISC-V has no software bit for `tracked`, and none of its entries was ever looked at to mark a page: the
/// kernel up to 6.12 marked pages at the end of the fault, and so do `guess` and `tracked` here. Removing, ageing or
/// write-protecting an entry touches no page under any policy (Spec: arches X-7).
public final class GStageMMU: SecondaryMMU, @unchecked Sendable {
    // Unchecked: `root` changes only while no vCPU runs, the tables under mmu_lock, a vCPU's stock in its own task.

    /// Kernel: `kvm_riscv_gstage_mode`. The raw value is hgatp's MODE field. Source: privileged architecture, hgatp.
    public enum Mode: UInt64, Sendable, CaseIterable {
        /// 3 levels, 41 bits.
        case sv39x4 = 8
        /// 4 levels, 50 bits.
        case sv48x4 = 9

        public var levels: UInt8 { self == .sv39x4 ? 3 : 4 }
        /// Bits of a guest physical address: 12 of the page, 9 for each level, 2 more at the root.
        public var addressBits: Int { 14 + 9 * Int(levels) }
    }

    /// The VM's identifier in hgatp: one VM, so one identifier. Kernel: `kvm_riscv_gstage_vmid`.
    static let identifier: UInt64 = 1
    /// The largest leaf of this issue. The format allows 1 GiB.
    static let largestLeaf = PageLevel.page2M

    public let mode: Mode
    /// Whether an ordinary huge page of the host is mapped by a huge leaf. Kernels of this baseline do that for hugetlb
    /// only, and the model has no hugetlb yet; with `false` every leaf has 4 KiB, as there. Later kernels look at the
    /// host's page tables under mmu_lock, as `true` does. Spec: arches 2.2 steps 2 and 4.
    public let usesHostHugePages: Bool
    public let quirks: GStageQuirks
    /// The root table, four frames; nil before the VM exists and after it ends.
    public private(set) var root: HostFrame?
    let stock = TableStock()

    public init(mode: Mode = .sv39x4, usesHostHugePages: Bool = true, quirks: GStageQuirks = GStageQuirks()) {
        precondition(GStageBits.areDisjoint && GStageBits.leavesAreLegal, "the G-stage layout contradicts itself")
        self.mode = mode
        self.usesHostHugePages = usesHostHugePages
        self.quirks = quirks
        super.init()
    }

    /// The value of the harts' hgatp: MODE 63:60, VMID 57:44, PPN 43:0. 0 (Bare, never entered) without a root.
    /// Kernel: `kvm_riscv_gstage_update_hgatp`. Spec: arches 2.1.
    public var hgatp: UInt64 {
        guard let root else { return 0 }
        return mode.rawValue << 60 | Self.identifier << 44 | root.number
    }

    /// The tables, with the lock held and the root there.
    var tables: RadixTables<GStageFormat> {
        guard let root else { preconditionFailure("the G-stage tables are used without a root") }
        return RadixTables(memory: vm.memory.tables, format: GStageFormat(levels: mode.levels), root: root)
    }

    func note(_ event: @autoclosure () -> Event) {
        if let journal = vm.memory.journal { journal.record(event()) }
    }

    // MARK: What the generic half asks first.

    public override func isWritable(_ entry: UInt64) -> Bool { entry & GStageBits.write != 0 }
    public override func isLeaf(_ entry: UInt64, _ level: PageLevel) -> Bool {
        GStageFormat(levels: mode.levels).isLeaf(entry, level.rawValue)
    }
    public override var guestAddressBits: Int { mode.addressBits }
    public override var faultsInParallel: Bool { false }
    public override var retryLooksAtRange: Bool { false }
    public override var hasReferenceBit: Bool { false }
    public override var marksPagesFromEntries: Bool { false }
    public override var elidesFlushIfYoung: Bool { false }

    // MARK: Life. Kernel: kvm_riscv_gstage_alloc_pgd, kvm_riscv_gstage_free_pgd.

    /// Allocates the root. Without memory for it every fault fails with ENOMEM.
    public override func attached() { root = vm.host.allocateTable(order: GStageFormat.rootOrder, fill: 0) }

    public override func loadRoot(_ cpu: VirtualCPU) { cpu.root = root }

    /// Frees every leaf, every table, the root and the stocks.
    public override func destroy() {
        guard let root else { return }
        flushAll()
        freeTables(below: root)
        for cpu in vm.virtualCPUs { cpu.root = nil }
        vm.host.freeTable(root)
        stock.empty(into: vm.host)
        self.root = nil
    }

    public override func flushAll() {
        guard root != nil else { return }
        let guardian = vm.lockMMU()
        if zap(GuestFrame(0)..<tables.end, holding: guardian) { vm.flushRemoteTLBs() }
        guardian.unlock()
    }

    // MARK: Faults, notifiers, logging, slots: each in its file.

    public override func handleFault(_ cpu: VirtualCPU, _ fault: GuestFault) -> FaultOutcome { serve(cpu, fault) }

    public override func unmap(
        _ frames: Range<GuestFrame>, in space: UInt8, holding guardian: borrowing MMUGuard, mayBlock: Bool
    ) -> Bool {
        if quirks.unmapSkips { return zapAsBaseline(frames, holding: guardian) }
        return zap(frames, holding: guardian)
    }

    public override func age(
        _ frames: Range<GuestFrame>, in space: UInt8, holding guardian: borrowing MMUGuard
    ) -> Bool {
        clearAccessed(frames, holding: guardian)
    }

    public override func testAge(
        _ frames: Range<GuestFrame>, in space: UInt8, holding guardian: borrowing MMUGuard
    ) -> Bool {
        anyAccessed(frames, holding: guardian)
    }

    public override func protect(
        _ slot: MemorySlot, first: GuestFrame, mask: UInt64, holding guardian: borrowing MMUGuard
    ) {
        if writeProtect(first: first, mask: mask, holding: guardian) { vm.flushRemoteTLBs() }
    }

    public override func loggingEnabled(_ slot: MemorySlot) {
        let guardian = vm.lockMMU()
        _ = writeProtect(slot.frames, holding: guardian)
        vm.flushRemoteTLBs()
        guardian.unlock()
    }

    /// Nothing: 4 KiB leaves stay until they are unmapped or a huge leaf takes their place. Spec: arches 2.3.
    public override func loggingDisabled(_ slot: MemorySlot) {}

    public override func prepare(_ slot: MemorySlot) throws(Errno) { try checkSlot(slot) }

    /// Kernel: `kvm_arch_flush_shadow_memslot`: unmaps the slot, without a yield.
    public override func flushSlot(_ slot: MemorySlot) {
        let guardian = vm.lockMMU()
        if zap(slot.frames, holding: guardian) { vm.flushRemoteTLBs() }
        guardian.unlock()
    }

    public override func forEachLeaf(_ body: (StageTwoLeaf) -> Void) { visitLeaves(body) }
}
