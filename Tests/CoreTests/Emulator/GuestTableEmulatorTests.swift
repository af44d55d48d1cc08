import Frames
import Hardware
import HostMemory
import SeededRandom
import Testing

@testable import GuestMemory
@testable import Paging

/// A guest's own tables of each paging mode, as three walk them: QEMU's processor, `Hardware`, and KVM's walk of the
/// guest's tables in `Paging`. The same pages, the same faults with the same codes, the same A and D. Of PAE's pointers
/// none has a reserved bit: QEMU 7.2 does not load them, which would refuse it, but reads them with each walk.
@Suite(.enabled(if: Emulator.missing == nil, Comment(rawValue: Emulator.missing ?? "")), .serialized)
struct Hardware_BesideAnEmulator_GuestTables {
    /// What the control registers say besides the mode.
    enum Control: CaseIterable, Sendable {
        case usual
        /// Neither NXE, WP nor PSE.
        case bare
        case prevention
        /// SMEP and SMAP without WP.
        case preventionWithoutWriteProtect

        func registers(_ tables: GuestTables) -> PagingRegisters {
            switch self {
            case .usual: tables.registers()
            case .bare: tables.registers(noExecute: false, writeProtect: false, largePages: false)
            case .prevention: tables.registers(smep: true, smap: true)
            case .preventionWithoutWriteProtect:
                tables.registers(noExecute: false, writeProtect: false, smep: true, smap: true)
            }
        }
    }

    /// With 32 bits KVM takes 36-bit addresses for granted.
    private func processor(_ mode: PagingMode) -> PagingProcessor {
        PagingProcessor(physicalAddressBits: mode == .bits32 ? 36 : 46)
    }

    @Test(arguments: PagingMode.translating, Control.allCases)
    func `each bit of each entry`(mode: PagingMode, control: Control) throws {
        var tables = GuestTables(mode)
        let processor = processor(mode)
        let addresses = tables.makeVariants(processor)
        let walks = try Walks(tables, control.registers(tables), processor, Self.all(addresses))
        let counts = try walks.compare()
        #expect(counts.translated > 50 && counts.absent > 5 && counts.rights > 5, "\(counts)")
        // With 32 bits only a large page has a reserved bit.
        #expect(counts.reserved > 5 || mode == .bits32 && control == .bare, "\(counts)")
        try walks.onlyTranslated.compareFlags()
    }

    @Test(arguments: PagingMode.translating, Control.allCases)
    func `random tables`(mode: PagingMode, control: Control) throws {
        let seed = UInt64.random(in: 0 ... .max)
        var random = SplitMix(seed: seed)
        var tables = GuestTables(mode)
        let processor = processor(mode)
        tables.fill(&random, processor)
        let addresses = (0..<500).map { _ in tables.randomAddress(&random) }
        let walks = try Walks(tables, control.registers(tables), processor, Self.all(addresses))
        let counts = try walks.compare("seed \(seed)")
        #expect(counts.translated > 50 && counts.absent > 20 && counts.rights > 20, "seed \(seed): \(counts)")
        try walks.onlyTranslated.compareFlags("seed \(seed)")
    }

    /// PSE-36: bits 20:13 of the entry are the address's 39:32.
    @Test func `a page of 4 MiB above 4 GiB`() throws {
        var tables = GuestTables(.bits32)
        let entries: [UInt64] = [0xe7, 0x87, 0xe5, 0xe3, 0x10e7, 0x20_00e7, 0x66]
        for (i, bits) in entries.enumerated() { tables.set(tables.root, 2, 8 + i, 1 << 13 | bits) }
        var high = [UInt64](repeating: 0, count: 1024 * 512)
        for page in 0..<1024 {
            high[page * 512 + 511] = GuestTables.content(GuestFrame(1 << 20 + UInt64(page)))
        }
        let addresses = entries.indices.flatMap { i in [0, 3, 700, 1023].map { tables.address([$0, 8 + i]) } }
        // With 46 bits, of which a page of 4 MiB has 40; KVM's walk knows of 36.
        for bits in [46, 36] {
            let walks = try Walks(
                tables, tables.registers(), PagingProcessor(physicalAddressBits: bits), Self.all(addresses), high: high)
            let counts = try walks.compare()
            #expect(counts == EmulatorCounts(translated: 100, absent: 24, rights: 20, reserved: 24))
            try walks.onlyTranslated.compareFlags()
        }
    }

