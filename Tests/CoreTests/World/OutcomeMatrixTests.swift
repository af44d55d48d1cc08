import Audit
import Frames
import HostMemory
import Testing

@testable import Machine

/// The outcomes of the three policies, cell by cell. Spec: generic 10.3.
@Suite struct Generic10_3_OutcomeMatrix {
    struct Cell: Sendable, CustomTestStringConvertible {
        var policy: PolicyName
        var architecture: Architecture
        var testDescription: String { "\(policy) on \(architecture)" }
        /// x86-64 TDP entries have the spare bit that `tracked` needs.
        var hasBit: Bool { architecture == .x86TDP }
    }

    static let cells = PolicyName.allCases.flatMap { policy in
        [Architecture.x86TDP, .riscvSv39x4].map { Cell(policy: policy, architecture: $0) }
    }

    private func world(_ kind: RegionKind, _ cell: Cell, _ change: (inout Plan) -> Void = { _ in }) throws -> TestWorld
    {
        try TestWorld(kind, policy: cell.policy, architecture: cell.architecture, change)
    }

    /// References that KVM took on page 0, by holder.
    private func taken(_ world: TestWorld, _ holder: Holder) -> Int {
        world.journal.events.count { $0.kind == .referenceTaken && $0.holder == holder }
    }

