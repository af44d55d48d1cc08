import Audit
import Frames
import GuestMemory
import HostMemory
import Paging
import Testing

@Suite struct RV4_LoggingByW {
    /// The bitmap of slot 0, taken in legacy mode.
    private func harvest(_ guest: RISCVGuest) throws -> [UInt64] { try guest.vm.getDirtyLog(slot: 0) }

    @Test func `T7: protected by DB, logged before the store makes it DF`() throws {
        let guest = RISCVGuest()
        try guest.anonymous(count: 4)
        for n in 0..<4 { guest.fault(UInt64(n), .write) }
        try guest.slot(0, 0, count: 4, log: true)
        #expect(guest.leaves.allSatisfy { $0.entry & 0xff == 0xdb })
        #expect(guest.walk(2, .write).violation?.reason == .rights)
        #expect(guest.fault(2, .read) == .spurious, "a read finds what it needs")
        #expect(guest.fault(2, .write) == .fixed)
        #expect(guest.leaf(2).map { $0.entry & 0xff } == 0xdf)
        let events = guest.host.journal.events
        let logged = try #require(events.lastIndex { $0.kind == .dirtyLogged })
        let stored = try #require(events.lastIndex { $0.kind == .entryChanged })
        #expect(logged < stored)
        #expect(try harvest(guest) == [0b100])
        #expect(guest.leaf(2)?.writable == false, "taking the bit protects the page again")
        #expect(try harvest(guest) == [0])
        guest.expectSound()
        guest.end()
    }

    @Test func `under logging only a write gets W`() throws {
        let guest = RISCVGuest()
        try guest.anonymous(count: 2, log: true)
        try guest.space.store(at(0), 1)
        try guest.space.store(at(1), 1)
        #expect(guest.fault(0, .read) == .fixed)
        #expect(guest.fault(1, .execute) == .fixed)
        #expect(guest.leaves.allSatisfy { !$0.writable })
        #expect(try harvest(guest) == [0])
        #expect(guest.fault(0, .write) == .fixed)
        #expect(try harvest(guest) == [1])
        guest.expectSound()
    }

    /// R5: the read of a sibling takes nothing away from what a write made, and the log knows the write.
    @Test func `a read after a sibling's write keeps W`() throws {
        let guest = RISCVGuest(cpus: 2)
        try guest.anonymous(count: 1, log: true)
        #expect(guest.fault(0, .write, on: 0) == .fixed)
        #expect(guest.fault(0, .read, on: 1) == .spurious)
        #expect(guest.leaf(0)?.writable == true)
        #expect(try harvest(guest) == [1])
    }

    /// Every mask over a few pages: exactly its pages lose W.
    @Test func `clearing protects exactly the pages of the mask`() throws {
        let guest = RISCVGuest()
        let count = 70
        var manual = ManualProtect()
        manual.enabled = true
        try guest.vm.setManualProtect(manual)
        try guest.anonymous(count: count, log: true)
        for choice in UInt64(0)..<64 {
            // Bits 0 to 2, 30, 31 and 63.
            let mask = choice & 7 | (choice >> 3 & 3) << 30 | (choice >> 5) << 63
            for n in 0..<count { guest.fault(UInt64(n), .write) }
            let live = try harvest(guest)
            #expect(live == [~0, 0x3f])
            try guest.vm.clearDirtyLog(slot: 0, firstPage: 0, pages: 64, bitmap: [mask])
            for leaf in guest.leaves {
                let n = leaf.guestFrame.number - RISCVGuest.base
                #expect(leaf.writable == (n >= 64 || mask >> n & 1 == 0))
                #expect(leaf.dirty)
            }
            #expect(guest.mmu.checkTables() == [])
        }
        guest.expectSound()
        guest.end()
    }

    @Test func `a read-only slot with logging stays as it is`() throws {
        let guest = RISCVGuest()
        try guest.anonymous(count: 512, huge: true, log: true, readOnly: true)
        try guest.space.store(at(0), 1)
        #expect(guest.fault(0, .read) == .fixed)
        #expect(guest.leaves.map(\.level) == [.page2M], "nothing is logged there, so a huge leaf does")
        #expect(guest.leaves.allSatisfy { !$0.writable })
        guest.expectSound()
        guest.end()
    }

    @Test func `logging that ends leaves the leaves`() throws {
        let guest = RISCVGuest()
        try guest.anonymous(count: 2, log: true)
        guest.fault(0, .write)
        try guest.slot(0, 0, count: 2)
        #expect(guest.leaves.count == 1)
        #expect(guest.fault(1, .read) == .fixed)
        guest.expectSound()
        guest.end()
    }

    @Test func `a checker sees W without its log bit, and a lost D`() throws {
        let guest = RISCVGuest()
        try guest.anonymous(count: 1, log: true)
        guest.fault(0, .read)
        let entry = try rawLeaf(guest, 0)
        let good = entry.load()
        entry.store(good | 4)
        #expect(guest.mmu.checkTables().contains { $0.invariant == .rv4 })
        entry.store(good & ~0x80)
        #expect(guest.mmu.checkTables().contains { $0.invariant == .rv4 })
        entry.store(good)
        #expect(guest.mmu.checkTables() == [])
    }
}

@Suite struct RV1_LeafBits {
    /// Each bit of a good leaf, flipped: found by exactly the rule it breaks. A may age, and W is the log's.
    @Test func `every wrong bit is found`() throws {
        let guest = RISCVGuest()
        try guest.anonymous(count: 1)
        guest.fault(0, .write)
        let entry = try rawLeaf(guest, 0)
        let good = entry.load()
        for bit in 0..<64 where !(10..<54).contains(bit) {
            entry.store(good ^ 1 << UInt64(bit))
            let found = guest.mmu.checkTables().map(\.invariant)
            switch bit {
            case 2, 6: #expect(found == [])
            case 7: #expect(found == [.rv4])
            default: #expect(found == [.rv1], "bit \(bit)")
            }
        }
        // Without any right it is a link, and there is no table below the last level.
        entry.store(good & ~0xe)
        #expect(guest.mmu.checkTables().map(\.invariant) == [.rv1])
        entry.store(good)
        guest.expectSound()
    }
}

@Suite struct RV3_WithinTheSlots {
    @Test func `a leaf outside of every slot is found`() throws {
        let guest = RISCVGuest()
        try guest.anonymous(count: 1)
        guest.fault(0, .write)
        let entry = try rawLeaf(guest, 0)
        let table = try rawTable(guest, 0)
        guest.memory.entry(7, of: table).store(entry.load())
        #expect(guest.mmu.checkTables().map(\.invariant) == [.rv3])
        guest.memory.entry(7, of: table).store(0)
        #expect(guest.mmu.checkTables() == [])
    }
}