    /// The linear addresses that 48 and 57 bits do not reach.
    @Test(arguments: [PagingMode.fourLevel, .fiveLevel])
    func `addresses that are not canonical`(mode: PagingMode) throws {
        var tables = GuestTables(mode)
        let processor = processor(mode)
        let good = try #require(tables.makeVariants(processor).first)
        let addresses = (40..<64 as Range<UInt64>).map { good ^ 1 << $0 }
        // A jump at CPL 3 ends in a general-protection fault there in any case: see `Emulator.answer`.
        let probes = Self.all(addresses).filter { !$0.isUser || $0.kind != .fetch }
        let walks = try Walks(tables, tables.registers(), processor, probes, kvmWalks: false)
        let counts = try walks.compare()
        #expect(counts.nonCanonical == (mode == .fourLevel ? 17 : 8) * 5, "\(counts)")
    }

    /// Every access at both privilege levels.
    private static func all(_ addresses: [UInt64]) -> [Emulator.Probe] {
        addresses.flatMap { address in
            [false, true].flatMap { isUser in
                Emulator.Kind.allCases.map { Emulator.Probe(kind: $0, address: address, isUser: isUser) }
            }
        }
    }
}

/// Accesses through a guest's tables, made by all three.
private struct Walks {
    let tables: GuestTables
    let registers: PagingRegisters
    let processor: PagingProcessor
    let probes: [Emulator.Probe]
    let kvmWalks: Bool
    /// What is from 4 GiB on.
    let high: [UInt64]

    /// Leaves out what a large page leads to elsewhere than to the pages that are there to be accessed.
    init(
        _ tables: GuestTables, _ registers: PagingRegisters, _ processor: PagingProcessor, _ probes: [Emulator.Probe],
        high: [UInt64] = [], kvmWalks: Bool = true
    ) throws {
        self.tables = tables
        self.registers = registers
        self.processor = processor
        self.kvmWalks = kvmWalks
        self.high = high
        let walker = try Self.walker(tables, registers, processor, high)
        self.probes = probes.filter { probe in
            switch walker.at(probe).walk(probe.address, LinearAccess(probe.kind.access)) {
            case .translated(let page):
                (GuestTables.pages..<GuestTables.base + GuestTables.bytes).contains(page.frame.physicalAddress)
                    || page.frame.physicalAddress >= 1 << 32
            case .pageFault, .nonCanonical: true
            case .outside, .stageTwo: false
            }
        }
    }

    /// Those that go through: of others KVM sets no A, for it walks without touching the tables first, and the processor
    /// sets that of each entry that it used.
    var onlyTranslated: Walks {
        get throws {
            let walker = try Self.walker(tables, registers, processor, high)
            let through = probes.filter { probe in
                if case .translated = walker.at(probe).walk(probe.address, LinearAccess(probe.kind.access)) {
                    return true
                }
                return false
            }
            return try Walks(tables, registers, processor, through, high: high)
        }
    }

    private static func walker(
        _ tables: GuestTables, _ registers: PagingRegisters, _ processor: PagingProcessor, _ high: [UInt64]
    ) throws -> TablesInMemory {
        let raw = RawTables(
            top: high.isEmpty ? GuestTables.base + GuestTables.bytes : 1 << 32 + UInt64(high.count) * 8)
        for (i, word) in high.enumerated() where word != 0 { raw[1 << 32 + UInt64(i) * 8] = word }
        for (i, word) in tables.words.enumerated() where word != 0 { raw[GuestTables.base + UInt64(i) * 8] = word }
        var registers = registers
        if registers.mode == .pae {
            let walker = LegacyWalker(tables: .physical(raw.memory), registers: registers, processor: processor)
            guard case .loaded(let pointers) = walker.loadPageDirectoryPointers() else {
                throw Unloadable()
            }
            registers.pointers = pointers
        }
        return TablesInMemory(raw: raw, registers: registers, processor: processor)
    }

    private struct Unloadable: Error {}

    private func emulated() throws -> (answers: [Emulator.Answer], memory: [UInt64], setup: Emulator.Setup) {
        let setup = Emulator.Setup(
            registers: registers, physicalAddressBits: processor.physicalAddressBits, code: GuestTables.code,
            userCode: GuestTables.userCode)
        var (answers, memory) = try Emulator.walk(tables.words, setup, probes, more: high)
        if registers.mode == .pae { clearPointersAccessed(&memory, Int(tables.root - GuestTables.base) / 8) }
        return (answers, memory, setup)
    }

