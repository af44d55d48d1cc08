import Audit
import Frames
import HostMemory
import Synchronization
import Synchrony
import Testing

@testable import GuestMemory
@testable import Machine
@testable import Paging

/// Each rule of direct tables, broken behind the core's back, is found.
@Suite struct X86_2_5_DirectShadowChecks {
    private func machine(_ change: (inout TDPConfiguration) -> Void = { _ in }) throws -> DirectGuest {
        let direct = DirectGuest(thp: true, change)
        // The first 2 MiB are not whole, and so mapped small.
        try direct.guest.addMemory(1, 1023)
        #expect(direct.guest.store(5, 1) == .stored)
        #expect(direct.guest.store(700, 1) == .stored)
        #expect(direct.findings == [])
        return direct
    }

    /// What the checks find while a word is another.
    private func findings(_ direct: DirectGuest, _ word: AtomicWord, _ change: (UInt64) -> UInt64) -> Set<Invariant> {
        let old = word.peek()
        word.store(change(old))
        defer { word.store(old) }
        return Set(direct.findings)
    }

    @Test func `bits that an entry may not have`() throws {
        let direct = try machine()
        let (small, huge) = (direct.word(5), direct.word(700, level: 2))
        #expect(findings(direct, small) { $0 & ~(1 << 63) } == [.x23])
        #expect(findings(direct, small) { $0 & ~(1 << 57) } == [.x19])
        #expect(findings(direct, small) { $0 | 1 << 52 } == [.x25])
        #expect(findings(direct, small) { $0 | 1 << 60 } == [.x23])
        #expect(findings(direct, huge) { $0 | 1 << 12 } == [.x22, .x23])
    }

    @Test func `an MMIO entry of now in a slot, and one for another frame`() throws {
        let direct = try machine()
        let now = direct.vm.slotsGeneration(of: 0)
        let bits = direct.mmu.bits
        // The entry after the last that is in use: of a page in the slot, and mapped by nothing.
        let free = direct.word(64)
        #expect(findings(direct, free) { _ in bits.mmioEntry(gfn(64), generation: now, .all) } == [.x27])
        #expect(findings(direct, free) { _ in bits.mmioEntry(gfn(64), generation: now + 2, .all) } == [])
        #expect(findings(direct, free) { _ in bits.mmioEntry(gfn(65), generation: now + 2, .all) } == [.x27])
        let without = try machine { $0.cachesMMIO = false }
        #expect(findings(without, without.word(64)) { _ in bits.mmioEntry(gfn(64), generation: 0, .all) } == [.x18])
    }

    @Test func `a vCPU on an obsolete root that nobody asked to leave it`() throws {
        let direct = try machine()
        try direct.guest.deleteSlot()
        #expect(direct.findings == [])
        let asked = direct.cpu.requests.exchange(0, ordering: .sequentiallyConsistent)
        #expect(direct.findings == [.x35])
        direct.cpu.requests.store(asked, ordering: .sequentiallyConsistent)
    }

    @Test func `a huge leaf that is executable, and a list that is not as long as its count`() throws {
        let direct = try machine { $0.nxHugePages = true }
        #expect(findings(direct, direct.word(700, level: 2)) { $0 | 1 << 2 } == [.x40])
        #expect(direct.fault(.execute, 700, present: true) == .fixed)
        direct.statistics.nx_lpage_splits.add(1, ordering: .relaxed)
        #expect(direct.findings == [.x42])
        direct.statistics.nx_lpage_splits.subtract(1, ordering: .relaxed)
        let table = direct.mmu.possibleHugePages.list[0].table
        var pages: [ShadowPage] = []
        direct.mmu.index.forEachPage { if $0.table == table { pages.append($0) } }
        let page = try #require(pages.first)
        page.isHugePageDisallowed = false
        #expect(direct.findings == [.x42])
        page.isHugePageDisallowed = true
    }

    @Test func `a leaf that no reverse map has, and one too many pages`() throws {
        let direct = try machine()
        let slot = direct.vm.activeSlots[0]
        let place = direct.mmu.reverseMap(slot).entries(gfn(5), .page4K)[0]
        #expect(direct.mmu.reverseMap(slot).remove(place, gfn(5), .page4K))
        #expect(Set(direct.findings) == [.x53])
        _ = direct.mmu.reverseMap(slot).add(place, gfn(5), .page4K)
        direct.mmu.usedPages += 1
        #expect(direct.findings == [.x61])
        direct.mmu.usedPages -= 1
    }
}