    /// What anonymous, file and shared memory have in common: GUP gives a reference, and none is left.
    private func expectCounted(_ kind: RegionKind, _ cell: Cell) throws {
        let test = try world(kind, cell)
        #expect(test.guest(.write, page: 0, 7) == .stored)
        #expect(test.guest(.read, page: 0) == .value(7))
        #expect(taken(test, .guestFault) == 1)
        #expect(test.journal.holdings.isEmpty)
        #expect(test.state(0)?.referenceCount == (kind == .sharedMemory ? 2 : 1))
        if cell.policy == .tracked, cell.hasBit { #expect(test.leaf(0)!.entry & 1 << 59 != 0, "bit = 1") }
    }

    @Test(arguments: cells) func `anonymous memory is mapped through one reference`(_ cell: Cell) throws {
        try expectCounted(.anonymous, cell)
    }

    @Test(arguments: cells) func `shared memory is mapped through one reference`(_ cell: Cell) throws {
        try expectCounted(.sharedMemory, cell)
    }

    @Test(arguments: cells) func `the zero page is mapped for a read and its flags stay`(_ cell: Cell) throws {
        let test = try world(.anonymous, cell)
        #expect(test.guest(.read, page: 0) == .value(0))
        #expect(test.frame(0) == test.world.host.zeroPage)
        #expect(test.leaf(0)?.writable == false)
        let zero = try #require(test.world.host.memory.inspect(test.world.host.zeroPage))
        #expect(!zero.flags.isDirty && !zero.flags.isAccessed)
        #expect(test.journal.holdings.isEmpty)
    }

    @Test(arguments: cells) func `a device without page frames is mapped without a reference`(_ cell: Cell) throws {
        let test = try world(.deviceBAR, cell)
        #expect(test.guest(.write, page: 0, 7) == .stored)
        #expect(taken(test, .guestFault) + taken(test, .heuristic) == 0)
        if cell.hasBit { #expect(test.leaf(0)!.entry & 1 << 59 == 0, "bit = 0") }
    }

    @Test(arguments: cells) func `reserved frames are mapped without a reference`(_ cell: Cell) throws {
        let test = try world(.reservedMemory, cell)
        let before = test.world.host.memory.inspect(try #require(test.guestFrame(after: .write)))
        #expect(taken(test, .guestFault) + taken(test, .heuristic) == 0)
        if cell.hasBit { #expect(test.leaf(0)!.entry & 1 << 59 == 0, "bit = 0") }
        try test.world.addressSpace.unmap(TestWorld.user..<(TestWorld.user + 4096))
        #expect(before?.flags.isDirty == false && before?.flags.isAccessed == false)
    }

    @Test(arguments: cells) func `a counted page that is PFN-mapped`(_ cell: Cell) throws {
        let test = try world(.countedPFNMap, cell)
        #expect(test.guest(.write, page: 0, 7) == .stored)
        let frame = try #require(test.frame(0))
        let guessed = taken(test, .heuristic)
        // precise: the counter never changes; the others: a transient reference.
        #expect(guessed == (cell.policy == .precise ? 0 : 1))
        #expect(test.world.host.memory.inspect(frame)?.referenceCount == 1)
        if cell.policy == .tracked, cell.hasBit { #expect(test.leaf(0)!.entry & 1 << 59 != 0, "bit = 1") }
        // Later A/D writes: when the entry goes away, or (RISC-V) at the fault's end.
        try test.world.addressSpace.unmap(TestWorld.user..<(TestWorld.user + 4096))
        let flags = try #require(test.world.host.memory.inspect(frame)).headFlags
        #expect(flags.isDirty(by: .kvm) == (cell.policy != .precise))
        #expect(flags.isAccessed(by: .kvm) == (cell.policy != .precise))
    }

    @Test(arguments: cells) func `a tail page of a non-compound block`(_ cell: Cell) throws {
        let test = try world(.graphicsBuffer, cell)
        let refused = cell.policy == .guess || (cell.policy == .tracked && !cell.hasBit)
        #expect(test.guest(.write, page: 1, 7) == (refused ? .failed(.EFAULT) : .stored))
        #expect(test.frame(1) != nil && test.state(1)?.referenceCount == 0, "the page is a tail with count 0")
        if cell.policy == .tracked, cell.hasBit { #expect(test.leaf(1)!.entry & 1 << 59 == 0, "bit = 0") }
        #expect(test.state(1)?.flags.isDirty == false)
    }

    @Test(arguments: cells) func `a write through a read-only PFN entry is refused by all`(_ cell: Cell) throws {
        let test = try world(.writeNotifyPFNMap, cell)
        // Data pages are read-only for good: x86 emulates, and what the emulator can't store either is MMIO.
        _ = test.guest(.read, page: 1)
        let result = test.guest(.write, page: 1, 7)
        #expect(result == (ArchitectureSet.x86.contains(cell.architecture) ? .mmio : .failed(.EFAULT)))
        #expect(test.leaf(1)?.writable == false)
        let failed = test.journal.events.filter { $0.kind == .translationFailed }
        #expect(failed.last?.value == UInt64(TranslationError.allCases.firstIndex(of: .readOnly)!), "RO_FAULT")
    }

    @Test(arguments: cells) func `a host map of PFN-mapped memory`(_ cell: Cell) throws {
        for (kind, page) in [(RegionKind.graphicsBuffer, UInt64(1)), (.countedPFNMap, 0), (.deviceBAR, 0)] {
            for unsafe in [false, true] {
                let test = try world(kind, cell) { $0.allowUnsafeMappings = unsafe }
                let counted = kind == .countedPFNMap
                let tail = kind == .graphicsBuffer
                let allowed =
                    switch cell.policy {
                    case .precise: unsafe
                    // Wherever a fault is allowed.
                    case .guess: !tail
                    case .tracked: counted || (unsafe && (cell.hasBit || !tail))
                    }
                #expect(mapSucceeds(test, page) == allowed, "\(kind), allow_unsafe_mappings \(unsafe)")
                #expect(test.journal.holdings.isEmpty)
            }
        }
    }

    private func mapSucceeds(_ test: TestWorld, _ page: UInt64) -> Bool {
        test.vm.withSlots {
            do throws(Errno) {
                let map = try test.vm.map(GuestFrame(page))
                map.unmap()
                return true
            } catch {
                #expect(error == .EINVAL)
                return false
            }
        }
    }

    @Test(arguments: cells) func `gfn_to_page of PFN-mapped memory with page frames`(_ cell: Cell) throws {
        let test = try world(.countedPFNMap, cell)
        let found = test.vm.withSlots { () -> Bool in
            guard let page = test.vm.page(of: GuestFrame(0)) else { return false }
            page.releaseUnused()
            return true
        }
        #expect(found == (cell.policy != .precise))
        #expect(test.journal.holdings.isEmpty)
    }

    @Test(arguments: PolicyName.allCases) func `a zap looks pages up as often as the policy says`(
        _ policy: PolicyName
    ) throws {
        let test = try TestWorld(.anonymous, pages: 512, policy: policy)
        for page in 0..<UInt64(512) { #expect(test.guest(.write, page: page, page) == .stored) }
        test.world.host.memory.forgetAccessedAndDirty()
        let frames = try (0..<UInt64(512)).map { try #require(test.frame($0)) }
        test.zap(512)
        let marked = frames.count { test.world.host.memory.inspect($0)!.headFlags.isDirty(by: .kvm) }
        #expect(marked == (policy == .precise ? 0 : 512))
    }

    @Test(arguments: PolicyName.allCases) func `a page becomes dirty at map or at zap`(_ policy: PolicyName) throws {
        let test = try TestWorld(.anonymous, policy: policy)
        #expect(test.guest(.write, page: 0, 7) == .stored)
        let frame = try #require(test.frame(0))
        let atMap = test.world.host.memory.inspect(frame)!.headFlags.isDirty(by: .kvm)
        #expect(atMap == (policy == .precise))
        test.zap(8)
        #expect(test.world.host.memory.inspect(frame)!.headFlags.isDirty(by: .kvm))
    }
}

extension TestWorld {
    /// The guest accesses page 0; the frame it got.
    func guestFrame(after kind: AccessKind) -> HostFrame? {
        _ = guest(kind, page: 0, 1)
        return frame(0)
    }

    /// Zaps the first `pages` entries through the MMU alone; the process's entries stay.
    func zap(_ pages: UInt64) {
        let guardian = vm.lockMMU()
        if vm.mmu.unmap(GuestFrame(0)..<GuestFrame(pages), in: 0, holding: guardian, mayBlock: false) {
            vm.flushRemoteTLBs()
        }
        guardian.unlock()
    }
}
