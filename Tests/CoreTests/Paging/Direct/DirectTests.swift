import Audit
import Frames
import HostMemory
import Synchronization
import Synchrony
import Testing

@testable import GuestMemory
@testable import Machine
@testable import Paging

/// TDP with `tdp_mmu=N`: the shadow MMU keeps the second-stage tables. Spec: x86 2.5, 3.5 to 3.11, section 4.
@Suite struct X86_2_5_DirectShadowTDP {
    typealias Kind = DirectGuest.Kind

    @Test(arguments: Kind.allCases)
    func `the guest reads and writes the process's memory, through direct pages from the root down`(kind: Kind) throws {
        let direct = DirectGuest(kind)
        let guest = direct.guest
        try guest.addMemory(0, 64)
        #expect(guest.store(5, 77) == .stored)
        #expect(try direct.space.load(at(5)) == 77)
        #expect(guest.load(5) == .value(77))
        #expect(direct.pages.count == Int(direct.mmu.secondStage.levels))
        let root = try #require(direct.pages.first { $0.rootCount > 0 })
        let role: UInt32 = direct.mmu.secondStage.levels == 5 ? 0x3785 : 0x3784
        #expect(root.role.rawValue == role | (kind == .eptWithoutAD ? 1 << 16 : 0))
        #expect(direct.pages.allSatisfy { $0.role.isDirect && $0.role.access == .all })
        guest.check()
    }

    @Test(arguments: Kind.allCases)
    func `an entry's bits are those of its format`(kind: Kind) throws {
        let direct = DirectGuest(kind)
        try direct.guest.addMemory(0, 64)
        #expect(direct.guest.store(8, 1) == .stored)
        let entry = direct.word(8).peek() & ~EntryBits.frameMask
        let link = direct.word(8, level: 2).peek() & ~EntryBits.frameMask
        switch kind {
        case .ept, .eptOfFiveLevels:
            #expect(entry == 0x8600_0000_0000_0b77 && link == 0x8000_0000_0000_0907)
        case .eptWithoutAD:
            #expect(entry == 0x8610_0000_0000_0b77 && link == 0x8010_0000_0000_0807)
        case .npt, .nptOfFiveLevels: #expect(entry == 0xe67 && link == 0x827)
        }
    }

