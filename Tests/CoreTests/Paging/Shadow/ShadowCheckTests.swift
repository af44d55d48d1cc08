import Audit
import Frames
import HostMemory
import Testing

@testable import GuestMemory
@testable import Machine
@testable import Paging

/// Each rule of the shadow MMU's `checkTables` is found when it is broken on purpose, and nothing else is.
@Suite struct X86_8_ShadowChecks {
    /// A guest that has written page 9 and read its own tables; the lowest, frame 4, is in sync.
    static func guest() throws -> PagedGuest {
        let guest = try PagedGuest()
        try guest.identityMap()
        // Or the prefetch ends with it.
        try guest.space.store(at(0), 1)
        #expect(guest.cpus[0].access(.store(5), at: 0x9000) == .stored)
        #expect(guest.cpus[0].access(.load, at: 0x3000) == .value(0x4000 | 0x27))
        #expect(guest.mmu.checkTables() == [])
        return guest
    }

    static func broken(_ guest: PagedGuest) -> Set<Invariant> { Set(guest.mmu.checkTables().map(\.invariant)) }

    struct Damage: Sendable, CustomTestStringConvertible {
        var invariant: Invariant
        var what: String
        var frame: UInt64 = 4
        var index = 9
        var level: UInt8 = 1
        var others: Set<Invariant> = []
        var change: @Sendable (UInt64) -> UInt64
        var testDescription: String { what }
    }

    static let damages: [Damage] = [
        Damage(invariant: .x18, what: "bit 11 lost", others: [.x36, .x53]) { $0 & ~(1 << 11) },
        Damage(invariant: .x18, what: "an empty entry that is 0", index: 40) { _ in 0 },
        Damage(invariant: .x19, what: "W without MW") { $0 & ~(1 << 10) },
        Damage(invariant: .x19, what: "MW without HW") { $0 & ~(1 << 9 | 2) },
        Damage(invariant: .x23, what: "PWT") { $0 | 1 << 3 },
        Damage(invariant: .x23, what: "a software bit of EPT's") { $0 | 1 << 57 },
        Damage(invariant: .x23, what: "P lost") { $0 & ~1 },
        Damage(invariant: .x23, what: "a frame beyond memory") { $0 | 1 << 45 },
        Damage(invariant: .x23, what: "a link without U", frame: 3, index: 0, level: 2) { $0 & ~4 },
        Damage(invariant: .x48, what: "W of the page directory's frame", index: 3) { $0 | 2 | 1 << 10 | 1 << 9 },
        Damage(invariant: .x48, what: "MW of the lowest table's frame", index: 4) { $0 | 1 << 10 | 1 << 9 },
    ]

    @Test(arguments: damages) func `found in an entry`(damage: Damage) throws {
        let guest = try Self.guest()
        let word = guest.word(damage.frame, damage.index, level: damage.level)
        let old = word.loadRacing()
        word.store(damage.change(old))
        let found = Self.broken(guest)
        #expect(found.contains(damage.invariant) && found.subtracting(damage.others) == [damage.invariant])
        word.store(old)
    }

    @Test func `a huge leaf that is not aligned (X22)`() throws {
        let guest = try PagedGuest(pages: 1024, ramFrames: 4096, thp: true)
        try guest.identityMap()
        try guest.write(3, 1, 0x20_00e7)
        #expect(guest.cpus[0].access(.store(1), at: 0x20_3000) == .stored)
        #expect(guest.entriesSet().map(\.level) == [2])
        let word = guest.word(3, 1, level: 2)
        let old = word.loadRacing()
        word.store(old + 0x1000)
        #expect(guest.mmu.checkTables().map(\.invariant) == [.x22])
        word.store(old)
    }

    @Test func `a huge leaf that lies beyond its slot (X38)`() throws {
        let guest = try PagedGuest(pages: 600)
        try guest.identityMap()
        #expect(guest.cpus[0].access(.store(5), at: 0x9000) == .stored)
        let page = guest.page(3, level: 2)!
        page.setTranslation(5, GuestFrame(512), .all)
        let word = guest.word(3, 5, level: 2)
        word.store(0x825 | 1 << 7)
        #expect(Self.broken(guest) == [.x36, .x38, .x53])
        word.store(EntryBits.empty)
    }

    @Test func `a writable leaf of a logged slot that is huge (X39), or not in the log (X44)`() throws {
        let guest = try PagedGuest(pages: 1024, ramFrames: 4096, thp: true)
        try guest.identityMap()
        try guest.write(3, 1, 0x20_00e7)
        let cpu = guest.cpus[0]
        #expect(cpu.access(.store(1), at: 0x20_3000) == .stored)
        try guest.setSlot(log: true)
        #expect(cpu.access(.store(1), at: 0x9000) == .stored)
        #expect(guest.mmu.checkTables() == [])
        let huge = guest.word(3, 1, level: 2)
        huge.store(huge.loadRacing() | 2)
        #expect(Self.broken(guest) == [.x39, .x44])
        huge.store(huge.loadRacing() & ~2)
        #expect(try guest.vm.getDirtyLog(slot: 0)[0] & 1 << 9 != 0)
        let small = guest.word(4, 9)
        #expect(guest.mmu.checkTables() == [])
        small.store(small.loadRacing() | 2)
        #expect(Self.broken(guest) == [.x44])
        small.store(small.loadRacing() & ~2)
    }

