import Audit
import Frames
import HostMemory
import Synchrony
import Testing

@testable import GuestMemory
@testable import Machine
@testable import Paging

/// Rules of nested guests' tables are found when they are broken on purpose, and nothing else is.
@Suite struct X86_8_NestedChecks {
    private struct Damage {
        var invariant: Invariant
        var others: Set<Invariant> = []
        var change: (UInt64) -> UInt64
    }

    private func found(_ guest: NestedGuest) -> Set<Invariant> { Set(guest.mmu.checkTables().map(\.invariant)) }

    @Test func `damage to a leaf`() throws {
        let guest = try NestedGuest()
        try guest.makeTables()
        try guest.enter()
        #expect(guest.cpu.access(.store(7), at: 0x2000) == .stored)
        let word = guest.vm.memory.entry(2, of: try #require(guest.shadowPage(4)).table)
        let good = word.load()
        let damages = [
            Damage(invariant: .x18, others: [.x36, .x53]) { $0 & ~EntryBits.mmuPresent },
            Damage(invariant: .x19) { $0 & ~guest.mmu.bits.mmuWritable },
            Damage(invariant: .x23) { $0 | 1 << 45 },
            Damage(invariant: .x23) { $0 & ~(1 << 63) },
            Damage(invariant: .x23) { $0 & ~1 },
            Damage(invariant: .x25) { $0 | EntryBits.adDisabled },
            Damage(invariant: .x25) { $0 | EntryBits.writeProtectOnly },
            Damage(invariant: .x26) { $0 | EntryBits.savedRead },
        ]
        for damage in damages {
            word.initialize(to: damage.change(good))
            #expect(found(guest) == damage.others.union([damage.invariant]), "\(damage.invariant)")
        }
        word.initialize(to: good)
    }

    @Test func `a leaf whose rights are set aside has some to give back`() throws {
        let guest = try NestedGuest()
        try guest.makeTables()
        try guest.enter(NestedGuest.pointerWithoutAD)
        #expect(guest.cpu.access(.store(7), at: 0x2000) == .stored)
        #expect(guest.isYoung(18, clearing: true))
        let word = guest.vm.memory.entry(2, of: try #require(guest.shadowPage(4)).table)
        let good = word.load()
        for bad in [good & ~(EntryBits.savedRead | EntryBits.savedExecute), good | guest.mmu.bits.accessed] {
            word.initialize(to: bad)
            #expect(found(guest) == [.x26])
        }
        word.initialize(to: good)
    }

    @Test func `a huge leaf is not executable where none is`() throws {
        let guest = try NestedGuest(pages: 1024, ramFrames: 4096, thp: true) { $0.nxHugePages = true }
        try guest.makeTables(count: 0)
        try guest.write(3, 0, 0x20_0000 | NestedGuest.page | 1 << 7)
        try guest.enter()
        #expect(guest.cpu.access(.store(7), at: 0x5000) == .stored)
        let word = guest.vm.memory.entry(0, of: try #require(guest.shadowPage(3, level: 2)).table)
        let good = word.load()
        word.initialize(to: good | guest.mmu.bits.execute)
        #expect(found(guest) == [.x40])
        word.initialize(to: good)
    }

    @Test(arguments: [2, 4])
    func `the hypervisor can't write a table that is shadowed and in sync`(_ frame: Int) throws {
        let guest = try NestedGuest()
        try guest.makeTables()
        #expect(guest.cpu.access(.load, at: UInt64(frame) << 12) == .value(try guest.entry(frame, 0)))
        try guest.enter()
        #expect(guest.cpu.access(.load, at: 0x2000) == .value(0))
        guest.mmu.leaveNested(guest.cpu)
        _ = guest.cpu.access(.load, at: UInt64(frame) << 12)
        let root = guest.mmu.rootPointer(for: guest.cpu) & EntryBits.frameMask
        var table = root
        for _ in 0..<3 { table = guest.vm.memory.word(at: table).load() & EntryBits.frameMask }
        let word = guest.vm.memory.word(at: table + UInt64(frame) * 8)
        let good = word.load()
        word.initialize(to: good | EntryBits.write | guest.mmu.bits.mmuWritable | guest.mmu.bits.hostWritable)
        #expect(found(guest) == [.x48])
        word.initialize(to: good)
    }

    @Test func `the sums are those of both kinds of tables`() throws {
        let guest = try NestedGuest()
        try guest.makeTables()
        try guest.enter()
        #expect(guest.cpu.access(.store(7), at: 0x2000) == .stored)
        guest.vm.statistics.addPages(level: 1, 1)
        #expect(found(guest) == [.x36])
        guest.vm.statistics.addPages(level: 1, -1)
        let counts = try #require(guest.vm.activeSlots[0].largePages)
        counts.add(1, at: GuestFrame(4))
        #expect(found(guest) == [.x41])
        counts.add(-1, at: GuestFrame(4))
    }
}
