import Frames
import Hardware
import HostMemory
import Testing

@testable import GuestMemory
@testable import Machine
@testable import Paging

/// The tables that the MMUs make, as `Hardware` walks them and as QEMU's processor does: the same answers, the same error
/// codes, the same A and D afterwards. EPT has no emulator in Debian; its walker stands alone.
///
/// Here those with nested paging.
@Suite(.enabled(if: Emulator.missing == nil, Comment(rawValue: Emulator.missing ?? "")), .serialized)
struct Hardware_BesideAnEmulator {
    /// Asks both, in the same order, and compares everything.
    private func compare(
        _ host: TestHost, root: HostFrame, levels: UInt8 = 4, code: UInt64, _ pages: [UInt64],
        sourceLocation: SourceLocation = #_sourceLocation
    ) throws {
        var probes: [Emulator.Probe] = []
        for page in pages {
            for kind in Emulator.Kind.allCases { probes.append(.init(kind: kind, address: page | Emulator.target)) }
        }
        var moved = memory(of: host)
        let tables = Relocation(&moved, root: root, levels: levels, by: Emulator.window)
        var (answers, after) = try Emulator.walk(
            moved,
            .init(nestedRoot: root.physicalAddress + Emulator.window, hostHasFiveLevels: levels == 5, code: code),
            probes)
        tables.moveBack(&after)
        let walker = NPTWalker(
            memory: host.memory, root: root.physicalAddress, mode: levels == 5 ? .fiveLevel : .fourLevel,
            processor: PagingProcessor(physicalAddressBits: 46, isAMD: true))
        for (probe, answer) in zip(probes, answers) {
            guard case .translated = walker.walk(GuestAddress(code + probe.kind.rawValue), .execute) else {
                Issue.record("the guest's code is not mapped", sourceLocation: sourceLocation)
                return
            }
            let expected = try perform(probe, walker, host)
            #expect(answer.asOfTheManual == expected, "\(probe)", sourceLocation: sourceLocation)
        }
        expectSame(memory(of: host), after, sourceLocation)
    }

    private func perform(_ probe: Emulator.Probe, _ walker: NPTWalker, _ host: TestHost) throws -> Emulator.Answer {
        let address = GuestAddress(probe.address)
        switch walker.walk(address, probe.kind.access) {
        case .translated(let translation):
            return probe.kind.perform(host.memory, translation.frame.physicalAddress | address.offset)
        case .violation(let fault):
            return .init(
                exit: Emulator.Answer.nestedPageFault, code: walker.errorCode(of: fault), address: probe.address)
        case let other:
            Issue.record("\(other)")
            return .init(exit: 0)
        }
    }

    @Test(arguments: [false, true])
    func `NPT of the TDP MMU`(nxHugePages: Bool) throws {
        let machine = TDPMachine(ramFrames: 1024, thp: true) {
            $0.format = .npt
            $0.nxHugePages = nxHugePages
            $0.cachesMMIO = true
        }
        try machine.slot(0, frame: 0, page: 0, count: 16)
        try machine.slot(1, frame: 32, page: 32, count: 4, flags: SlotFlags(readOnly: true))
        try machine.slot(2, frame: 48, page: 48, count: 4, flags: SlotFlags(logDirtyPages: true))
        try machine.slot(3, frame: 512, page: 512, count: 512)
        try machine.space.makeTargets(at(0), count: 16)
        try machine.space.makeTargets(at(32), count: 4)
        try machine.space.makeTargets(at(48), count: 4)
        try machine.space.makeTargets(at(512), count: 16)
        try machine.space.makeCode(at(0))
        machine.fault(.execute, 0)
        for frame in [1, 2, 5, 48, 49, 50] as [UInt64] { machine.fault(.write, frame) }
        for frame in [3, 32, 33, 51] as [UInt64] { machine.fault(.read, frame) }
        machine.fault(.write, 512)
        // W goes, and of one page comes back.
        _ = try machine.dirtyLog(2)
        machine.fault(.write, 49, present: true)
        // Where nothing is: an entry with a reserved bit.
        machine.fault(.read, 100)
        machine.fault(.read, 700, present: true)
        #expect(machine.leaf(512)?.level == .page2M)
        let frames: [UInt64] = [1, 2, 3, 4, 5, 32, 33, 34, 48, 49, 50, 51, 100, 101, 512, 513, 520]
        try compare(machine.test, root: machine.cpu.root!, code: 0, frames.map { $0 << 12 })
    }