    @Test func `a fault holds mmu_lock for writing`() { #expect(!DirectGuest().mmu.faultsInParallel) }

    @Test(arguments: Kind.allCases)
    func `neighbours come along, but for tables without A`(kind: Kind) throws {
        let direct = DirectGuest(kind)
        try direct.guest.addMemory(0, 64)
        for page in 16..<24 { try direct.space.store(at(page), UInt64(page)) }
        #expect(direct.guest.load(18) == .value(18))
        #expect(direct.guest.leafCount == (kind.prefetches ? 8 : 1))
        if kind.prefetches { #expect(direct.guest.leaf(19)?.accessed == false) }
        direct.guest.check()
    }

    @Test(arguments: Kind.allCases)
    func `a page that the host maps huge is mapped huge`(kind: Kind) throws {
        let direct = DirectGuest(kind, thp: true)
        try direct.guest.addMemory(0, 1024)
        #expect(direct.guest.store(700, 3) == .stored)
        #expect(direct.guest.leaf(700)?.level == .page2M)
        #expect(direct.statistics.pages_2m.load(ordering: .relaxed) == 1)
        direct.guest.check()
        let small = DirectGuest(kind, thp: true) { $0.largestPage = .page4K }
        try small.guest.addMemory(0, 1024)
        #expect(small.guest.store(700, 3) == .stored)
        #expect(small.guest.leaf(700)?.level == .page4K)
    }

    /// On memory that is committed only where it is used.
    @Test(arguments: [PageLevel.page1G, .page2M])
    func `a page of 1 GiB is mapped whole, unless the MMU's limit is lower`(limit: PageLevel) throws {
        let size = 2 << 30
        let arena = try #require(MappedArena(size: size))
        let frames = try #require(MappedArena(size: size / 64))
        let memory = PhysicalMemory(
            arena: arena.base, ramFrames: size >> 12, arenaIsZero: true, pageFrameStorage: frames.base)
        let host = Host(memory: memory, transparentHugePages: false)
        let file = HugePageFile(try #require(HugePagePool(host, level: .page1G, pages: 1)), pages: 1)
        let space = AddressSpace(host: host)
        let start = UserAddress(PageLevel.page1G.bytes * 3)
        try space.map(at: start, length: PageLevel.page1G.bytes, protection: .readWrite, backing: .huge(file))
        var configuration = TDPConfiguration()
        configuration.largestPage = limit
        let mmu = ShadowMMU(direct: configuration)
        let vm = VirtualMachine(addressSpace: space, mmu: mmu)
        let cpu = GuestCPU(number: 0, vm: vm, tables: .direct(mmu))
        try vm.create(cpu)
        let guest = GuestAddress(PageLevel.page1G.bytes)
        try vm.setMemoryRegion(
            MemoryRegion(slot: 0, guestAddress: guest, size: PageLevel.page1G.bytes, userAddress: start))
        #expect(cpu.access(.write, GuestAddress(guest.value + 0x3000_1000), value: 5) == .stored)
        #expect(try space.load(start + 0x3000_1000) == 5)
        var levels: [PageLevel] = []
        mmu.forEachLeaf { levels.append($0.level) }
        #expect(levels == [limit] && mmu.checkTables() == [])
        vm.destroy()
        space.exit()
    }

    // MARK: No memory

    @Test(arguments: Kind.allCases)
    func `an access without a slot leaves an entry that makes the next a quick exit`(kind: Kind) throws {
        let direct = DirectGuest(kind)
        try direct.guest.addMemory(0, 8)
        let page = 100
        #expect(direct.guest.load(page) == .mmio)
        let created = { direct.statistics.pf_mmio_spte_created.load(ordering: .relaxed) }
        #expect(created() == 1 && direct.mmu.bits.isMMIO(direct.word(page).peek()))
        let taken = direct.statistics.pf_taken.load(ordering: .relaxed)
        #expect(direct.guest.load(101) == .mmio)
        // The vCPU remembers the last one alone; the entry does the rest.
        #expect(direct.guest.store(page, 1) == .mmio)
        #expect(created() == 2 && direct.statistics.pf_taken.load(ordering: .relaxed) == taken + 1)
        #expect(direct.events(.mmioChecked).count == 1)
        // Stale with the next change of the slots; nobody looks for it.
        try direct.space.mapPages(96, 8)
        try direct.guest.setSlot(1, guest: 96, pages: 8)
        #expect(direct.guest.store(page, 5) == .stored)
        #expect(try direct.space.load(at(page)) == 5)
        direct.guest.check()
    }

    @Test func `without caching nothing is left, and beyond the host's addresses neither`() throws {
        let direct = DirectGuest { $0.cachesMMIO = false }
        #expect(direct.guest.load(3) == .mmio)
        #expect(direct.pages.count == 1)
        let other = DirectGuest()
        #expect(other.cpu.access(.read, GuestAddress(1 << 46)) == .mmio)
        #expect(other.pages.count == 1)
        #expect(other.cpu.access(.read, GuestAddress(1 << 46 - 1 << 12)) == .mmio)
        #expect(other.pages.count == 4)
    }

    @Test func `when the generation's bits begin anew everything goes`() throws {
        let direct = DirectGuest()
        #expect(direct.guest.load(3) == .mmio)
        direct.mmu.slotsWillChange(to: 1 << 19 | 1)
        #expect(direct.pages.count == 4)
        direct.vm.slotsLock.lock()
        direct.mmu.slotsWillChange(to: 1 << 19)
        direct.vm.slotsLock.unlock()
        #expect(direct.pages.allSatisfy { $0.role.isInvalid })
        #expect(direct.guest.load(3) == .mmio)
    }

    @Test(arguments: Kind.allCases)
    func `a read-only slot is read, and written by the emulator's user`(kind: Kind) throws {
        let direct = DirectGuest(kind)
        try direct.guest.addMemory(0, 16, readOnly: true)
        try direct.space.store(at(3), 9)
        #expect(direct.guest.load(3) == .value(9))
        #expect(direct.guest.store(3, 1) == .mmio)
        #expect(direct.guest.leaf(3)?.writable == false)
        #expect(try direct.space.load(at(3)) == 9)
        direct.guest.check()
    }

    // MARK: The notifier

    @Test(arguments: Kind.allCases)
    func `the notifier finds every leaf of a range by its reverse map, small and huge`(kind: Kind) throws {
        let direct = DirectGuest(kind, ramFrames: 8192, thp: true, cpus: 2)
        try direct.guest.addMemory(0, 2048)
        for page in [100, 600, 1100] { #expect(direct.guest.store(page, 4, cpu: page % 2) == .stored) }
        #expect(direct.guest.leafCount == 3)
        try direct.space.advise(at(600)..<at(1101), .dontNeed)
        direct.guest.check()
        #expect(direct.guest.leaf(600) == nil && direct.guest.leaf(1100) == nil && direct.guest.leaf(100) != nil)
        #expect(direct.guest.load(600) == .value(0) && direct.guest.load(100) == .value(4))
        direct.guest.check()
    }

    @Test(arguments: Kind.allCases)
    func `a page that was not used since it was aged is old`(kind: Kind) throws {
        let direct = DirectGuest(kind)
        try direct.guest.addMemory(0, 64)
        #expect(direct.guest.store(5, 1) == .stored)
        let range = at(5)..<at(6)
        #expect(direct.space.testYoung(at(5)))
        #expect(direct.space.clearYoung(range))
        #expect(!direct.space.testYoung(at(5)) && !direct.space.clearYoung(range))
        for cpu in direct.guest.cpus { cpu.dropTranslations() }
        let fast = direct.statistics.pf_fast.load(ordering: .relaxed)
        #expect(direct.guest.load(5) == .value(1))
        #expect(direct.space.testYoung(at(5)))
        // Without A the access is a fault that gives the rights back, without the lock.
        #expect(direct.statistics.pf_fast.load(ordering: .relaxed) == fast + (kind == .eptWithoutAD ? 1 : 0))
        #expect(direct.guest.store(5, 2) == .stored)
        direct.guest.check()
    }

    // MARK: The log

    @Test(arguments: Kind.allCases)
    func `a write after a harvest is in the next, and needs no lock`(kind: Kind) throws {
        let direct = DirectGuest(kind, cpus: 2)
        try direct.guest.addMemory(0, 128)
        for page in [3, 70] { #expect(direct.guest.store(page, 1) == .stored) }
        try direct.guest.setSlot(pages: 128, log: true)
        #expect(try direct.vm.getDirtyLog(slot: 0).pages == [])
        #expect(direct.guest.load(70, cpu: 1) == .value(1))
        let fast = direct.statistics.pf_fast.load(ordering: .relaxed)
        #expect(direct.guest.store(70, 2) == .stored)
        #expect(direct.statistics.pf_fast.load(ordering: .relaxed) == fast + 1)
        // The other processor looks at the entry again before it faults.
        #expect(direct.guest.store(70, 3, cpu: 1) == .stored)
        #expect(direct.statistics.pf_fast.load(ordering: .relaxed) == fast + 1)
        direct.guest.check()
        #expect(try direct.vm.getDirtyLog(slot: 0).pages == [70])
        #expect(direct.guest.leaf(70)?.writable == false)
        #expect(direct.guest.store(70, 4) == .stored)
        #expect(try direct.vm.getDirtyLog(slot: 0).pages == [70])
        #expect(try direct.vm.getDirtyLog(slot: 0).pages == [])
        direct.guest.check()
    }

    @Test(arguments: Kind.allCases)
    func `a huge page is broken up by the first write to it while it is logged, and comes back after`(kind: Kind) throws
    {
        let direct = DirectGuest(kind, thp: true)
        try direct.guest.addMemory(0, 1024)
        #expect(direct.guest.store(700, 1) == .stored)
        try direct.guest.setSlot(pages: 1024, log: true)
        // There is no eager split without the TDP MMU.
        #expect(direct.guest.leaf(700)?.level == .page2M && direct.guest.leaf(700)?.writable == false)
        #expect(direct.guest.store(701, 2) == .stored)
        #expect(direct.guest.leaf(701)?.level == .page4K)
        #expect(try direct.vm.getDirtyLog(slot: 0).pages == [701])
        direct.guest.check()
        try direct.guest.setSlot(pages: 1024)
        #expect(direct.guest.leaf(701) == nil)
        #expect(direct.guest.load(700) == .value(1))
        #expect(direct.guest.leaf(701)?.level == .page2M)
        direct.guest.check()
    }

    @Test func `where the MMU maps no larger page the end of logging takes nothing`() throws {
        let direct = DirectGuest(ramFrames: 8192, thp: true) { $0.largestPage = .page4K }
        try direct.guest.addMemory(0, 1024)
        #expect(direct.guest.store(700, 1) == .stored)
        try direct.guest.setSlot(pages: 1024, log: true)
        try direct.guest.setSlot(pages: 1024)
        #expect(direct.guest.leaf(700) != nil)
    }
}
