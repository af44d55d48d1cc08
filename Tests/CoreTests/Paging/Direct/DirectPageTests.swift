import Audit
import Frames
import HostMemory
import Synchronization
import Synchrony
import Testing

@testable import GuestMemory
@testable import Machine
@testable import Paging

/// The pages behind second-stage tables of the shadow MMU's: their end, their number, and who reads them.
@Suite struct X86_2_5_DirectShadowPages {
    typealias Kind = DirectGuest.Kind

    // MARK: Slots

    @Test(arguments: Kind.allCases)
    func `a slot that goes takes all tables with it, by their generation`(kind: Kind) throws {
        let direct = DirectGuest(kind, cpus: 2)
        try direct.guest.addMemory(0, 64)
        #expect(direct.guest.store(5, 1) == .stored && direct.guest.load(5, cpu: 1) == .value(1))
        let generation = direct.mmu.generation
        try direct.guest.deleteSlot()
        #expect(direct.mmu.generation != generation)
        // The root is both vCPUs', and stays until they have left it.
        #expect(direct.pages.count == 1 && direct.pages[0].rootCount == 2 && direct.pages[0].role.isInvalid)
        #expect(direct.findings == [] && direct.cpu.hasRequest)
        #expect(direct.guest.load(5) == .mmio && direct.guest.load(5, cpu: 1) == .mmio)
        #expect(direct.pages.allSatisfy { !$0.role.isInvalid })
        try direct.guest.setSlot(pages: 64)
        #expect(direct.guest.load(5) == .value(1))
        direct.guest.check()
    }

    @Test(arguments: Kind.allCases)
    func `a slot that moves is found at its new place alone`(kind: Kind) throws {
        let direct = DirectGuest(kind)
        try direct.guest.addMemory(0, 64)
        #expect(direct.guest.store(5, 1) == .stored)
        try direct.guest.setSlot(guest: 512, pages: 64, host: 0)
        #expect(direct.guest.load(5) == .mmio && direct.guest.load(517) == .value(1))
        direct.guest.check()
    }

    @Test func `with the quirk off only the slot's leaves go`() throws {
        let direct = DirectGuest { $0.zapsOnlySlot = true }
        try direct.guest.addMemory(0, 64)
        try direct.space.mapPages(64, 64)
        try direct.guest.setSlot(1, guest: 64, pages: 64)
        #expect(direct.guest.store(5, 1) == .stored && direct.guest.store(70, 2) == .stored)
        try direct.guest.deleteSlot(1)
        #expect(direct.guest.leaf(5) != nil && direct.guest.leaf(70) == nil)
        #expect(direct.guest.load(70) == .mmio)
        direct.guest.check()
    }

    @Test func `a vCPU in system management mode has another root`() throws {
        let direct = DirectGuest(addressSpaces: 2)
        try direct.guest.addMemory(0, 64)
        try direct.vm.setMemoryRegion(
            MemoryRegion(
                slot: 1 << 16, flags: SlotFlags(), guestAddress: gfn(0).address, size: 32 * pageSize,
                userAddress: at(32)))
        #expect(direct.guest.store(5, 1) == .stored)
        direct.cpu.switchAddressSpace(to: 1)
        #expect(direct.guest.store(5, 2) == .stored)
        #expect(try direct.space.load(at(5)) == 1)
        #expect(try direct.space.load(at(37)) == 2)
        direct.guest.check()
        direct.cpu.switchAddressSpace(to: 0)
        #expect(direct.guest.load(5) == .value(1))
        #expect(direct.pages.filter { $0.rootCount > 0 }.count == 2)
        direct.guest.check()
    }

    // MARK: The quota

    @Test(arguments: Kind.allCases)
    func `pages stay within the VM's quota: the oldest that are no roots go`(kind: Kind) throws {
        let direct = DirectGuest(kind, ramFrames: 4096)
        direct.mmu.pageLimit = 12
        for block in 0..<16 {
            try direct.space.mapPages(block * 512, 8)
            try direct.guest.setSlot(UInt32(block), guest: block * 512, pages: 8)
        }
        for round in 0..<2 {
            for block in 0..<16 {
                #expect(direct.guest.store(block * 512, UInt64(round)) == .stored)
                #expect(direct.pages.count <= 12 + ShadowMMU.tablesPerFault)
                #expect(direct.findings == [])
            }
        }
        #expect(direct.statistics.mmu_recycled.load(ordering: .relaxed) > 0)
        direct.guest.check()
    }

    @Test func `with no room at all the run fails`() throws {
        let direct = DirectGuest()
        try direct.guest.addMemory(0, 8)
        #expect(direct.guest.store(0, 1) == .stored)
        direct.mmu.pageLimit = 1
        #expect(direct.fault(.write, 0) == .failed(.ENOSPC))
        #expect(direct.fault(.read, 600) == .failed(.ENOSPC))
        // What is there can be given back without room.
        direct.mmu.pageLimit = 0
        #expect(direct.guest.store(0, 2) == .stored)
    }

    // MARK: What is read without the lock

    @Test(arguments: Kind.allCases)
    func `who frees a table waits for whoever reads tables (X56)`(kind: Kind) async throws {
        let direct = DirectGuest(kind, cpus: 2)
        try direct.guest.addMemory(0, 64)
        #expect(direct.guest.store(5, 1) == .stored)
        let guest = direct.guest
        let reader = guest.cpus[1]
        let reads = Flag()
        let isGone = Flag()
        let table = try #require(direct.pages.first { $0.role.level == 1 }).table
        try await onThreads([
            {
                reader.beginReadingTables()
                reads.raise()
                for _ in 0..<2000 { yieldProcessor() }
                #expect(!isGone.isRaised)
                #expect(!guest.test.state(table).flags.isFree)
                reader.endReadingTables()
            },
            {
                while !reads.isRaised { yieldProcessor() }
                try guest.deleteSlot()
                isGone.raise()
            },
        ])
        #expect(isGone.isRaised)
    }

