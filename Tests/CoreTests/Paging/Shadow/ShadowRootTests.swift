import Audit
import Frames
import HostMemory
import Testing

@testable import GuestMemory
@testable import Machine
@testable import Paging

/// x86 4.4 and 4.9: roots, the quota, long chains.
@Suite struct X4_4_Roots {
    /// Frame `root` becomes a root like frame 1.
    static func addRoot(_ guest: PagedGuest, _ root: Int) throws {
        try guest.write(root, 0, 0x2000 | PagedGuest.table)
    }

    static func load(_ guest: PagedGuest, _ root: Int, _ cpu: Int = 0) {
        guest.mmu.load(.longMode(root: GuestAddress(UInt64(root) << 12)), on: guest.cpus[cpu])
    }

    static func made(_ guest: PagedGuest) -> Int {
        guest.test.events(.shadowPageTaken).filter { $0.extra >> 33 & 1 == 1 }.count
    }

    @Test func `the current root and three earlier ones are kept, in the order of their last use`() throws {
        let guest = try PagedGuest()
        try guest.identityMap()
        let roots = [30, 31, 32, 33, 34]
        for root in roots { try Self.addRoot(guest, root) }
        func use(_ root: Int) -> Int {
            Self.load(guest, root)
            let before = guest.test.events(.shadowPageTaken).count
            #expect(guest.cpus[0].access(.load, at: 0x9000) == .value(0))
            return guest.test.events(.shadowPageTaken).count - before
        }
        _ = use(30)
        for root in [31, 32, 33] { #expect(use(root) > 0) }
        // All four are there: none is looked up again.
        for root in [30, 31, 32, 33, 32, 30] { #expect(use(root) == 0, "root \(root)") }
        // A fifth takes the place of the least recently used.
        #expect(use(34) > 0)
        #expect(use(30) == 0 && use(32) == 0 && use(33) == 0)
        #expect(use(31) > 0, "its page is there, but nobody's root")
        #expect(guest.page(31, level: 4)!.rootCount == 1)
        #expect(guest.mmu.checkTables() == [])
    }

    @Test func `loading CR3 flushes: an earlier root is in sync when it comes back (X51)`() throws {
        let guest = try PagedGuest()
        try guest.identityMap()
        try Self.addRoot(guest, 30)
        for page in 20..<22 { try guest.space.store(at(page), UInt64(page)) }
        let cpu = guest.cpus[0]
        #expect(cpu.access(.load, at: 20 << 12) == .value(20))
        #expect(cpu.access(.store(21 << 12 | PagedGuest.page), at: 0x4000 + 20 * 8) == .stored)
        #expect(cpu.access(.load, at: 20 << 12) == .value(20))
        Self.load(guest, 30)
        Self.load(guest, 1)
        #expect(cpu.access(.load, at: 20 << 12) == .value(21))
    }

    @Test func `two vCPUs with one CR3 have one root, which lives until both have left it`() throws {
        let guest = try PagedGuest(cpus: 2)
        try guest.identityMap()
        for cpu in guest.cpus { #expect(cpu.access(.store(1), at: 0x9000) == .stored) }
        #expect(Self.made(guest) == 4)
        #expect(guest.page(1, level: 4)!.rootCount == 2)
        #expect(guest.mmu.unprotect(GuestFrame(1)))
        #expect(guest.page(1, level: 4) == nil)
        #expect(guest.mmu.checkTables() == [], "zapped, but still two vCPUs'")
        let zapped = { guest.test.events(.shadowPageZapped).filter { $0.guest == 1 }.count }
        #expect(zapped() == 1)
        #expect(guest.cpus[0].access(.load, at: 0x9000) == .value(1))
        #expect(guest.mmu.checkTables() == [])
        #expect(zapped() == 1)
        #expect(guest.cpus[1].access(.load, at: 0x9000) == .value(1))
        #expect(zapped() == 2)
        #expect(guest.page(1, level: 4)!.rootCount == 2)
    }

    @Test func `where CR3 shows no memory every access faults, until there is some (X65)`() throws {
        let guest = try PagedGuest()
        try guest.identityMap()
        let cpu = guest.cpus[0]
        Self.load(guest, 100)
        #expect(cpu.access(.load, at: 0x9000) == .pageFault(GuestPageFault(address: 0x9000, code: .user)))
        #expect(
            cpu.access(.store(1), at: 0x9000) == .pageFault(GuestPageFault(address: 0x9000, code: [.user, .write])))
        try guest.space.map(at: at(100), length: 4 * pageSize, protection: .readWrite, backing: .anonymous)
        try guest.write(100, 0, 0x2000 | PagedGuest.table)
        try guest.vm.setMemoryRegion(
            MemoryRegion(
                slot: 1, guestAddress: GuestAddress(100 << 12), size: 4 * pageSize, userAddress: at(100)))
        #expect(cpu.access(.store(1), at: 0x9000) == .stored)
        try guest.vm.setMemoryRegion(
            MemoryRegion(slot: 1, guestAddress: GuestAddress(100 << 12), size: 0, userAddress: at(100)))
        #expect(cpu.access(.load, at: 0x9000) == .pageFault(GuestPageFault(address: 0x9000, code: .user)))
    }

    @Test func `a guest without paging has direct pages under four roots`() throws {
        let guest = try PagedGuest(pages: 1024, ramFrames: 4096, thp: true)
        let cpu = guest.cpus[0]
        #expect(cpu.access(.store(7), at: 0x9000) == .stored)
        #expect(cpu.access(.load, at: 0x9000) == .value(7))
        #expect(guest.entriesSet().map(\.level) == [2], "a huge leaf where the host has one")
        let roots = guest.test.events(.shadowPageTaken).map { PageRole(rawValue: UInt32($0.value)) }
        #expect(roots.count == 4 && roots.allSatisfy { $0.isDirect && $0.level == 2 && $0.quadrant == 0 })
        #expect(guest.test.events(.shadowPageTaken).map(\.guest) == [0, 1 << 18, 2 << 18, 3 << 18])
        #expect(guest.mmu.indirectPages == 0)
        #expect(guest.mmu.checkTables() == [])
        // Paging is turned on: nothing of those tables is used any more.
        try guest.identityMap()
        #expect(cpu.access(.load, at: 0x9000) == .value(7))
        #expect(guest.page(1, level: 4)!.rootCount == 1)
    }

    @Test func `with few pages allowed the oldest that is no root goes (X61)`() throws {
        let guest = try PagedGuest(pages: 512, ramFrames: 2048)
        try guest.identityMap()
        guest.mmu.pageLimit = 16
        for i in 1..<100 {
            // 2 MiB each has a table of its own.
            try guest.write(3, i, UInt64(100 + i) << 12 | PagedGuest.table)
            try guest.write(100 + i, i, UInt64(i) << 12 | PagedGuest.page)
        }
        try guest.write(1, 0, 0x2000 | PagedGuest.table)
        for i in 1..<100 {
            let address = UInt64(i) << 21 | UInt64(i) << 12
            #expect(guest.cpus[0].access(.load, at: address) == .value(try guest.space.load(at(i))), "\(i)")
            #expect(guest.mmu.usedPages <= 16)
            #expect(guest.mmu.checkTables() == [])
        }
        let recycled = Int(guest.vm.statistics.mmu_recycled.load(ordering: .relaxed))
        #expect(recycled > 80)
        #expect(recycled == guest.test.events(.shadowPageZapped).count)
        #expect(guest.page(1, level: 4)!.rootCount == 1)
    }

    @Test func `unsync pages that go with a recycled one are counted too`() throws {
        let guest = try PagedGuest(pages: 512, ramFrames: 2048)
        try guest.identityMap()
        #expect(guest.cpus[0].access(.load, at: 0x9000) == .value(0))
        #expect(guest.cpus[0].access(.store(0), at: 0x4000 + 60 * 8) == .stored)
        #expect(guest.page(4)!.isUnsync)
        guest.mmu.pageLimit = 6
        try guest.write(3, 1, 0x5000 | PagedGuest.table)
        try guest.write(5, 0, 0x9000 | PagedGuest.page)
        #expect(guest.cpus[0].access(.load, at: 0x20_0000) == .value(0))
        #expect(guest.vm.statistics.mmu_recycled.load(ordering: .relaxed) == 3)
        #expect(
            Int(guest.vm.statistics.mmu_recycled.load(ordering: .relaxed))
                == guest.test.events(.shadowPageZapped).count)
    }

    @Test func `a vCPU that can have no root at all fails, and does not walk what is not its table`() throws {
        let guest = try PagedGuest(cpus: 2)
        try guest.identityMap()
        #expect(guest.cpus[0].access(.load, at: 0x9000) == .value(0))
        guest.mmu.pageLimit = 1
        try Self.addRoot(guest, 30)
        Self.load(guest, 30, 1)
        #expect(guest.cpus[1].access(.load, at: 0x9000) == .failed(.ENOSPC))
        guest.mmu.pageLimit = 0
        #expect(guest.cpus[1].access(.load, at: 0x9000) == .value(0))
    }

    @Test func `a chain that has grown too long goes as a whole, and the next access brings its entry back (F13)`()
        throws
    {
        let guest = try PagedGuest(longestChain: 16)
        try guest.identityMap()
        for i in 32..<64 { try guest.write(4, i, 0x9000 | PagedGuest.page) }
        try guest.space.store(at(9), 9)
        let map = guest.mmu.reverseMap(guest.vm.activeSlots[0])
        var longest = 0
        for i in 32..<64 {
            #expect(guest.cpus[0].access(.load, at: UInt64(i) << 12) == .value(9))
            longest = max(longest, map.entries(GuestFrame(9), .page4K).count)
            #expect(guest.mmu.checkTables() == [])
        }
        #expect(longest <= 17 && longest >= 8)
        #expect(guest.vm.statistics.max_mmu_rmap_size.load(ordering: .relaxed) == 17)
        #expect(guest.cpus[0].access(.store(10), at: 40 << 12) == .stored)
        try guest.space.advise(pages(9..<10), .dontNeed)
        for i in 32..<64 { #expect(guest.cpus[0].access(.load, at: UInt64(i) << 12) == .value(0)) }
    }
}
