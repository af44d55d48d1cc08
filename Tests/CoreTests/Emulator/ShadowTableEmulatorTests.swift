import Frames
import Hardware
import HostMemory
import Testing

@testable import GuestMemory
@testable import Machine
@testable import Paging

/// Shadow tables as the processor has them in its own CR3: for guests of 32 bits, with PAE and without paging the four
/// pointers of PAE paging, else four or five levels. The emulator runs with the registers that `PagedCPU` gives the
/// processor, at CPL 0 and 3. `Hardware_BesideAnEmulator` says what is compared.
@Suite(.enabled(if: Emulator.missing == nil, Comment(rawValue: Emulator.missing ?? "")), .serialized)
struct Hardware_BesideAnEmulator_ShadowTables {
    enum Kind: CaseIterable, Sendable {
        case unpaged, twoLevels, pae, fourLevels, fiveLevels
    }

    /// The guest's pages: 6 and 7 have its code, at CPL 3 and 0; what is accessed begins at 8.
    private static let code: (user: Int, supervisor: Int) = (6, 7)
    private static let accessed = 8..<40
    /// Of pages from 9 on, and again from 17 and 25: read-only, supervisor's, both, clean, not executable, with bit 52,
    /// which PAE alone reserves, with bit 46, which is reserved, not there. All others have P W U A D.
    private static let bits: [UInt64] = [0x65, 0x63, 0x61, 0x27, 0x67 | 1 << 63, 0x67 | 1 << 52, 0x67 | 1 << 46, 0]

    /// A guest whose page `n` is at the linear address `n` << 12, with such bits; with 32 bits what has a bit above them
    /// is as if it had not.
    private func makeGuest(_ kind: Kind) throws -> PagedGuest {
        let guest: PagedGuest
        var write: (Int, UInt64) throws -> Void = { _, _ in }
        switch kind {
        case .unpaged:
            guest = try PagedGuest()
            guest.mmu.load(.unpaged, on: guest.cpus[0])
        case .twoLevels:
            guest = try PagedGuest.twoLevels()
            write = { try guest.write32(2, $0, UInt32(truncatingIfNeeded: $1)) }
        case .pae:
            guest = try PagedGuest.physicalExtension()
            write = { try guest.write(3, $0, $1) }
        case .fourLevels:
            guest = try PagedGuest()
            try guest.identityMap()
            write = { try guest.write(4, $0, $1) }
        case .fiveLevels:
            guest = try PagedGuest()
            try guest.write(1, 0, 0x2007)
            try guest.write(1, 3, 0x2007)
            for table in 2...4 { try guest.write(table, 0, UInt64(table + 1) << 12 | 7) }
            for i in 0..<64 { try guest.write(5, i, UInt64(i) << 12 | PagedGuest.page) }
            guest.mmu.load(.fiveLevels(root: GuestAddress(0x1000)), on: guest.cpus[0])
            write = { try guest.write(5, $0, $1) }
        }
        for (i, bits) in Self.bits.enumerated() {
            for page in [9 + i, 17 + i, 25 + i] { try write(page, bits == 0 ? 0 : UInt64(page) << 12 | bits) }
        }
        try write(Self.code.supervisor, UInt64(Self.code.supervisor) << 12 | 0x63)
        try guest.space.makeTargets(at(Self.accessed.lowerBound), count: 56)
        for page in [Self.code.user, Self.code.supervisor] { try guest.space.makeCode(at(page)) }
        return guest
    }

    /// Where else the same pages are.
    private func bases(_ kind: Kind) -> [UInt64] {
        switch kind {
        case .unpaged, .fourLevels: [0]
        case .twoLevels: [0, 0x20_0000, 0x4000_0000]
        case .pae: [0, 0xc000_0000]
        case .fiveLevels: [0, 3 << 48]
        }
    }

