import Audit
import Frames
import Hardware
import HostMemory
import Testing

@testable import GuestMemory
@testable import Machine
@testable import Paging

/// The hypervisor, its host and its guest change what is mapped.
@Suite struct X86_4_10_NestedChanges {
    private func running(_ cpus: Int = 1) throws -> NestedGuest {
        let guest = try NestedGuest(cpus: cpus)
        try guest.makeTables()
        try guest.enter()
        return guest
    }

    @Test func `a lowest table that the hypervisor writes is out of sync until it says so`() throws {
        let guest = try running()
        #expect(guest.cpu.access(.store(7), at: 0x2000) == .stored)
        let page = try #require(guest.shadowPage(4))
        #expect(!page.isUnsync)
        try guest.asHypervisor {
            #expect($0.access(.store(NestedGuest.leaf(5)), at: NestedGuest.place(4, 2)) == .stored)
        }
        #expect(page.isUnsync && guest.vm.statistics.mmu_unsync.load(ordering: .relaxed) == 1)
        // Nobody has said anything: what was cached may still be used.
        #expect(guest.cpu.access(.load, at: 0x2000) == .value(7))
        try guest.asHypervisor { guest.mmu.invalidateEPT(NestedGuest.pointer, $0) }
        #expect(guest.cpu.access(.load, at: 0x2000) == .value(0))
        #expect(guest.leaf(0x2000).map { EntryBits.field.frame(in: $0) } == guest.frame(21))
    }

    @Test func `a higher table is never written unheard`() throws {
        let guest = try running()
        #expect(guest.cpu.access(.store(7), at: 0x2000) == .stored)
        try guest.write(5, 2, NestedGuest.leaf(6))
        try guest.asHypervisor {
            #expect($0.access(.store(0x5000 | NestedGuest.table), at: NestedGuest.place(3, 0)) == .emulated)
        }
        // What hung there went at once; the invalidation is the hypervisor's business.
        #expect(guest.leaf(0x2000) == nil)
        #expect(guest.cpu.access(.load, at: 0x2000) == .value(0))
        #expect(guest.leaf(0x2000).map { EntryBits.field.frame(in: $0) } == guest.frame(22))
    }

    @Test func `a table that is shadowed loses W and MW in the hypervisor's own tables, before anybody uses it`() throws
    {
        let guest = try NestedGuest()
        try guest.makeTables()
        // The hypervisor has written its tables itself, so it can.
        for frame in 1...4 {
            #expect(guest.cpu.access(.store(try guest.entry(frame, 0)), at: UInt64(frame) << 12) == .stored)
        }
        try guest.enter()
        #expect(guest.cpu.access(.load, at: 0x2000) == .value(0))
        var found = 0
        guest.mmu.forEachLeaf { leaf in
            guard (1...4).contains(leaf.guestFrame.number) else { return }
            found += 1
            #expect(leaf.entry & (EntryBits.write | guest.mmu.bits.mmuWritable) == 0)
        }
        #expect(found == 4)
        #expect(guest.mmu.checkTables() == [])
    }

    @Test func `when the host takes a page away the nested guest loses it too`() throws {
        let guest = try running()
        #expect(guest.cpu.access(.store(7), at: 0x2000) == .stored)
        try guest.space.advise(pages(18..<19), .dontNeed)
        #expect(guest.leaf(0x2000) == nil)
        #expect(guest.cpu.access(.load, at: 0x2000) == .value(0))
    }

    @Test func `a page's age is told for nested guests`() throws {
        let guest = try running()
        #expect(guest.cpu.access(.load, at: 0x2000) == .value(0))
        #expect(guest.isYoung(18, clearing: false))
        #expect(guest.isYoung(18, clearing: true))
        #expect(!guest.isYoung(18, clearing: false))
    }

    @Test func `what a nested guest writes is logged, again and again`() throws {
        let guest = try running()
        #expect(guest.cpu.access(.store(1), at: 0x2000) == .stored)
        try guest.setSlot(log: true)
        _ = try guest.vm.getDirtyLog(slot: 0)
        for round in 0..<3 {
            #expect(guest.cpu.access(.store(UInt64(round)), at: 0x2000) == .stored)
            #expect(try guest.vm.getDirtyLog(slot: 0) == [1 << 18])
            #expect(guest.cpu.access(.load, at: 0x2000) == .value(UInt64(round)))
            #expect(try guest.vm.getDirtyLog(slot: 0) == [0])
        }
        try guest.setSlot(log: false)
        #expect(guest.cpu.access(.store(9), at: 0x2000) == .stored)
    }

