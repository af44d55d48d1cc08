import Audit
import Frames
import HostMemory
import Testing

@testable import GuestMemory
@testable import Paging

/// Each rule of `checkTables` is found when it is broken on purpose, and nothing else is.
@Suite struct X86_8_TableChecks {
    struct Damage: Sendable, CustomTestStringConvertible {
        var invariant: Invariant
        var what: String
        var level: UInt8
        var change: @Sendable (UInt64) -> UInt64
        var testDescription: String { what }
    }

    static let damages: [Damage] = [
        Damage(invariant: .x18, what: "bit 11 lost", level: 1) { $0 & ~(1 << 11) },
        Damage(invariant: .x19, what: "W without MW", level: 1) { $0 & ~EntryBit.mmuWritable },
        Damage(invariant: .x19, what: "MW without HW", level: 1) { $0 & ~(EntryBit.hostWritable | EntryBit.write) },
        Damage(invariant: .x23, what: "memory type 2", level: 1) { $0 & ~0x38 | 2 << 3 },
        Damage(invariant: .x23, what: "no rights, not tracked", level: 1) { $0 & ~7 },
        Damage(invariant: .x23, what: "a reserved bit in a link", level: 2) { $0 | 1 << 4 },
        Damage(invariant: .x23, what: "a frame beyond memory", level: 1) { $0 | 1 << 45 },
        Damage(invariant: .x23, what: "the page-attribute bit that nobody sets", level: 1) { $0 | 1 << 10 },
        Damage(invariant: .x25, what: "an A/D type of another tree", level: 1) { $0 | 1 << 52 },
        Damage(invariant: .x25, what: "D not to be believed without a reason", level: 1) { $0 | 2 << 52 },
        Damage(invariant: .x26, what: "rights set aside of a leaf that has them", level: 1) { $0 | 1 << 54 },
        Damage(invariant: .x24, what: "#VE not suppressed", level: 1) { $0 & ~(1 << 63) },
        Damage(invariant: .x24, what: "#VE not suppressed in a link", level: 3) { $0 & ~(1 << 63) },
    ]

    @Test(arguments: damages) func `found`(damage: Damage) throws {
        let machine = TDPMachine()
        try machine.slot(count: 4)
        machine.fault(.write, 1)
        #expect(machine.mmu.checkTables() == [])
        let word = machine.word(1, level: damage.level)
        let old = word.load()
        word.store(damage.change(old))
        let found = Set(machine.mmu.checkTables().map(\.invariant))
        #expect(found.contains(damage.invariant))
        // A leaf without bit 11 is no leaf any more, and a link that lost #VE is no proper link: those bring a companion.
        #expect(found.subtracting([damage.invariant, .x36, .x23]).isEmpty)
        word.store(old)
    }

    @Test func `a leaf that is access-tracked twice (X26)`() throws {
        let machine = TDPMachine(mmu: TDPMMU(accessDirty: false))
        try machine.slot(count: 4)
        machine.fault(.write, 1)
        let word = machine.word(1)
        let old = word.load()
        _ = machine.space.clearYoung(at(0)..<at(4))
        #expect(machine.mmu.checkTables() == [])
        word.store(word.load() & ~(1 << 54 | 1 << 56))
        #expect(machine.mmu.checkTables().map(\.invariant) == [.x26])
        word.store(old)
    }

    @Test func `a root with fewer references than holders (X32)`() throws {
        let machine = TDPMachine(cpus: 2)
        machine.mmu.loadRoot(machine.cpus[0])
        #expect(machine.mmu.checkTables() == [])
        machine.cpus[1].root = machine.cpus[0].root
        #expect(machine.mmu.checkTables().map(\.invariant) == [.x32])
        machine.cpus[1].root = nil
    }

