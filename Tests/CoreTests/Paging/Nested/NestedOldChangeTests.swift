import Audit
import Frames
import HostMemory
import Testing

@testable import GuestMemory
@testable import Machine
@testable import Paging

/// The same, while the hypervisor, its host and its guest change what is mapped.
@Suite struct X86_4_10_NestedOldChanges {
    @Test(arguments: OldPaging.allCases)
    func `each entry of the nested guest brings its tables up to date, under every root`(_ paging: OldPaging) throws {
        let guest = try NestedGuest.old(paging)
        for i in 0..<32 { try guest.space.store(at(16 + i), UInt64(i)) }
        try guest.enter(paging)
        var bases: [UInt64] = [0, paging.otherBase]
        if paging == .twoLevels { bases.append(0x20_0000) }
        for base in bases { #expect(guest.cpu.access(.load, at: base | 0x2000) == .value(2)) }
        guest.mmu.leaveNested(guest.cpu)
        let table = UInt64(paging.lowestTable) << 12
        let pair = OldPaging.leaf(5) | OldPaging.leaf(6) << 32
        // Entries 2 and 3 of 4 bytes, in both halves; entry 2 of 8.
        let offsets: [UInt64] = paging == .twoLevels ? [8, 2048 + 8] : [16]
        for offset in offsets {
            let entries = paging == .twoLevels ? pair : OldPaging.leaf(5)
            #expect(guest.cpu.access(.store(entries), at: table + offset) == .stored)
        }
        #expect(guest.shadowPage(UInt64(paging.lowestTable))?.isUnsync == true)
        #expect(guest.mmu.checkTables() == [])
        try guest.enter(paging)
        #expect(guest.cpu.access(.load, at: 0x2000) == .value(5))
        #expect(guest.shadowPage(UInt64(paging.lowestTable))?.isUnsync == false)
        for base in bases { #expect(guest.cpu.access(.load, at: base | 0x2000) == .value(5)) }
        #expect(guest.vm.statistics.mmu_unsync.load(ordering: .relaxed) == 0)
    }

    @Test func `a write to a directory of 4-byte entries takes two of a page's, in its quadrant alone`() throws {
        let guest = try NestedGuest.old(.twoLevels)
        try guest.write(.twoLevels, 1, 1, 0x3067)
        for (table, page) in [(3, 30), (4, 31)] {
            for i in [0, 512] { try guest.write(.twoLevels, table, i, OldPaging.leaf(page)) }
            try guest.space.store(at(16 + page), UInt64(page))
        }
        try guest.enter(.twoLevels)
        let addresses: [UInt64] = [0x40_0000, 0x60_0000]
        for address in addresses { #expect(guest.cpu.access(.load, at: address) == .value(30)) }
        #expect(guest.cpu.access(.load, at: 0) == .value(0))
        try guest.write(.twoLevels, 1, 1, 0x4067)
        guest.vm.withSlots { guest.mmu.guestMemoryWritten(guest.cpu, GuestAddress(0x1004), count: 4) }
        #expect(guest.vm.statistics.mmu_pde_zapped.load(ordering: .relaxed) == 2)
        #expect(addresses.allSatisfy { guest.leaf($0) == nil } && guest.leaf(0) != nil)
        for address in addresses { #expect(guest.cpu.access(.load, at: address) == .value(31)) }
        // The hypervisor's stores of 8 bytes are no page-table code's: all four roots go.
        guest.mmu.leaveNested(guest.cpu)
        #expect(guest.cpu.access(.store(0x3067 << 32 | 0x2067), at: 0x1000) == .emulated)
        #expect(guest.vm.statistics.mmu_flooded.load(ordering: .relaxed) == 4)
        try guest.enter(.twoLevels)
        for address in addresses { #expect(guest.cpu.access(.load, at: address) == .value(30)) }
    }

    @Test(arguments: OldPaging.allCases)
    func `a large page is the host's of 2 MiB, two of 4-byte entries, or many small ones`(_ paging: OldPaging) throws {
        for thp in [true, false] {
            let guest = try NestedGuest.old(paging, pages: 2048, ramFrames: 8192, thp: thp)
            try guest.write(paging, paging.directory, 1, 0x40_0000 | 0xe7)
            try guest.enter(paging)
            let base: UInt64 = paging == .twoLevels ? 0x40_0000 : 0x20_0000
            let offsets: [UInt64] = paging == .twoLevels ? [0x5000, 0x20_5000] : [0x5000]
            for offset in offsets {
                #expect(guest.cpu.access(.store(offset), at: base + offset) == .stored)
                #expect(guest.nested.leaf(of: guest.cpu, at: base + offset)?.level == (thp ? .page2M : .page4K))
                #expect(guest.leafBits(base + offset) == (thp ? 0xee7 : 0xe67))
                #expect(try guest.value(1024 + Int(offset >> 12)) == offset)
                let page = guest.shadowPage(1024 + (offset & ~0x1f_ffff) >> 12)
                #expect((page != nil) == !thp && page?.role.isDirect != false)
            }
        }
    }

    @Test(arguments: OldPaging.allCases, [false, true])
    func `a slot that goes makes the roots anew`(_ paging: OldPaging, _ onlySlot: Bool) throws {
        let guest = try NestedGuest.old(paging) { $0.zapsOnlySlot = onlySlot }
        try guest.space.map(at: at(64), length: 4 * pageSize, protection: .readWrite, backing: .anonymous)
        let region = MemoryRegion(
            slot: 1, guestAddress: GuestAddress(0x10_0000), size: 4 * pageSize, userAddress: at(64))
        try guest.vm.setMemoryRegion(region)
        // A page and a directory in it.
        try guest.write(paging, paging.lowestTable, 2, 0x10_0000 | OldPaging.page)
        try guest.space.store(at(65), UInt64(paging.lowestTable) << 12 | OldPaging.table)
        if paging == .extended { try guest.write(1, 1, 0x10_1001) }
        try guest.enter(paging)
        #expect(guest.cpu.access(.store(7), at: 0x2000) == .stored)
        #expect(guest.cpu.access(.store(8), at: 0x3000) == .stored)
        if paging == .extended { #expect(guest.cpu.access(.load, at: 0x4000_3000) == .value(8)) }
        var gone = region
        gone.size = 0
        try guest.vm.setMemoryRegion(gone)
        #expect(guest.cpu.access(.load, at: 0x2000) == .mmio)
        #expect(guest.cpu.access(.load, at: 0x3000) == .value(8))
        if paging == .extended { guest.expectExit(.load, 0x4000_3000, 4) }
        try guest.vm.setMemoryRegion(region)
        #expect(guest.cpu.access(.load, at: 0x2000) == .value(7))
        if paging == .extended { #expect(guest.cpu.access(.load, at: 0x4000_3000) == .value(8)) }
    }

    @Test(arguments: OldPaging.allCases)
    func `the host takes a page away, asks for its age, and logs it`(_ paging: OldPaging) throws {
        let guest = try NestedGuest.old(paging)
        try guest.enter(paging)
        #expect(guest.cpu.access(.store(7), at: 0x2000) == .stored)
        #expect(guest.isYoung(18, clearing: true) && !guest.isYoung(18, clearing: false))
        try guest.space.advise(pages(18..<19), .dontNeed)
        #expect(guest.leaf(0x2000) == nil)
        #expect(guest.cpu.access(.load, at: 0x2000) == .value(0))
        try guest.setSlot(log: true)
        _ = try guest.vm.getDirtyLog(slot: 0)
        for round in 0..<3 as Range<UInt64> {
            #expect(guest.cpu.access(.store(round), at: paging.otherBase | 0x2000) == .stored)
            #expect(try guest.vm.getDirtyLog(slot: 0) == [1 << 18])
            #expect(guest.cpu.access(.load, at: 0x2000) == .value(round))
            #expect(try guest.vm.getDirtyLog(slot: 0) == [0])
        }
        try guest.setSlot(log: false)
        #expect(guest.cpu.access(.store(9), at: 0x2000) == .stored)
    }

    @Test(arguments: OldPaging.allCases)
    func `only roots with a page of their own are remembered`(_ paging: OldPaging) throws {
        let guest = try NestedGuest.old(paging)
        // In 64-bit mode its tables are frames 8 to 11.
        for frame in 8..<11 { try guest.write(frame, 0, UInt64(frame + 1) << 12 | OldPaging.table) }
        for i in 0..<32 { try guest.write(11, i, OldPaging.leaf(i)) }
        let long = GuestRegisters.longMode(root: GuestAddress(0x8000))
        let state = guest.mmu.shadowState(of: guest.cpu)
        try guest.mmu.enterNested(long, guest.cpu)
        #expect(guest.cpu.access(.store(1), at: 0x2000) == .stored)
        let root = try #require(guest.shadowPage(8, level: 4))
        try guest.enter(paging)
        #expect(guest.cpu.access(.load, at: 0x2000) == .value(1))
        #expect(state.earlierRoots.count == 1 && root.rootCount == 1 && state.root == nil)
        let directory = try #require(guest.shadowPage(UInt64(paging.directory), level: 2))
        #expect(directory.rootCount == 1)
        try guest.mmu.enterNested(long, guest.cpu)
        #expect(state.root?.page === root && state.earlierRoots.isEmpty && state.fourRoots.isEmpty)
        #expect(directory.rootCount == 0 && !directory.role.isInvalid)
        #expect(guest.cpu.access(.load, at: 0x2000) == .value(1))
        // Its pages are found again all the same.
        let made = guest.nested.pagesMade
        try guest.enter(paging)
        #expect(guest.cpu.access(.load, at: 0x2000) == .value(1))
        #expect(guest.nested.pagesMade == made && directory.rootCount == 1)
    }

    @Test(arguments: OldPaging.allCases)
    func `the hypervisor runs in between, and its host zaps everything meanwhile`(_ paging: OldPaging) throws {
        let guest = try NestedGuest.old(paging)
        try guest.enter(paging)
        #expect(guest.cpu.access(.store(7), at: 0x2000) == .stored)
        guest.mmu.leaveNested(guest.cpu)
        #expect(guest.cpu.access(.load, at: 18 << 12) == .value(7))
        guest.mmu.setNXHugePages(true)
        #expect(guest.cpu.access(.load, at: 18 << 12) == .value(7))
        try guest.enter(paging)
        guest.mmu.setNXHugePages(false)
        #expect(guest.cpu.access(.load, at: 0x2000) == .value(7))
    }
}

/// Rules of hand-made roots are found when they are broken on purpose.
@Suite struct X86_8_NestedOldChecks {
    private func found(_ guest: NestedGuest) -> Set<Invariant> { Set(guest.mmu.checkTables().map(\.invariant)) }

    @Test(arguments: OldPaging.allCases, [4, 5] as [UInt8])
    func `damage to the tables above the four`(_ paging: OldPaging, _ levels: UInt8) throws {
        let guest = try NestedGuest.old(paging, levels: levels)
        try guest.enter(paging)
        #expect(guest.cpu.access(.store(7), at: 0x2000) == .stored)
        let state = guest.mmu.shadowState(of: guest.cpu)
        #expect(state.specialTables.count == Int(levels) - 2)
        for table in state.specialTables {
            let word = guest.vm.memory.entry(0, of: table)
            let good = word.load()
            for bit in [0, 1, 2, 5, 7, 8, 63] as [UInt64] {
                word.initialize(to: good ^ 1 << bit)
                #expect(found(guest) == [.x23])
            }
            for bad in [good ^ 1 << 12, EntryBits.empty] {
                word.initialize(to: bad)
                #expect(found(guest) == [.x53])
            }
            word.initialize(to: good)
            let other = guest.vm.memory.entry(7, of: table)
            other.initialize(to: good)
            #expect(found(guest) == [.x53])
            other.initialize(to: EntryBits.empty)
        }
        #expect(found(guest) == [])
    }

    @Test func `a root that is counted wrongly, is another's, or is obsolete and nobody is asked to leave it`() throws {
        let guest = try NestedGuest.old(.twoLevels)
        try guest.enter(.twoLevels)
        #expect(guest.cpu.access(.store(7), at: 0x2000) == .stored)
        let state = guest.mmu.shadowState(of: guest.cpu)
        let page = try #require(state.fourRoots[0])
        page.rootCount += 1
        #expect(found(guest) == [.x61])
        page.rootCount -= 1
        let (first, second) = (state.fourRoots[0], state.fourRoots[1])
        state.fourRoots.swapAt(0, 1)
        #expect(found(guest) == [.x52, .x53])
        state.fourRoots.swapAt(0, 1)
        #expect(state.fourRoots[0] === first && state.fourRoots[1] === second)
        page.role.isInvalid = true
        #expect(found(guest).contains(.x35))
        page.role.isInvalid = false
        #expect(found(guest) == [])
    }
}
