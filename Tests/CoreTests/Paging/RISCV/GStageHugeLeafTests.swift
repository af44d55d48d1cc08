import Audit
import Frames
import GuestMemory
import HostMemory
import Paging
import Synchrony
import Testing

/// The last table on the way to test guest frame `n` in Sv39x4, walked by hand.
func rawTable(_ guest: RISCVGuest, _ n: UInt64) throws -> HostFrame {
    let frame = RISCVGuest.frame(n).number
    let top = guest.memory.entry(Int(frame >> 18), of: try #require(guest.mmu.root)).load()
    try #require(top & 0xf == 1)
    let middle = guest.memory.entry(Int(frame >> 9 & 511), of: HostFrame(top >> 10)).load()
    try #require(middle & 0xf == 1)
    return HostFrame(middle >> 10)
}

/// The 4 KiB leaf of test guest frame `n`.
func rawLeaf(_ guest: RISCVGuest, _ n: UInt64) throws -> AtomicWord {
    guest.memory.entry(Int(RISCVGuest.frame(n).number & 511), of: try rawTable(guest, n))
}

@Suite struct RV2_HugeLeaves {
    @Test func `a huge page of the host is one leaf, aligned, from any page of it`() throws {
        for n in [UInt64(0), 1, 255, 511] {
            let guest = RISCVGuest()
            try guest.anonymous(count: 512, huge: true)
            #expect(guest.fault(n, .write) == .fixed)
            #expect(guest.leaves.map(\.level) == [.page2M])
            #expect(guest.leaf(0)?.frame == guest.hostFrame(0))
            #expect(guest.fault(511 - n, .write) == .spurious)
            guest.expectSound()
            guest.end()
        }
    }

    @Test func `the baseline's switch keeps every leaf small`() throws {
        let guest = RISCVGuest(hugePages: false)
        try guest.anonymous(count: 512, huge: true)
        guest.fault(3, .write)
        #expect(guest.leaves.map(\.level) == [.page4K])
        guest.expectSound()
        guest.end()
    }

    @Test func `a slot that is not congruent, or ends within, has small leaves`() throws {
        let shifted = RISCVGuest()
        try shifted.space.mapPages(0, 1024)
        try shifted.space.advise(at(0)..<at(1024), .hugePage)
        try shifted.slot(0, 0, page: 1, count: 1023)
        shifted.fault(20, .write)
        #expect(shifted.leaves.map(\.level) == [.page4K])
        shifted.expectSound()

        let short = RISCVGuest()
        try short.space.mapPages(0, 512)
        try short.space.advise(at(0)..<at(512), .hugePage)
        try short.slot(0, 0, count: 511)
        short.fault(20, .write)
        #expect(short.leaves.map(\.level) == [.page4K])
        short.expectSound()
    }

    @Test func `a misaligned huge leaf is found`() throws {
        let guest = RISCVGuest()
        try guest.anonymous(count: 512, huge: true)
        guest.fault(0, .write)
        let frame = RISCVGuest.frame(0).number
        let top = guest.memory.entry(Int(frame >> 18), of: try #require(guest.mmu.root)).load()
        let entry = guest.memory.entry(Int(frame >> 9 & 511), of: HostFrame(top >> 10))
        let good = entry.load()
        entry.store(good + 1 << 10)
        #expect(guest.mmu.checkTables().map(\.invariant) == [.rv2])
        entry.store(good)
        guest.expectSound()
    }

    @Test func `a logged write splits the huge leaf and makes one page writable`() throws {
        let guest = RISCVGuest()
        try guest.anonymous(count: 512, huge: true)
        guest.fault(0, .write)
        let first = try #require(guest.leaf(0)).frame
        try guest.slot(0, 0, count: 512, log: true)
        #expect(guest.leaves.map(\.level) == [.page2M] && guest.leaves.allSatisfy { !$0.writable })
        #expect(guest.fault(100, .read) == .spurious, "a read needs no split")
        #expect(guest.fault(100, .write) == .fixed)
        #expect(guest.leaves.count == 512)
        for (n, leaf) in guest.leaves.enumerated() {
            #expect(leaf.frame.number == first.number + UInt64(n) && leaf.writable == (n == 100) && leaf.dirty)
        }
        let log = try guest.vm.getDirtyLog(slot: 0)
        #expect(log == [0, 1 << 36, 0, 0, 0, 0, 0, 0])
        guest.expectSound()
        guest.end()
    }

    @Test func `by quirk the write fails with EEXIST instead`() throws {
        let guest = RISCVGuest(quirks: GStageQuirks(existingLeafFails: true))
        try guest.anonymous(count: 512, huge: true)
        guest.fault(0, .write)
        try guest.slot(0, 0, count: 512, log: true)
        #expect(guest.fault(100, .write) == .failed(.EEXIST))
        #expect(guest.leaves.map(\.level) == [.page2M])
        guest.expectSound()
        guest.end()
    }

    /// A huge leaf that is still writable under an initially set bitmap: clearing one page's bit must catch the next
    /// write to that page, though the leaf reaches beyond the mask.
    @Test func `clearing one page of a writable huge leaf takes its W`() throws {
        let guest = RISCVGuest()
        var manual = ManualProtect()
        manual.enabled = true
        manual.initiallySet = true
        try guest.vm.setManualProtect(manual)
        try guest.anonymous(count: 512, huge: true)
        guest.fault(0, .write)
        try guest.slot(0, 0, count: 512, log: true)
        #expect(guest.leaf(0)?.writable == true, "everything is in the log already")
        #expect(guest.mmu.checkTables() == [])
        try guest.vm.clearDirtyLog(slot: 0, firstPage: 128, pages: 64, bitmap: [1 << 5])
        #expect(guest.mmu.checkTables() == [])
        #expect(guest.walk(133, .write).violation?.reason == .rights)
        #expect(guest.fault(133, .write) == .fixed)
        #expect(try guest.vm.getDirtyLog(slot: 0)[2] == ~0)
        guest.expectSound()
        guest.end()
    }

    /// Small leaves from a time of logging; then a hole in them, and the fault of the hole may map all.
    @Test func `a huge leaf takes the place of a table, which is freed`() throws {
        let guest = RISCVGuest()
        try guest.anonymous(count: 512, huge: true, log: true)
        for n in [UInt64(1), 2, 3] { guest.fault(n, .write) }
        #expect(guest.leaves.map(\.level) == [.page4K, .page4K, .page4K])
        try guest.slot(0, 0, count: 512)
        #expect(guest.fault(2, .write) == .spurious, "what serves the access stays")
        let free = guest.memory.freeFrames
        #expect(guest.fault(9, .write) == .fixed)
        #expect(guest.leaves.map(\.level) == [.page2M])
        #expect(guest.memory.freeFrames == free + 1)
        let events = guest.host.journal.events
        let removed = try #require(events.lastIndex { $0.kind == .tableRemoved })
        let freed = try #require(events.lastIndex { $0.kind == .pageFreed })
        #expect(events[removed..<freed].contains { $0.kind == .flush }, "no hart may still walk the freed table")
        guest.expectSound()
        guest.end()
    }

    @Test func `one page of a huge leaf invalidated takes the whole leaf`() throws {
        let guest = RISCVGuest()
        try guest.anonymous(count: 512, huge: true)
        guest.fault(0, .write)
        try guest.space.advise(at(17)..<at(18), .dontNeed)
        #expect(guest.leaves.isEmpty)
        #expect(guest.fault(16, .write) == .fixed)
        #expect(guest.fault(17, .write) == .fixed)
        #expect(guest.leaves.allSatisfy { $0.level == .page4K })
        guest.expectSound()
        guest.end()
    }
}

@Suite struct RV1_Ageing {
    @Test func `ageing clears A alone, and harts that don't set it fault once`() throws {
        for huge in [false, true] {
            let guest = RISCVGuest()
            try guest.anonymous(count: 512, huge: huge)
            guest.fault(1, .write)
            #expect(guest.age(0..<512))
            #expect(!guest.age(0..<512))
            #expect(guest.leaf(1).map { $0.entry & 0xff } == 0x9f)
            #expect(guest.walk(1, .read, svadu: false).violation?.reason == .accessedDirty)
            #expect(guest.fault(1, .read) == .fixed)
            #expect(guest.leaf(1).map { $0.entry & 0xff } == 0xdf)
            #expect(guest.walk(1, .write, svadu: false).translation != nil)
            #expect(guest.age(1..<2))
            #expect(guest.walk(1, .read, svadu: true).translation != nil)
            #expect(guest.leaf(1)?.accessed == true, "a hart with Svadu sets it")
            guest.expectSound()
            guest.end()
        }
    }

    @Test func `ageing looks at the range only`() throws {
        let guest = RISCVGuest()
        try guest.anonymous(count: 4)
        for n in 0..<4 { guest.fault(UInt64(n), .write) }
        #expect(guest.age(1..<3))
        #expect(guest.leaves.map(\.accessed) == [true, false, false, true])
    }
}
