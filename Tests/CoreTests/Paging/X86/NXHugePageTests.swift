import Audit
import Frames
import HostMemory
import Testing

@testable import GuestMemory
@testable import Paging

/// Huge pages that are never executable. Spec: x86 3.5, 3.11, X40, X42.
@Suite struct X40_X42_NXHugePages {
    private func machine(_ change: @escaping (inout TDPConfiguration) -> Void = { _ in }) throws -> TDPMachine {
        let machine = TDPMachine(ramFrames: 8192, thp: true) {
            $0.nxHugePages = true
            change(&$0)
        }
        try machine.slot(count: 2048)
        // Pages of its own, or the first write would be a copy of the page of zeros, which begins with an invalidation.
        for page in [0, 600, 1100, 1700] { try machine.space.store(at(page), 1) }
        return machine
    }
    private func splits(_ machine: TDPMachine) -> Int {
        machine.statistics.nx_lpage_splits.load(ordering: .relaxed)
    }
    private let execute: UInt64 = 1 << 2

    @Test(arguments: X86_1_5_MMIOEntries.formats)
    func `a huge leaf is not executable, a small one is`(format: TDPConfiguration.Format) throws {
        let machine = try machine { $0.format = format }
        let bits = format == .ept ? EntryBits.ept() : .legacy
        machine.fault(.write, 600)
        let huge = try #require(machine.leaf(600))
        #expect(huge.level == .page2M && !bits.isExecutable(huge.entry) && bits.allows(.read, huge.entry))
        #expect(machine.fault(.execute, 600, present: true) == .spurious)
        #expect(machine.leaves().count == 512)
        #expect(machine.leaves().allSatisfy { bits.isExecutable($0.entry) })
        #expect(splits(machine) == 1)
    }

    @Test func `a fetch first: a small executable leaf, and its table keeps huge leaves away`() throws {
        let machine = try machine()
        #expect(machine.fault(.execute, 600) == .fixed)
        #expect(machine.leaf(600)?.level == .page4K && machine.leaf(600)!.entry & execute != 0)
        #expect(splits(machine) == 1)
        #expect(machine.fault(.write, 700) == .fixed)
        #expect(machine.leaf(700)?.level == .page4K)
        // The neighbour has no such table.
        #expect(machine.fault(.write, 1100) == .fixed)
        #expect(machine.leaf(1100)?.level == .page2M)
        #expect(splits(machine) == 1)
    }

    @Test func `where the host maps small nothing is on the list`() throws {
        let machine = TDPMachine { $0.nxHugePages = true }
        try machine.slot(count: 1024)
        #expect(machine.fault(.execute, 600) == .fixed)
        #expect(splits(machine) == 0)
    }

    @Test func `without the workaround a fetch maps a huge executable leaf`() throws {
        let machine = try machine { $0.nxHugePages = false }
        #expect(machine.fault(.execute, 600) == .fixed)
        #expect(machine.leaf(600)?.level == .page2M && machine.leaf(600)!.entry & execute != 0)
        #expect(splits(machine) == 0)
    }

    @Test func `recovery unlinks the oldest, one in so many, and flushes`() throws {
        let machine = try machine()
        for frame: UInt64 in [1100, 600, 1700] { #expect(machine.fault(.execute, frame) == .fixed) }
        #expect(splits(machine) == 3)
        let flushes = machine.statistics.remote_tlb_flush_requests.load(ordering: .relaxed)
        #expect(machine.mmu.recoverNXHugePages(ratio: 0) == 0)
        #expect(machine.mmu.recoverNXHugePages(ratio: 60) == 1)
        #expect(machine.statistics.remote_tlb_flush_requests.load(ordering: .relaxed) == flushes + 1)
        #expect(machine.leaves().map(\.guestFrame.number) == [600, 1700])
        #expect(splits(machine) == 2)
        #expect(machine.mmu.recoverNXHugePages(ratio: 1) == 2)
        #expect(splits(machine) == 0 && machine.leaves().isEmpty)
        #expect(machine.fault(.write, 600) == .fixed)
        #expect(machine.leaf(600)?.level == .page2M)
        #expect(machine.mmu.recoverNXHugePages(ratio: 1) == 0)
    }

    @Test func `a table of a logged slot leaves the list and stays`() throws {
        let machine = try machine()
        machine.fault(.execute, 600)
        try machine.logging(true, count: 2048)
        #expect(machine.mmu.recoverNXHugePages(ratio: 1) == 0)
        #expect(splits(machine) == 0)
        #expect(machine.leaf(600) != nil)
    }

    @Test func `a removed root takes its tables off the list`() throws {
        let machine = try machine()
        machine.fault(.execute, 600)
        machine.fault(.execute, 1100)
        try machine.set(count: 0, SlotFlags())
        #expect(splits(machine) == 0)
        #expect(machine.mmu.checkTables() == [])
    }

    @Test func `the end of logging joins what is left without X`() throws {
        let machine = try machine()
        machine.fault(.write, 600)
        try machine.logging(true, count: 2048)
        #expect(machine.leaf(600)!.entry & execute != 0)
        try machine.logging(false, count: 2048)
        #expect(machine.leaf(600)?.level == .page2M)
        #expect(machine.leaf(600)!.entry & execute == 0)
        #expect(machine.mmu.checkTables() == [])
    }

    @Test func `changing the parameter maps everything anew`() throws {
        let machine = try machine { $0.nxHugePages = false }
        machine.fault(.execute, 600)
        machine.mmu.setNXHugePages(true)
        #expect(machine.leaves().isEmpty)
        #expect(machine.cpu.hasRequest)
        machine.cpu.enterGuest()
        machine.cpu.exitGuest()
        machine.fault(.execute, 600)
        #expect(machine.leaf(600)?.level == .page4K)
        machine.mmu.setNXHugePages(true)
        #expect(machine.leaves().count == 1, "no change, nothing to do")
        machine.mmu.setNXHugePages(false)
        machine.cpu.enterGuest()
        machine.cpu.exitGuest()
        machine.fault(.execute, 600)
        #expect(machine.leaf(600)?.level == .page2M)
    }

    @Test func `an executable huge leaf is found (X40)`() throws {
        let machine = try machine()
        machine.fault(.write, 600)
        let word = machine.word(600, level: 2)
        let old = word.fetchOr(execute)
        #expect(machine.mmu.checkTables().map(\.invariant) == [.x40])
        word.store(old)
    }

    @Test func `a table that is counted twice, and one that is gone, are found (X42)`() throws {
        let machine = try machine()
        machine.fault(.execute, 600)
        machine.statistics.nx_lpage_splits.add(1, ordering: .relaxed)
        #expect(machine.mmu.checkTables().map(\.invariant) == [.x42])
        machine.statistics.nx_lpage_splits.subtract(1, ordering: .relaxed)
        let list = machine.mmu.possibleHugePages
        let good = list.list
        list.list = [PossibleHugePage(table: machine.cpu.root!, isShadow: false)]
        #expect(Set(machine.mmu.checkTables().map(\.invariant)) == [.x42])
        list.list = good
    }
}