    @Test func `a root that is to be emptied and that nobody holds (X34)`() throws {
        let machine = TDPMachine()
        machine.mmu.loadRoot(machine.cpu)
        let root = machine.cpu.root!
        let words = machine.test.host.tableWords(root)
        // Invalid and scheduled: the vCPU's reference and the zapper's.
        machine.test.host.setTableWords(root, words.0 | 1 << 11 | 1 << 32, 2)
        machine.cpu.post(VirtualCPU.Request.reloadRoot)
        #expect(machine.mmu.checkTables() == [])
        machine.test.host.setTableWords(root, words.0 | 1 << 11 | 1 << 32, 1)
        #expect(machine.mmu.checkTables().map(\.invariant) == [.x34])
        machine.test.host.setTableWords(root, words.0, words.1)
    }

    @Test func `a table that is freed while it maps something (X30)`() throws {
        let machine = TDPMachine()
        let table = try #require(machine.test.host.allocateTable(order: 0, fill: EntryBit.empty))
        machine.test.memory.entry(7, of: table).store(0x8600_0000_0000_0b77)
        machine.mmu.removed.append(table)
        machine.mmu.freeRemovedTables()
        #expect(machine.journal.findings.map(\.invariant) == [.x30])
    }

    @Test func `a fault that takes from a leaf what the host allows (X20)`() throws {
        let machine = TDPMachine()
        try machine.slot(count: 4, .read)
        #expect(machine.fault(.read, 1) == .fixed)
        let word = machine.word(1)
        word.store((word.load() | EntryBit.hostWritable | EntryBit.mmuWritable) & ~7)
        #expect(machine.fault(.read, 1, present: true) == .fixed)
        #expect(machine.journal.findings.map(\.invariant) == [.x20])
    }

    @Test func `a vCPU on an obsolete root without a request (X35)`() throws {
        let machine = TDPMachine()
        try machine.slot(count: 4)
        machine.mmu.loadRoot(machine.cpu)
        try machine.set(count: 0, SlotFlags())
        #expect(machine.cpu.hasRequest)
        #expect(machine.mmu.checkTables() == [])
        _ = machine.cpu.take(VirtualCPU.Request.reloadRoot)
        #expect(machine.mmu.checkTables().map(\.invariant) == [.x35])
        machine.mmu.freeObsoleteRoot(machine.cpu)
    }

    @Test func `a frozen entry that can be reached (X28)`() throws {
        let machine = TDPMachine()
        try machine.slot(count: 4)
        machine.fault(.write, 1)
        machine.word(2).store(EntryBit.frozen)
        #expect(machine.mmu.checkTables().map(\.invariant) == [.x28])
        machine.word(2).store(EntryBit.empty)
    }

    @Test func `a table that hangs from two entries (X29)`() throws {
        let machine = TDPMachine()
        try machine.slot(count: 4)
        machine.fault(.write, 1)
        machine.word(512, level: 2).store(machine.word(1, level: 2).load())
        #expect(machine.mmu.checkTables().map(\.invariant) == [.x29])
        machine.word(512, level: 2).store(EntryBit.empty)
    }

    @Test func `a huge leaf that is not aligned (X22)`() throws {
        let machine = TDPMachine(thp: true)
        try machine.slot(count: 512)
        machine.fault(.write, 1)
        let word = machine.word(1, level: 2)
        let old = word.load()
        word.store(old + 0x1000)
        #expect(machine.mmu.checkTables().map(\.invariant) == [.x22])
        word.store(old)
    }

    @Test func `counts that differ from the leaves (X36)`() throws {
        let machine = TDPMachine()
        try machine.slot(count: 4)
        machine.fault(.write, 1)
        machine.statistics.addPages(level: 1, 1)
        #expect(machine.mmu.checkTables().map(\.invariant) == [.x36])
        machine.statistics.addPages(level: 1, -1)
    }

    @Test func `another frame in a present leaf is a finding of the fault that does it (X21)`() throws {
        let machine = TDPMachine()
        try machine.slot(count: 4)
        try machine.space.store(at(1), 5)
        machine.fault(.write, 1)
        let word = machine.word(1)
        // As if the host had changed the page without a word: other frame, no W.
        word.store((word.load() ^ 0x1000) & ~(EntryBit.write | EntryBit.mmuWritable))
        #expect(machine.fault(.write, 1, present: true) == .fixed)
        #expect(machine.journal.findings.map(\.invariant) == [.x21])
    }
}
