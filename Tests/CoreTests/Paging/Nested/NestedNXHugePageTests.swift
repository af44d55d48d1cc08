import Audit
import Frames
import HostMemory
import Testing

@testable import GuestMemory
@testable import Machine
@testable import Paging

/// Huge pages that are never executable, of nested guests and of their hypervisor, on one list. Spec: x86 3.11, X42.
@Suite struct X42_NestedNXHugePages {
    /// Of the hypervisor's memory of 8 MiB, its guest has 2 to 4 MiB at 0 and 4 to 6 at 2 MiB, by huge pages.
    private func guest(_ format: HypervisorFormat = .ept(accessDirty: true)) throws -> NestedGuest {
        let guest = try NestedGuest(pages: 2048, ramFrames: 8192, thp: true) {
            $0.nxHugePages = true
            format.configure(&$0)
        }
        switch format {
        case .ept:
            try guest.makeTables(count: 0)
            for i in 0..<2 { try guest.write(3, i, UInt64(i + 1) << 21 | NestedGuest.page | 1 << 7) }
        case .old(let paging, _):
            // One of 4 MiB, or two of 2 MiB.
            for i in 0..<2 {
                let page = UInt64(paging == .twoLevels ? i : i + 1) << 21
                try guest.write(paging, 3, i, (paging == .twoLevels ? page << 1 : page) | OldPaging.page | 1 << 7)
            }
            if paging == .extended { try guest.write(1, 0, 0x3001) }
        }
        // Pages of its own, or the first write would be a copy of the page of zeros.
        for page in [512, 1024, 1536] { try guest.space.store(at(page), 1) }
        return guest
    }

    private func enter(_ guest: NestedGuest, _ format: HypervisorFormat = .ept(accessDirty: true)) throws {
        try format.enter(guest.mmu, guest.cpu)
    }

    private func level(_ guest: NestedGuest, _ address: UInt64) -> PageLevel? {
        guest.nested.leaf(of: guest.cpu, at: address)?.level
    }
    private func splits(_ guest: NestedGuest) -> Int { guest.vm.statistics.nx_lpage_splits.load(ordering: .relaxed) }
    private func flushes(_ guest: NestedGuest) -> UInt64 {
        guest.vm.statistics.remote_tlb_flush_requests.load(ordering: .relaxed)
    }

    /// The leaf of the hypervisor's own tables.
    private func ownLevel(_ guest: NestedGuest, _ frame: UInt64) -> PageLevel? {
        var found: PageLevel?
        for root in guest.mmu.allRoots {
            guest.mmu.visitLeaves(of: root) {
                if ($0.guestFrame.number..<$0.guestFrame.number + $0.level.frames).contains(frame) { found = $0.level }
            }
        }
        return found
    }

    @Test(
        arguments: [
            HypervisorFormat.ept(accessDirty: true), .old(.twoLevels, levels: 4), .old(.extended, levels: 5),
        ])
    func `a fetch leaves a table of small pages until the recovery finds it`(_ format: HypervisorFormat) throws {
        let guest = try guest(format)
        try enter(guest, format)
        let base: UInt64 = format.isNarrow ? 0x40_0000 : 0
        #expect(guest.cpu.access(.load, at: base) == .value(1))
        #expect(level(guest, base) == .page2M && splits(guest) == 0)
        #expect(guest.cpu.access(.fetch, at: base) == .value(1))
        #expect(level(guest, base) == .page4K && splits(guest) == 1)
        // No huge leaf takes its place.
        #expect(guest.cpu.access(.store(2), at: base | 0x5000) == .stored)
        #expect(level(guest, base | 0x5000) == .page4K && level(guest, base) == .page4K && splits(guest) == 1)
        #expect(guest.mmu.checkTables() == [])
        let before = flushes(guest)
        #expect(guest.mmu.recoverNXHugePages(ratio: 0) == 0 && guest.mmu.recoverNXHugePages() == 1)
        #expect(flushes(guest) == before + 1 && splits(guest) == 0 && level(guest, base) == nil)
        #expect(guest.cpu.access(.store(3), at: base | 0x5000) == .stored)
        #expect(level(guest, base) == .page2M)
        #expect(guest.mmu.recoverNXHugePages(ratio: 1) == 0)
    }

    @Test func `where the hypervisor or the host maps small nothing is on the list`() throws {
        let small = try NestedGuest { $0.nxHugePages = true }
        try small.makeTables()
        try small.enter()
        #expect(small.cpu.access(.fetch, at: 0x2000) == .value(0))
        #expect(splits(small) == 0)
        let guest = try NestedGuest(pages: 1024, ramFrames: 4096) { $0.nxHugePages = true }
        try guest.makeTables(count: 0)
        try guest.write(3, 0, 0x20_0000 | NestedGuest.page | 1 << 7)
        try guest.enter()
        #expect(guest.cpu.access(.fetch, at: 0) == .value(0))
        #expect(splits(guest) == 0)
    }