    @Test func `a full dirty ring keeps the nested guest out until it is reset`() throws {
        let guest = try NestedGuest(pages: 256, log: true, rings: true)
        try guest.makeTables(count: 224)
        try guest.enter()
        let ring = try #require(guest.cpu.ring)
        let stopped = (0..<224 as Range<UInt64>).first { guest.cpu.access(.store($0), at: $0 << 12) != .stored }
        #expect(stopped != nil && ring.isSoftFull)
        for _ in 0..<2 { #expect(guest.cpu.access(.store(7), at: 0x2000) == .dirtyRingFull) }
        let pages = DirtyRingReader(ring).collect()
        #expect(pages.contains { $0.offset == 16 + 2 })
        #expect(try guest.vm.resetDirtyRings() == pages.count)
        #expect(guest.cpu.access(.store(7), at: 0x2000) == .stored)
    }

    @Test(arguments: [false, true])
    func `a slot that goes takes the nested guest's pages with it`(_ onlySlot: Bool) throws {
        let guest = try NestedGuest { $0.zapsOnlySlot = onlySlot }
        try guest.makeTables()
        try guest.space.map(at: at(64), length: 4 * pageSize, protection: .readWrite, backing: .anonymous)
        let region = MemoryRegion(
            slot: 1, guestAddress: GuestAddress(0x10_0000), size: 4 * pageSize, userAddress: at(64))
        try guest.vm.setMemoryRegion(region)
        try guest.write(4, 2, 0x10_0000 | NestedGuest.page)
        try guest.enter()
        #expect(guest.cpu.access(.store(7), at: 0x2000) == .stored)
        #expect(guest.cpu.access(.store(8), at: 0x3000) == .stored)
        var gone = region
        gone.size = 0
        try guest.vm.setMemoryRegion(gone)
        #expect(guest.cpu.access(.load, at: 0x2000) == .mmio)
        #expect(guest.cpu.access(.load, at: 0x3000) == .value(8))
        try guest.vm.setMemoryRegion(region)
        #expect(guest.cpu.access(.load, at: 0x2000) == .value(7))
    }

    @Test func `tables in a slot that goes are not shadowed any longer`() throws {
        let guest = try NestedGuest { $0.zapsOnlySlot = true }
        try guest.makeTables()
        try guest.space.map(at: at(64), length: 4 * pageSize, protection: .readWrite, backing: .anonymous)
        let region = MemoryRegion(
            slot: 1, guestAddress: GuestAddress(0x10_0000), size: 4 * pageSize, userAddress: at(64))
        try guest.vm.setMemoryRegion(region)
        try guest.space.store(at(64) + 16, NestedGuest.leaf(2))
        try guest.write(3, 0, 0x10_0000 | NestedGuest.table)
        try guest.enter()
        #expect(guest.cpu.access(.store(7), at: 0x2000) == .stored)
        #expect(guest.shadowPage(0x100) != nil)
        var gone = region
        gone.size = 0
        try guest.vm.setMemoryRegion(gone)
        #expect(guest.shadowPage(0x100) == nil)
        guard case .nestedExit(.violation) = guest.cpu.access(.load, at: 0x2000) else {
            Issue.record("the hypervisor's table is gone")
            return
        }
    }

    @Test func `an invalidation takes the tables of one pointer, or all`() throws {
        let guest = try running()
        _ = guest.cpu.access(.load, at: 0)
        try guest.write(8, 0, 0x2000 | NestedGuest.table)
        let other = NestedGuest.pointer & 0xfff | 0x8000
        try guest.enter(other)
        _ = guest.cpu.access(.load, at: 0)
        func roots() -> Int { [1, 8].filter { guest.shadowPage($0, level: 4)?.rootCount == 1 }.count }
        #expect(roots() == 2)
        guest.mmu.leaveNested(guest.cpu)
        guest.mmu.invalidateEPT(other, guest.cpu)
        #expect(guest.shadowPage(8, level: 4)?.rootCount == 0 && roots() == 1)
        guest.mmu.invalidateEPT(nil, guest.cpu)
        #expect(roots() == 0)
        try guest.enter()
        #expect(guest.cpu.access(.store(1), at: 0x2000) == .stored)
    }

    @Test func `a violation told to the hypervisor leaves no stale entry under another pointer to the same tables`()
        throws
    {
        let guest = try running()
        #expect(guest.cpu.access(.store(7), at: 0x2000) == .stored)
        // The same tables, without A and D: another root, and other pages, which know nothing of the address yet.
        try guest.enter(NestedGuest.pointerWithoutAD)
        #expect(guest.cpu.access(.store(7), at: 0x3000) == .stored)
        try guest.asHypervisor(NestedGuest.pointerWithoutAD) {
            let entry = NestedGuest.leaf(2, 5 | 6 << 3 | 3 << 8)
            #expect($0.access(.store(entry), at: NestedGuest.place(4, 2)) == .stored)
        }
        let exit = NestedExit.violation(GuestAddress(0x2000), qualification: 0x1aa)
        #expect(guest.cpu.access(.store(8), at: 0x2000) == .nestedExit(exit))
        try guest.enter()
        #expect(guest.cpu.access(.store(8), at: 0x2000) == .nestedExit(exit))
    }

    @Test func `the hypervisor's page-modification log is filled for it, and full it is told`() throws {
        let guest = try NestedGuest()
        try guest.makeTables(leaf: 7 | 6 << 3 | 1 << 8)
        try guest.enter()
        let state = guest.mmu.shadowState(of: guest.cpu)
        state.hypervisorLog = HypervisorLog(page: GuestAddress(0x9000), index: 1)
        #expect(guest.cpu.access(.store(1), at: 0x2008) == .stored)
        #expect(guest.cpu.access(.store(1), at: 0x3000) == .stored)
        #expect(try guest.entry(9, 1) == 0x2000)
        #expect(try guest.entry(9, 0) == 0x3000)
        #expect(state.hypervisorLog?.index == .max)
        #expect(guest.cpu.access(.store(1), at: 0x4000) == .nestedExit(.modificationLogFull))
        #expect(try guest.entry(4, 4) & 1 << 9 == 0)
        state.hypervisorLog?.index = 511
        #expect(guest.cpu.access(.store(1), at: 0x4000) == .stored)
        // Pages that are dirty already are not logged again.
        #expect(guest.cpu.access(.store(1), at: 0x2000) == .stored)
        #expect(state.hypervisorLog?.index == 510)
    }

    @Test func `a table that is its own child goes once`() throws {
        let guest = try NestedGuest()
        try guest.makeTables()
        // Frame 3 is a table of level 2, and its entry 1 says that it is one of level 1.
        try guest.write(3, 1, 0x3000 | NestedGuest.table)
        try guest.enter()
        #expect(guest.cpu.access(.load, at: 1 << 21) != .value(0))
        #expect(guest.shadowPage(3, level: 2) != nil && guest.shadowPage(3, level: 1) != nil)
        try guest.asHypervisor {
            for _ in 0..<3 { #expect($0.access(.store(0), at: NestedGuest.place(3, 5)) == .emulated) }
        }
        #expect(guest.vm.statistics.mmu_flooded.load(ordering: .relaxed) > 0)
        #expect(guest.shadowPage(3, level: 2) == nil && guest.shadowPage(3, level: 1) == nil)
    }

    @Test func `memory runs out and comes back`() throws {
        var failures = 0
        // The reverse map, the tables in reserve, and, after the last, none.
        for failing in 1...9 {
            let guest = try NestedGuest()
            try guest.makeTables()
            guest.test.memory.failAllocation(failing)
            try guest.enter()
            let first = guest.cpu.access(.load, at: 0)
            if first == .failed(.ENOMEM) { failures += 1 } else { #expect(first == .value(0)) }
            guest.test.memory.failAllocation(0)
            #expect(guest.cpu.access(.load, at: 0) == .value(0))
        }
        #expect(failures >= 7)
    }
}