    @Test(arguments: Kind.allCases)
    func `a fault that has no need of the lock asks for no page`(kind: Kind) throws {
        let direct = DirectGuest(kind)
        try direct.guest.addMemory(0, 64)
        #expect(direct.guest.store(5, 1) == .stored)
        try direct.guest.setSlot(pages: 64, log: true)
        let translations = direct.events(.translated).count
        #expect(direct.fault(.write, 5, present: true) == .fixed)
        #expect(direct.fault(.write, 5, present: true) == .spurious)
        #expect(direct.events(.translated).count == translations)
        #expect(direct.events(.fastFault).count == 2)
        #expect(try direct.vm.getDirtyLog(slot: 0).pages == [5])
    }

    @Test func `an entry with a reserved bit ends the run`() throws {
        let direct = DirectGuest()
        try direct.guest.addMemory(0, 64)
        #expect(direct.guest.store(5, 1) == .stored)
        let word = direct.word(5)
        let old = word.fetchOr(1 << 50)
        #expect(direct.findings == [.x23])
        #expect(direct.fault(.read, 5, present: true, reserved: true) == .failed(.EINVAL))
        word.store(old)
        #expect(direct.fault(.read, 5, present: true, reserved: true) == .retry)
    }

    // MARK: Ahead of use

    @Test(arguments: Kind.allCases)
    func `a page can be mapped ahead, and what is there stays`(kind: Kind) throws {
        let direct = DirectGuest(kind, thp: true)
        try direct.guest.addMemory(0, 1024)
        try direct.space.store(at(700), 3)
        try direct.space.store(at(100), 3)
        func ahead(_ page: Int) throws -> PageLevel {
            let side = direct.vm.slotReaders.enter()
            defer { direct.vm.slotReaders.exit(side) }
            return try direct.mmu.preFault(direct.cpu, gfn(page).address)
        }
        #expect(try ahead(700) == .page2M)
        #expect(!direct.space.testYoung(at(700)) || direct.guest.leaf(700)?.accessed == false)
        let entry = direct.word(700, level: 2).peek()
        #expect(try ahead(701) == .page2M)
        #expect(direct.word(700, level: 2).peek() == entry)
        #expect(throws: Errno.ENOENT) { _ = try ahead(2000) }
        // A leaf that is larger than may be now stays until the guest writes.
        try direct.guest.setSlot(pages: 1024, log: true)
        #expect(try ahead(702) == .page2M)
        direct.guest.check()
    }

    // MARK: Huge pages that are not executable. Spec: x86 3.11

    private func executing(_ format: TDPConfiguration.Format = .ept) throws -> DirectGuest {
        let direct = DirectGuest(format == .ept ? .ept : .npt, ramFrames: 8192, thp: true) { $0.nxHugePages = true }
        try direct.guest.addMemory(0, 2048)
        for page in [0, 600, 1100, 1700] { try direct.space.store(at(page), 1) }
        return direct
    }
    private func splits(_ direct: DirectGuest) -> Int { direct.statistics.nx_lpage_splits.load(ordering: .relaxed) }

    @Test(arguments: [TDPConfiguration.Format.ept, .npt])
    func `a fetch breaks a huge page up, and its table stays`(format: TDPConfiguration.Format) throws {
        let direct = try executing(format)
        let bits = direct.mmu.bits
        direct.fault(.write, 600)
        #expect(direct.guest.leaf(600)?.level == .page2M && !bits.isExecutable(direct.guest.leaf(600)!.entry))
        #expect(direct.fault(.execute, 600, present: true) == .fixed)
        #expect(direct.guest.leaf(600)?.level == .page4K && bits.isExecutable(direct.guest.leaf(600)!.entry))
        #expect(splits(direct) == 1)
        #expect(direct.fault(.write, 700) == .fixed)
        #expect(direct.guest.leaf(700)?.level == .page4K && direct.findings == [])
        direct.guest.check()
    }

    @Test func `recovery zaps the oldest, one in so many, and spares logged slots`() throws {
        let direct = try executing()
        for page in [1100, 600, 1700] { #expect(direct.fault(.execute, page) == .fixed) }
        #expect(splits(direct) == 3)
        #expect(direct.mmu.recoverNXHugePages(ratio: 0) == 0)
        #expect(direct.mmu.recoverNXHugePages(ratio: 60) == 1)
        #expect(direct.guest.leaf(1100) == nil && direct.guest.leaf(600) != nil)
        try direct.guest.setSlot(pages: 2048, log: true)
        #expect(direct.mmu.recoverNXHugePages(ratio: 1) == 0)
        #expect(splits(direct) == 0 && direct.guest.leaf(600) != nil)
        direct.guest.check()
    }

    @Test func `a change of the parameter maps everything anew`() throws {
        let direct = try executing()
        #expect(direct.fault(.execute, 600) == .fixed)
        direct.mmu.setNXHugePages(false)
        #expect(splits(direct) == 0 && direct.guest.leafCount == 0)
        _ = direct.guest.load(3)
        #expect(direct.fault(.execute, 600) == .fixed)
        #expect(direct.guest.leaf(600)?.level == .page2M)
        direct.mmu.setNXHugePages(true)
        direct.guest.check()
    }
}