    /// Ages: nested 0, the hypervisor's own at 6 MiB, nested 2 MiB.
    private func executing() throws -> NestedGuest {
        let guest = try guest()
        try enter(guest)
        #expect(guest.cpu.access(.fetch, at: 0) == .value(1))
        guest.mmu.leaveNested(guest.cpu)
        #expect(guest.cpu.access(.fetch, at: 0x60_0000) == .value(1))
        try enter(guest)
        #expect(guest.cpu.access(.fetch, at: 0x20_0000) == .value(1))
        #expect(splits(guest) == 3)
        #expect(guest.mmu.possibleHugePages.list.map(\.isShadow) == [true, false, true])
        return guest
    }

    @Test func `the worker takes the oldest of both kinds`() throws {
        let guest = try executing()
        func left() -> [Bool] {
            [level(guest, 0) != nil, ownLevel(guest, 1536) != nil, level(guest, 0x20_0000) != nil]
        }
        #expect(left() == [true, true, true])
        #expect(guest.mmu.recoverNXHugePages(ratio: 60) == 1 && left() == [false, true, true])
        #expect(guest.mmu.recoverNXHugePages(ratio: 60) == 1 && left() == [false, false, true])
        #expect(guest.mmu.recoverNXHugePages(ratio: 60) == 1 && left() == [false, false, false])
        #expect(splits(guest) == 0)
    }

    @Test func `one flush for all, before anything is freed`() throws {
        let guest = try executing()
        let free = guest.test.memory.freeFrames
        let before = flushes(guest)
        #expect(guest.mmu.recoverNXHugePages(ratio: 1) == 3)
        #expect(flushes(guest) == before + 1 && splits(guest) == 0)
        #expect(guest.test.memory.freeFrames == free + 3)
        #expect(guest.cpu.access(.store(1), at: 0x1000) == .stored)
        #expect(level(guest, 0) == .page2M)
    }

    @Test func `of a logged slot they leave the list, and stay`() throws {
        let guest = try executing()
        try guest.setSlot(log: true)
        let before = flushes(guest)
        #expect(guest.mmu.recoverNXHugePages(ratio: 1) == 0)
        #expect(flushes(guest) == before && splits(guest) == 0)
        #expect(guest.cpu.access(.fetch, at: 0) == .value(1))
        #expect(level(guest, 0) == .page4K && level(guest, 0x20_0000) == .page4K)
    }

    @Test func `a page that goes for another reason leaves the list`() throws {
        let guest = try executing()
        guest.mmu.invalidateEPT(nil, guest.cpu)
        guest.mmu.leaveNested(guest.cpu)
        // The hypervisor takes its huge page away: the table below is nobody's, and goes.
        #expect(guest.cpu.access(.store(0), at: NestedGuest.place(3, 0)) == .emulated)
        #expect(guest.mmu.checkTables() == [])
        let region = MemoryRegion(slot: 0, guestAddress: GuestAddress(0), size: 0, userAddress: at(0))
        try guest.vm.setMemoryRegion(region)
        #expect(splits(guest) == 0 && guest.mmu.possibleHugePages.list.isEmpty)
        try guest.setSlot()
    }

    @Test func `changing the parameter maps both anew`() throws {
        let guest = try executing()
        guest.mmu.setNXHugePages(false)
        #expect(splits(guest) == 0 && level(guest, 0) == nil && ownLevel(guest, 1536) == nil)
        #expect(guest.cpu.access(.fetch, at: 0) == .value(1))
        #expect(level(guest, 0) == .page2M && splits(guest) == 0)
        guest.mmu.setNXHugePages(true)
        #expect(level(guest, 0) == nil)
        #expect(guest.cpu.access(.fetch, at: 0) == .value(1))
        #expect(level(guest, 0) == .page4K && splits(guest) == 1)
    }

    @Test func `a page on the list that may be huge, or is none, is found (X42)`() throws {
        let guest = try executing()
        let list = guest.mmu.possibleHugePages
        let good = list.list
        let page = try #require(guest.shadowPage(512))
        page.isHugePageDisallowed = false
        #expect(guest.mmu.checkTables().map(\.invariant) == [.x42])
        page.isHugePageDisallowed = true
        list.list[0] = PossibleHugePage(table: good[0].table, isShadow: false)
        #expect(guest.mmu.checkTables().map(\.invariant) == [.x42])
        list.list = Array(good.dropFirst())
        #expect(guest.mmu.checkTables().map(\.invariant) == [.x42])
        list.list = good
        #expect(guest.mmu.checkTables() == [])
    }
}