    @Test(arguments: Kind.allCases)
    func `the shadow tables of a guest`(kind: Kind) throws {
        let guest = try makeGuest(kind)
        let cpu = guest.cpus[0]
        let state = guest.mmu.state(of: cpu)
        let linear = bases(kind).flatMap { base in Self.accessed.map { base + UInt64($0) << 12 } }
        for (code, isUser) in [(Self.code.user, true), (Self.code.supervisor, false)] {
            state.isUser = isUser
            #expect(cpu.access(.fetch, at: UInt64(code) << 12) == .value(Emulator.code[0].word))
        }
        // Of three pages with the same bits the first is loaded, stored, and left alone.
        for address in linear where address >> 12 & 63 < 25 {
            state.isUser = address >> 12 & 1 != 0
            for access in [PagedAccess.load, .fetch] { _ = cpu.access(access, at: address) }
            if address >> 12 & 63 < 17 { _ = cpu.access(.store(0), at: address) }
        }
        #expect(kind == .fourLevels || kind == .fiveLevels || state.usesFourRoots)
        try compare(guest, linear)
    }

    /// Pages of 4 MiB of a guest of 32 bits, half of one in a huge page of the host's, which is a leaf of 2 MiB.
    @Test func `the shadow tables of a guest with large pages`() throws {
        let guest = try PagedGuest(pages: 1024, ramFrames: 2048, thp: true)
        let cpu = guest.cpus[0]
        for (index, entry) in [(0, 0x2067), (1, 0xe7), (2, 0xe5), (3, 0xa7)] as [(Int, UInt32)] {
            try guest.write32(1, index, entry)
        }
        for i in 0..<64 { try guest.write32(2, i, UInt32(i) << 12 | (i == Self.code.supervisor ? 0x63 : 0x67)) }
        guest.mmu.load(.twoLevels(0x1000), on: cpu)
        try guest.space.makeTargets(at(8), count: 1016)
        for page in [Self.code.user, Self.code.supervisor] { try guest.space.makeCode(at(page)) }
        let state = guest.mmu.state(of: cpu)
        for (code, isUser) in [(Self.code.user, true), (Self.code.supervisor, false)] {
            state.isUser = isUser
            #expect(cpu.access(.fetch, at: UInt64(code) << 12) == .value(Emulator.code[0].word))
        }
        state.isUser = true
        let linear = [0x40_0000, 0x80_0000, 0xc0_0000].flatMap { base in
            [20, 21, 600, 601, 1023].map { UInt64(base) + $0 << 12 }
        }
        for address in linear { _ = cpu.access(.load, at: address) }
        _ = cpu.access(.store(0), at: 0x40_0000 + 600 << 12)
        let huge = guest.entriesSet().filter { $0.level == 2 && $0.guest == 512 }
        #expect(huge.contains { $0.bits & 0x83 == 0x83 } && huge.contains { $0.bits & 0x82 == 0x80 }, "\(huge)")
        try compare(guest, linear)
    }

    /// Asks both, in the same order, and compares everything.
    private func compare(
        _ guest: PagedGuest, _ linear: [UInt64], sourceLocation: SourceLocation = #_sourceLocation
    ) throws {
        let cpu = guest.cpus[0]
        var probes: [Emulator.Probe] = []
        for address in linear {
            for isUser in [true, false] {
                for kind in Emulator.Kind.allCases {
                    probes.append(.init(kind: kind, address: address | Emulator.target, isUser: isUser))
                }
            }
        }
        let root = try #require(cpu.root)
        let registers = cpu.walker.registers
        var setup = Emulator.Setup(
            registers: registers, code: UInt64(Self.code.supervisor) << 12, userCode: UInt64(Self.code.user) << 12)
        setup.registers.cr3 += Emulator.window
        var moved = memory(of: guest.test)
        let tables = Relocation(&moved, root: root, levels: registers.mode.topLevel, by: Emulator.window)
        var (answers, after) = try Emulator.walk(moved, setup, probes)
        tables.moveBack(&after)
        if registers.mode == .pae { clearPointersAccessed(&after, Int(root.number) * 512) }
        try expectAnswers(probes, answers, setup, sourceLocation) { probe in
            guest.mmu.state(of: cpu).isUser = probe.isUser
            return cpu.walker
        }
        expectSame(memory(of: guest.test), after, sourceLocation)
    }
}