    /// What each says of each access, and the tables after all of them: of the processors, for KVM see `compareFlags`.
    func compare(
        _ comment: String = "", sourceLocation: SourceLocation = #_sourceLocation
    ) throws -> EmulatorCounts {
        var (answers, after, setup) = try emulated()
        let walker = try Self.walker(tables, registers, processor, high)
        let counts = try expectAnswers(probes, answers, setup, comment: comment, sourceLocation) { walker.at($0) }
        let mine = walker.words
        if registers.mode.isLong {
            for number in 0..<GuestTables.tablesOfLevel {
                let first = Int(tables.table(3, number) - GuestTables.base) / 8
                clearGigabytePagesAccessed(&after, mine, first..<first + 512)
            }
        }
        expectSame(mine, after, comment: comment, sourceLocation)
        guard kvmWalks else { return counts }
        let guest = try GuestOfTables(tables, registers, processor, high)
        for (probe, answer) in zip(probes, answers) {
            let answer = answer.asOfTheManual
            let found = guest.walk(probe)
            let expected = answer.exit == Emulator.Answer.pageFault ? answer.code : nil
            #expect(found.code == expected, "KVM: \(probe) \(comment)", sourceLocation: sourceLocation)
            // What is in a page says which it is.
            guard found.code == nil, probe.kind == .load, answer.exit == Emulator.Answer.halted else { continue }
            #expect(
                answer.value == GuestTables.content(found.frame), "KVM: \(probe) \(comment)",
                sourceLocation: sourceLocation)
        }
        return counts
    }

    /// The tables after all accesses, which go through: of all three.
    func compareFlags(_ comment: String = "", sourceLocation: SourceLocation = #_sourceLocation) throws {
        let (_, after, _) = try emulated()
        let guest = try GuestOfTables(tables, registers, processor, high)
        for probe in probes {
            #expect(guest.walk(probe).code == nil, "\(probe) \(comment)", sourceLocation: sourceLocation)
        }
        let changed = after.indices.filter { after[$0] != tables.words[$0] }.count
        #expect(changed > 0, "\(changed) words \(comment)", sourceLocation: sourceLocation)
        expectSame(try guest.words(), after, comment: comment, sourceLocation)
    }
}

/// The tables where `Hardware` walks them.
private struct TablesInMemory {
    let raw: RawTables
    let registers: PagingRegisters
    let processor: PagingProcessor

    func at(_ probe: Emulator.Probe) -> LegacyWalker {
        var registers = registers
        registers.privilegeLevel = probe.isUser ? 3 : 0
        return LegacyWalker(tables: .physical(raw.memory), registers: registers, processor: processor)
    }

    var words: [UInt64] { (0..<GuestTables.bytes / 8).map { raw[GuestTables.base + $0 * 8] } }
}

/// The tables in the memory of a VM, where KVM walks them.
private struct GuestOfTables {
    private let guest: PagedGuest
    private static let memory = at(4096)
    private var cpu: VirtualCPU { guest.cpus[0] }

    init(
        _ tables: GuestTables, _ registers: PagingRegisters, _ processor: PagingProcessor, _ high: [UInt64]
    ) throws {
        guest = try PagedGuest(ramFrames: 4096)
        try guest.space.map(at: Self.memory, length: GuestTables.bytes, protection: .readWrite, backing: .anonymous)
        try guest.vm.setMemoryRegion(
            MemoryRegion(
                slot: 1, guestAddress: GuestAddress(GuestTables.base), size: GuestTables.bytes, userAddress: Self.memory
            ))
        for (i, word) in tables.words.enumerated() where word != 0 {
            try guest.space.store(Self.memory + UInt64(i) * 8, word)
        }
        if !high.isEmpty {
            let place = at(8192)
            let size = UInt64(high.count) * 8
            try guest.space.map(at: place, length: size, protection: .readWrite, backing: .anonymous)
            try guest.vm.setMemoryRegion(
                MemoryRegion(slot: 2, guestAddress: GuestAddress(1 << 32), size: size, userAddress: place))
        }
        // LME and LMA; PE and ET.
        var loaded = GuestRegisters(
            cr0: registers.cr0 | 0x11, cr3: registers.cr3, cr4: registers.cr4,
            efer: registers.efer & PagingRegisters.noExecuteBit | (registers.mode.isLong ? 0x500 : 0))
        loaded.physicalAddressBits = UInt8(processor.physicalAddressBits)
        #expect(guest.mmu.load(loaded, on: guest.cpus[0]))
    }

    /// The fault's code; nil: the page that was found.
    func walk(_ probe: Emulator.Probe) -> (code: UInt64?, frame: GuestFrame) {
        var code: FaultCode = probe.isUser ? .user : []
        switch probe.kind {
        case .load: break
        case .store: code.insert(.write)
        case .fetch: code.insert(.fetch)
        }
        switch guest.vm.withSlots({ guest.mmu.walkGuest(cpu, probe.address, code) }) {
        case .page(let walk): return (nil, walk.frame)
        case .fault(let failure): return (failure.pageFault.code.rawValue, GuestFrame(0))
        }
    }

    /// As the guest has them now.
    func words() throws -> [UInt64] {
        try (0..<GuestTables.bytes / 8).map { try guest.space.load(Self.memory + $0 * 8) }
    }
}