    @Test func `a translation that a vCPU keeps though its entry is gone (X11) or not writable any more (I-13)`() throws
    {
        let guest = try Self.guest()
        let cpu = guest.cpus[0]
        #expect(cpu.access(.store(5), at: 0x9000) == .stored)
        #expect(cpu.checkTranslations() == [])
        let word = guest.word(4, 9)
        let old = word.loadRacing()
        word.store(old & ~2)
        #expect(cpu.checkTranslations().map(\.invariant) == [.i13])
        word.store(old ^ 1 << 12)
        #expect(cpu.checkTranslations().map(\.invariant) == [.x11])
        word.store(EntryBits.empty)
        #expect(cpu.checkTranslations().map(\.invariant) == [.x11])
        word.store(old)
        // A flush that is posted takes it away before the guest runs.
        try guest.space.advise(pages(9..<10), .dontNeed)
        #expect(cpu.checkTranslations() == [])
    }

    @Test func `a page count that differs from the leaves (X36)`() throws {
        let guest = try Self.guest()
        for level in [UInt8(1), 2, 3] {
            guest.vm.statistics.addPages(level: level, 1)
            #expect(guest.mmu.checkTables().map(\.invariant) == [.x36])
            guest.vm.statistics.addPages(level: level, -1)
        }
    }

    @Test func `a reason against huge pages too many, a table that is not tracked, a frame that is no table (X41)`()
        throws
    {
        let guest = try Self.guest()
        let slot = guest.vm.activeSlots[0]
        slot.largePages!.add(1, at: GuestFrame(9))
        #expect(Self.broken(guest) == [.x41])
        slot.largePages!.add(-1, at: GuestFrame(9))
        let map = guest.mmu.reverseMap(slot)
        map.add(-1, GuestFrame(3))
        #expect(Self.broken(guest) == [.x41])
        map.add(1, GuestFrame(9))
        #expect(Self.broken(guest) == [.x41])
        map.add(-1, GuestFrame(9))
        map.add(1, GuestFrame(3))
    }

    @Test func `a page of a higher level, or a direct one, that is unsync (X49)`() throws {
        let guest = try Self.guest()
        guest.page(3, level: 2)!.isUnsync = true
        #expect(Self.broken(guest) == [.x49, .x50])
        guest.page(3, level: 2)!.isUnsync = false
    }

    @Test func `an unsync page whose parents are not marked, at each level (X50)`() throws {
        let guest = try Self.guest()
        #expect(guest.cpus[0].access(.store(0x67), at: 0x4000) == .stored)
        #expect(guest.page(4)!.isUnsync)
        #expect(guest.mmu.checkTables() == [])
        for (frame, level) in [(UInt64(3), UInt8(2)), (2, 3), (1, 4)] {
            let page = guest.page(frame, level: level)!
            page.clearUnsyncChild(0)
            #expect(Self.broken(guest) == [.x50])
            #expect(page.setUnsyncChild(0))
        }
    }

    @Test func `two pages of one table and role (X52)`() throws {
        let guest = try Self.guest()
        let first = guest.page(4)!
        let table = guest.vm.host.allocateTable(order: 0, fill: EntryBits.empty)!
        let twin = ShadowPage(first.frame, first.role, table: table, generation: first.generation)
        guest.mmu.index.add(twin)
        #expect(Self.broken(guest) == [.x52, .x55, .x61, .x41])
        guest.mmu.index.remove(twin)
        guest.vm.host.freeTable(table)
    }

    @Test func `a reverse map without a leaf, with one too many, and parents likewise (X53)`() throws {
        let guest = try Self.guest()
        let map = guest.mmu.reverseMap(guest.vm.activeSlots[0])
        let page = guest.page(4)!
        #expect(map.remove(page.place(of: 9), GuestFrame(9), .page4K))
        #expect(Self.broken(guest) == [.x53])
        _ = map.add(page.place(of: 9), GuestFrame(10), .page4K)
        #expect(Self.broken(guest) == [.x53])
        _ = map.add(page.place(of: 9), GuestFrame(9), .page4K)
        #expect(Self.broken(guest) == [.x53])
        #expect(map.remove(page.place(of: 9), GuestFrame(10), .page4K))
        #expect(guest.mmu.checkTables() == [])

        let parent = page.parents[0]
        page.removeParent(parent)
        #expect(Self.broken(guest) == [.x53])
        page.addParent(parent + 8)
        #expect(Self.broken(guest) == [.x53])
        page.removeParent(parent + 8)
        page.addParent(parent)
        page.addParent(parent)
        #expect(Self.broken(guest) == [.x53])
        page.removeParent(parent)
    }

    @Test func `counts of pages (X55, X61)`() throws {
        let guest = try Self.guest()
        guest.mmu.indirectPages += 1
        #expect(Self.broken(guest) == [.x55])
        guest.mmu.indirectPages -= 1
        guest.mmu.usedPages += 1
        #expect(Self.broken(guest) == [.x61])
        guest.mmu.usedPages += 100
        #expect(guest.mmu.checkTables().map(\.invariant) == [.x61, .x61], "beyond the limit too")
        guest.mmu.usedPages -= 101
        // A zapped page that nobody has as root.
        let page = guest.page(4)!
        page.role.isInvalid = true
        #expect(Self.broken(guest).contains(.x61))
        page.role.isInvalid = false
    }

    @Test func `a page of the other generation that was not zapped (X62)`() throws {
        let guest = try Self.guest()
        guest.mmu.generation ^= 1
        #expect(Self.broken(guest) == [.x62])
        guest.mmu.generation ^= 1
    }
}
