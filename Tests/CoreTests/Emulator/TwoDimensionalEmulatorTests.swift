import Frames
import Hardware
import HostMemory
import SeededRandom
import Testing

/// A guest's own tables behind nested tables: who faults, with what code and for which address, and all four kinds of A
/// and D. `Hardware_BesideAnEmulator` says what is compared.
@Suite(.enabled(if: Emulator.missing == nil, Comment(rawValue: Emulator.missing ?? "")), .serialized)
struct Hardware_BesideAnEmulator_TwoDimensions {
    @Test(arguments: PagingMode.translating, [false, true])
    func `random tables of a guest behind random nested tables`(mode: PagingMode, hostHasFiveLevels: Bool) throws {
        let seed = UInt64.random(in: 0 ... .max)
        let walks = NestedWalks(mode, fiveLevels: hostHasFiveLevels, seed: seed)
        let counts = try walks.compare("seed \(seed)")
        #expect(counts.translated > 20 && counts.absent > 20 && counts.rights > 20, "seed \(seed): \(counts)")
        #expect(counts.nestedPages > 20 && counts.nestedTables > 20, "seed \(seed): \(counts)")
    }
}

/// The guest's memory is what `GuestTables` has, each page swapped with its neighbour, in the window's second half; the
/// first has the nested tables.
private struct NestedWalks {
    let guest: GuestTables
    let registers: PagingRegisters
    let fiveLevels: Bool
    private(set) var words: [UInt64]
    private(set) var probes: [Emulator.Probe] = []

    private static let processor = PagingProcessor(physicalAddressBits: 46)
    private static let base = Emulator.window
    private static let offset = GuestTables.bytes
    private static let bytes = 2 * GuestTables.bytes
    private var root: UInt64 { Self.base + (fiveLevels ? 0x5000 : 0x4000) }

    init(_ mode: PagingMode, fiveLevels: Bool, seed: UInt64) {
        var random = SplitMix(seed: seed)
        var guest = GuestTables(mode)
        guest.fill(&random, Self.processor)
        self.guest = guest
        registers = guest.registers()
        self.fiveLevels = fiveLevels
        words = Array(repeating: 0, count: Int(Self.bytes / 8))
        for (i, word) in guest.words.enumerated() { words[Self.place(UInt64(i) * 8)] = word }
        // The tables of level n are at n * 0x1000, and one more of level 1.
        for level in 2...5 { words[level * 512] = Self.base + UInt64(level - 1) << 12 | 7 }
        words[3 * 512] = Self.base + 0x2000 | 7
        let first = Int(GuestTables.base >> 21)
        words[2 * 512] = 0
        words[2 * 512 + first] = Self.base + 0x1000 | 7
        words[2 * 512 + first + 1] = Self.base + 0x6000 | 7
        for page in 0..<1024 {
            let table = page < 512 ? 512 : 6 * 512
            words[table + page & 511] =
                Self.base + UInt64(Self.place(UInt64(page) << 12)) * 8 | Self.bits(page, guest.top, &random)
        }
        for _ in 0..<600 {
            let address = guest.randomAddress(&random)
            for kind in Emulator.Kind.allCases {
                probes.append(.init(kind: kind, address: address, isUser: .random(using: &random)))
            }
        }
        // A large page may lead to the tables, where there is no halt.
        let raw = memory()
        probes = probes.filter { probe in
            guard case .translated(let page) = walker(probe, raw).walk(probe.address, LinearAccess(probe.kind.access))
            else { return true }
            return page.guest.address.value >= GuestTables.pages
        }
    }

    private func memory() -> RawTables {
        let raw = RawTables(top: Self.base + Self.bytes)
        for (i, word) in words.enumerated() where word != 0 { raw[Self.base + UInt64(i) * 8] = word }
        return raw
    }

    private func walker(_ probe: Emulator.Probe, _ raw: RawTables) -> LegacyWalker {
        var registers = registers
        registers.privilegeLevel = probe.isUser ? 3 : 0
        let nested = NPTWalker(
            memory: raw.memory, root: root, mode: fiveLevels ? .fiveLevel : .fourLevel, processor: Self.processor)
        return LegacyWalker(tables: .guest(.npt(nested)), registers: registers, processor: Self.processor)
    }

    /// In words, of what is at this place of the guest's memory.
    private static func place(_ guest: UInt64) -> Int { Int((offset + guest ^ 0x1000) / 8) }

    /// Of a nested leaf. The guest's root, and the way to its instructions, are there.
    private static func bits(_ page: Int, _ top: Int, _ random: inout SplitMix) -> UInt64 {
        func one(in n: Int) -> Bool { Int.random(in: 0..<n, using: &random) == 0 }
        if page < 16 || page >= 1022 { return 0x7 | random.next() & 0x60 }
        if page < 512 {
            // Of level 1, and of level 2 where it is not near the root, one table is not to be had: P, W or U is missing.
            let (level, number) = ((page - 16) / GuestTables.tablesOfLevel, page % GuestTables.tablesOfLevel)
            guard level == 1 || level == 2 && top > 3, number == 3 else { return 7 | random.next() & 0xf78 }
            return 7 ^ 1 << UInt64.random(in: 0..<3, using: &random)
        }
        var bits: UInt64 = random.next() & 0xf78
        bits |= (one(in: 6) ? 0 : 1) | (one(in: 6) ? 0 : 2) | (one(in: 6) ? 0 : 4) | (one(in: 6) ? 1 << 63 : 0)
        if one(in: 18) { bits |= 1 << UInt64.random(in: 46..<52, using: &random) }
        return bits
    }

    func compare(_ comment: String, sourceLocation: SourceLocation = #_sourceLocation) throws -> EmulatorCounts {
        let setup = Emulator.Setup(
            registers: registers, nestedRoot: root, hostHasFiveLevels: fiveLevels,
            physicalAddressBits: Self.processor.physicalAddressBits, code: GuestTables.code,
            userCode: GuestTables.userCode)
        var (answers, after) = try Emulator.walk(words, setup, probes)
        let raw = memory()
        let counts = try expectAnswers(probes, answers, setup, comment: comment, sourceLocation) { walker($0, raw) }
        let mine = (0..<Self.bytes / 8).map { raw[Self.base + $0 * 8] }
        if registers.mode == .pae { clearPointersAccessed(&after, Self.place(guest.root - GuestTables.base)) }
        if registers.mode.isLong {
            for number in 0..<GuestTables.tablesOfLevel {
                let first = Self.place(guest.table(3, number) - GuestTables.base)
                clearGigabytePagesAccessed(&after, mine, first..<first + 512)
            }
        }
        expectSame(mine, after, comment: comment, sourceLocation)
        return counts
    }
}