    @Test(arguments: [DirectGuest.Kind.npt, .nptOfFiveLevels], [false, true])
    func `NPT of the shadow MMU, without the TDP MMU`(kind: DirectGuest.Kind, nxHugePages: Bool) throws {
        let direct = DirectGuest(kind, ramFrames: 2048, thp: true) { $0.nxHugePages = nxHugePages }
        // The first 2 MiB are of small pages, for they are in several slots.
        try direct.space.mapPages(0, 16)
        try direct.guest.setSlot(0, guest: 0, pages: 16)
        try direct.space.mapPages(32, 4)
        try direct.guest.setSlot(1, guest: 32, pages: 4, readOnly: true)
        try direct.space.mapPages(48, 4)
        try direct.guest.setSlot(2, guest: 48, pages: 4, log: true)
        try direct.space.mapPages(512, 512)
        try direct.guest.setSlot(3, guest: 512, pages: 512)
        for (first, count) in [(0, 16), (32, 4), (48, 4), (512, 512)] {
            try direct.space.makeTargets(at(first), count: count)
        }
        try direct.space.makeCode(at(0))
        direct.fault(.execute, 0)
        for page in [1, 2, 5, 48, 49, 50] { direct.fault(.write, page) }
        for page in [3, 32, 33, 51] { direct.fault(.read, page) }
        direct.fault(.write, 512)
        if nxHugePages {
            direct.fault(.execute, 513, present: true)
            #expect(direct.guest.leaf(513)?.level == .page4K)
        } else {
            #expect(direct.guest.leaf(513)?.level == .page2M)
        }
        // W goes, and of one page comes back; A goes.
        _ = try direct.vm.getDirtyLog(slot: 2)
        direct.fault(.write, 49, present: true)
        #expect(direct.space.clearYoung(at(2)..<at(3)))
        // Where nothing is: an entry with a reserved bit.
        direct.fault(.read, 100)
        direct.fault(.read, 1200)
        let pages = [1, 2, 3, 4, 5, 32, 33, 34, 48, 49, 50, 51, 100, 101, 512, 513, 520, 1200]
        try compare(
            direct.guest.test, root: direct.cpu.root!, levels: direct.mmu.secondStage.levels,
            code: gfn(0).address.value, pages.map { gfn($0).address.value })
        direct.guest.check()
    }

    @Test func `the shadow MMU's, as nested tables`() throws {
        let guest = try PagedGuest()
        try guest.identityMap()
        try guest.space.makeTargets(at(8), count: 24)
        try guest.space.makeCode(at(5))
        // Read-only, supervisor's, not executable, clean, not there.
        let bits: [UInt64] = [0x65, 0x63, 0x67 | 1 << 63, 0x27, 0]
        for (i, bits) in bits.enumerated() {
            for page in [9 + i, 17 + i] { try guest.write(4, page, bits == 0 ? 0 : UInt64(page) << 12 | bits) }
        }
        #expect(guest.cpus[0].access(.fetch, at: 0x5000) != .failed(.EIO))
        for page in 8..<24 as Range<UInt64> {
            for access in [PagedAccess.load, .fetch] { _ = guest.cpus[0].access(access, at: page << 12) }
            if page % 2 == 0 { _ = guest.cpus[0].access(.store(0), at: page << 12) }
        }
        try compare(
            guest.test, root: guest.cpus[0].root!, code: 0x5000, (8..<26 as Range<UInt64>).map { $0 << 12 })
    }

    @Test func `those of a nested guest`() throws {
        let guest = try NestedGuest { $0.format = .npt }
        try guest.makeTables(leaf: 0x67, table: 0x67)
        try guest.space.makeTargets(at(16), count: 32)
        try guest.space.makeCode(at(16 + 5))
        let bits: [UInt64] = [0x65, 0x63, 0x67 | 1 << 63, 0x27, 0]
        for (i, bits) in bits.enumerated() { try guest.write(4, 9 + i, bits == 0 ? 0 : NestedGuest.leaf(9 + i, bits)) }
        try guest.mmu.enterNested(GuestRegisters.longMode(root: GuestAddress(0x1000)), guest.cpu)
        #expect(guest.cpu.access(.fetch, at: 0x5000) != .failed(.EIO))
        for page in 6..<20 as Range<UInt64> {
            for access in [PagedAccess.load, .fetch] { _ = guest.cpu.access(access, at: page << 12) }
            if page % 2 == 0 { _ = guest.cpu.access(.store(0), at: page << 12) }
        }
        try compare(guest.test, root: guest.cpu.root!, code: 0x5000, (6..<22 as Range<UInt64>).map { $0 << 12 })
    }
}
