import Audit
import Frames
import HostMemory
import Testing

@testable import GuestMemory
@testable import Machine
@testable import Paging

/// Guests of 32 bits, with PAE, and with five levels. Spec: x86 1.2, 4.4, 4.8.
extension PagedGuest {
    /// Writes an entry of 4 bytes as the VMM would.
    func write32(_ frame: Int, _ index: Int, _ entry: UInt32) throws {
        try space.storeHalf(at(frame) + UInt64(index) * 4, UInt64(entry))
    }

    func entry32(_ frame: Int, _ index: Int) throws -> UInt64 { try space.loadHalf(at(frame) + UInt64(index) * 4) }

    /// Directory frame 1; table frame 2 maps the first 64 pages, in its first half and again in its second, for the
    /// first 4 MiB and for the 4 MiB after 1 GiB.
    static func twoLevels(pages: Int = 64, largePages: Bool = true, ramFrames: Int = 1024) throws -> PagedGuest {
        let guest = try PagedGuest(pages: pages, ramFrames: ramFrames)
        for index in [0, 256] { try guest.write32(1, index, 0x2067) }
        for i in 0..<64 {
            for half in [0, 512] { try guest.write32(2, half + i, UInt32(i) << 12 | 0x67) }
        }
        guest.mmu.load(.twoLevels(0x1000, largePages: largePages), on: guest.cpus[0])
        return guest
    }

    /// Pointers at the start of frame 1; the first GiB has directory 2 and table 3, the fourth directory 4 and table 3.
    static func physicalExtension() throws -> PagedGuest {
        let guest = try PagedGuest()
        for (index, directory) in [(0, 2), (3, 4)] {
            try guest.write(1, index, UInt64(directory) << 12 | 1)
            try guest.write(directory, 0, 0x3067)
        }
        for i in 0..<64 { try guest.write(3, i, UInt64(i) << 12 | PagedGuest.page) }
        #expect(guest.mmu.load(.physicalExtension(0x1000), on: guest.cpus[0]))
        return guest
    }

    func expectFault(_ access: PagedAccess, _ address: UInt64, _ code: UInt64) {
        #expect(
            cpus[0].access(access, at: address)
                == .pageFault(GuestPageFault(address: address, code: FaultCode(rawValue: code))))
    }

    func made() -> [PageRole] { test.events(.shadowPageTaken).map { PageRole(rawValue: UInt32($0.value)) } }
}

@Suite struct X1_2_TwoLevelGuests {
    @Test func `four roots shadow the directory, two pages a table`() throws {
        let guest = try PagedGuest.twoLevels()
        let cpu = guest.cpus[0]
        #expect(cpu.access(.store(5), at: 0x9000) == .stored)
        #expect(cpu.access(.load, at: 0x20_9000) == .value(5))
        #expect(cpu.access(.load, at: 0x4000_9000) == .value(5))
        let made = guest.made()
        #expect(made.prefix(4).map(\.quadrant) == [0, 1, 2, 3] && made.prefix(4).allSatisfy { $0.level == 2 })
        #expect(made.dropFirst(4).map(\.quadrant) == [0, 1, 0] && made.dropFirst(4).allSatisfy { $0.level == 1 })
        #expect(made.allSatisfy { $0.has4ByteEntries && !$0.isDirect })
        #expect(guest.test.events(.shadowPageTaken).map(\.guest) == [1, 1, 1, 1, 2, 2, 2])
        #expect(guest.page(2)!.parents.count == 2, "the page of the first half hangs from both directories' entries")
        #expect(try guest.entry32(2, 9) == 0x9067 && guest.entry32(1, 0) == 0x2067)
    }

    @Test func `faults of the guest's own have no F, and 32 bits no reserved ones`() throws {
        let guest = try PagedGuest.twoLevels()
        try guest.write32(2, 20, 0)
        try guest.write32(2, 21, 21 << 12 | 0x65)
        try guest.write32(2, 22, 22 << 12 | 0x63)
        guest.expectFault(.load, 20 << 12, 4)
        guest.expectFault(.fetch, 20 << 12, 4)
        guest.expectFault(.store(1), 21 << 12, 7)
        guest.expectFault(.load, 22 << 12, 5)
        guest.expectFault(.load, 0x40_0000, 4)
        #expect(guest.cpus[0].access(.fetch, at: 23 << 12) == .value(0))
    }

    @Test func `A and D go into entries of 4 bytes, and leave the neighbour alone`() throws {
        let guest = try PagedGuest.twoLevels()
        try guest.write32(1, 0, 0x2007)
        try guest.write32(2, 8, 0x8007)
        try guest.write32(2, 9, 0x9007)
        #expect(guest.cpus[0].access(.load, at: 0x9000) == .value(0))
        #expect(try guest.entry32(1, 0) == 0x2027 && guest.entry32(2, 9) == 0x9027)
        #expect(guest.cpus[0].access(.store(1), at: 0x9000) == .stored)
        #expect(try guest.entry32(2, 8) == 0x8007 && guest.entry32(2, 9) == 0x9067)
    }

    @Test func `a table that the guest writes makes both its pages unsync, and a flush brings both up to date`() throws
    {
        let guest = try PagedGuest.twoLevels()
        let cpu = guest.cpus[0]
        for page in 20..<22 { try guest.space.store(at(page), UInt64(page)) }
        for half in [UInt64(0), 0x20_0000] { #expect(cpu.access(.load, at: half + 20 << 12) == .value(20)) }
        let pair: UInt64 = (21 << 12 | 0x67) | (20 << 12 | 0x67) << 32
        #expect(cpu.access(.store(pair), at: 0x2000 + 20 * 4) == .stored)
        #expect(cpu.access(.store(pair), at: 0x2000 + 532 * 4) == .stored)
        #expect(guest.page(2)!.isUnsync && guest.page(2, quadrant: 1)!.isUnsync)
        #expect(guest.mmu.checkTables() == [])
        cpu.flushAll()
        for half in [UInt64(0), 0x20_0000] {
            #expect(cpu.access(.load, at: half + 20 << 12) == .value(21))
            #expect(cpu.access(.load, at: half + 21 << 12) == .value(20))
        }
        // And one address alone, in the second half.
        #expect(cpu.access(.store(pair &+ 0x1_0000_0000_0000), at: 0x2000 + 532 * 4) == .stored)
        cpu.flush(0x20_0000 + 21 << 12)
        #expect(cpu.access(.load, at: 0x20_0000 + 21 << 12) == .value(try guest.space.load(at(36))))
    }

    @Test func `an emulated write to a directory's entry takes two entries, in its own quadrant alone`() throws {
        let guest = try PagedGuest.twoLevels()
        let cpu = guest.cpus[0]
        for (table, page) in [(3, 30), (4, 31)] {
            for i in [0, 512] { try guest.write32(table, i, UInt32(page) << 12 | 0x67) }
            try guest.space.store(at(page), UInt64(page))
        }
        let addresses: [UInt64] = [0x40_0000, 0x60_0000, 0x4040_0000, 0x4060_0000]
        for index in [1, 257] { try guest.write32(1, index, 0x3067) }
        for address in addresses { #expect(cpu.access(.load, at: address) == .value(30)) }
        try guest.write32(1, 1, 0x4067)
        guest.mmu.guestMemoryWritten(cpu, GuestAddress(0x1004), count: 4)
        #expect(guest.vm.statistics.mmu_pde_zapped.load(ordering: .relaxed) == 2)
        #expect(addresses.map { cpu.access(.load, at: $0) } == [.value(31), .value(31), .value(30), .value(30)])
        try guest.write32(1, 257, 0x4067)
        guest.mmu.guestMemoryWritten(cpu, GuestAddress(0x1404), count: 4)
        #expect(addresses.map { cpu.access(.load, at: $0) } == [.value(31), .value(31), .value(31), .value(31)])
        #expect(guest.vm.statistics.mmu_flooded.load(ordering: .relaxed) == 0)
        // 8 bytes are two entries: no page-table code writes so.
        guest.mmu.guestMemoryWritten(cpu, GuestAddress(0x1000), count: 8)
        #expect(guest.vm.statistics.mmu_flooded.load(ordering: .relaxed) == 4)
        #expect(cpu.access(.load, at: 0x40_0000) == .value(31))
    }

    @Test func `a page of 4 MiB is two of 2 MiB, and PSE-36 takes it above 4 GiB`() throws {
        let guest = try PagedGuest.twoLevels(pages: 1024)
        let cpu = guest.cpus[0]
        let high = 1 << 20
        try guest.space.map(at: at(2048), length: 16 * pageSize, protection: .readWrite, backing: .anonymous)
        try guest.vm.setMemoryRegion(
            MemoryRegion(
                slot: 1, guestAddress: GuestAddress(UInt64(high) << 12), size: 16 * pageSize, userAddress: at(2048)))
        try guest.write32(1, 1, 0xe7)
        try guest.write32(1, 2, 1 << 13 | 0xe7)
        try guest.write32(1, 3, 1 << 17 | 0xe7)
        for (page, value) in [(40, 1), (0x203, 2), (2051, 3)] { try guest.space.store(at(page), UInt64(value)) }
        #expect(cpu.access(.load, at: 0x40_0000 + 40 << 12) == .value(1))
        #expect(cpu.access(.load, at: 0x60_3000) == .value(2))
        #expect(guest.page(0) != nil && guest.page(0x200, quadrant: 1) != nil, "direct, of 2 MiB each")
        #expect(cpu.access(.load, at: 0x80_3000) == .value(3))
        guest.expectFault(.load, 0xc0_0000, 0xd)
    }

    @Test func `without CR4.PSE bit 7 of a directory's entry says nothing`() throws {
        let guest = try PagedGuest.twoLevels(largePages: false)
        try guest.write32(1, 1, 0x20e7)
        try guest.space.store(at(40), 4)
        #expect(guest.cpus[0].access(.load, at: 0x40_0000 + 40 << 12) == .value(4))
    }

    @Test func `where CR3 shows no memory every access faults, and sees the memory that comes`() throws {
        let guest = try PagedGuest()
        let cpu = guest.cpus[0]
        guest.mmu.load(.twoLevels(100 << 12), on: cpu)
        guest.expectFault(.load, 0x9000, 4)
        try guest.space.map(at: at(100), length: pageSize, protection: .readWrite, backing: .anonymous)
        try guest.write32(100, 0, 0x2067)
        try guest.write32(2, 9, 0x9067)
        try guest.vm.setMemoryRegion(
            MemoryRegion(slot: 1, guestAddress: GuestAddress(100 << 12), size: pageSize, userAddress: at(100)))
        #expect(cpu.access(.store(1), at: 0x9000) == .stored)
    }
}

@Suite struct X1_2_ExtendedGuests {
    @Test func `each present pointer has a root of level 2`() throws {
        let guest = try PagedGuest.physicalExtension()
        let cpu = guest.cpus[0]
        #expect(cpu.access(.store(5), at: 0x9000) == .stored)
        #expect(cpu.access(.load, at: 0xc000_9000) == .value(5))
        #expect(guest.test.events(.shadowPageTaken).prefix(2).map(\.guest) == [2, 4])
        #expect(guest.made().allSatisfy { !$0.has4ByteEntries && $0.quadrant == 0 })
        #expect(guest.page(3)!.parents.count == 2)
        guest.expectFault(.load, 0x4000_0000, 4)
    }

    @Test func `NX and reserved bits are as with four levels, and bits 62 to 52 are reserved`() throws {
        let guest = try PagedGuest.physicalExtension()
        try guest.write(3, 20, 20 << 12 | 0x67 | 1 << 63)
        try guest.write(3, 21, 21 << 12 | 0x67 | 1 << 55)
        guest.expectFault(.fetch, 20 << 12, 0x15)
        guest.expectFault(.load, 21 << 12, 0xd)
    }

    @Test func `pointers count as they were when CR3 was loaded; reserved bits in one refuse the load`() throws {
        let guest = try PagedGuest.physicalExtension()
        let cpu = guest.cpus[0]
        try guest.space.store(at(9), 9)
        try guest.write(1, 1, 2 << 12 | 1)
        guest.expectFault(.load, 0x4000_9000, 4)
        #expect(guest.mmu.load(.physicalExtension(0x1000), on: cpu))
        #expect(cpu.access(.load, at: 0x4000_9000) == .value(9))
        for bit in [UInt64(1), 2, 5, 8, 50, 63] {
            try guest.write(1, 2, 2 << 12 | 1 | 1 << bit)
            #expect(!guest.mmu.load(.physicalExtension(0x1000), on: cpu), "bit \(bit)")
        }
        try guest.write(1, 2, 2 << 12 | 1 << 63)
        #expect(guest.mmu.load(.physicalExtension(0x1000), on: cpu), "it is not present")
    }

    @Test func `tables go out of sync and come back, under every pointer that leads to them`() throws {
        let guest = try PagedGuest.physicalExtension()
        let cpu = guest.cpus[0]
        for page in 20..<22 { try guest.space.store(at(page), UInt64(page)) }
        for base in [UInt64(0), 0xc000_0000] { #expect(cpu.access(.load, at: base + 20 << 12) == .value(20)) }
        #expect(cpu.access(.store(21 << 12 | PagedGuest.page), at: 0x3000 + 20 * 8) == .stored)
        #expect(guest.page(3)!.isUnsync && guest.mmu.checkTables() == [])
        cpu.flush(20 << 12)
        #expect(cpu.access(.load, at: 20 << 12) == .value(21))
        cpu.flushAll()
        #expect(cpu.access(.load, at: 0xc000_0000 + 20 << 12) == .value(21))
        #expect(!guest.page(3)!.isUnsync)
    }

    @Test func `a write of half an entry counts as one of the entry`() throws {
        let guest = try PagedGuest.physicalExtension()
        let cpu = guest.cpus[0]
        for (table, page) in [(3, 30), (5, 31)] {
            try guest.write(table, 0, UInt64(page) << 12 | PagedGuest.page)
            try guest.space.store(at(page), UInt64(page))
        }
        #expect(cpu.access(.load, at: 0) == .value(30))
        try guest.write(2, 0, 0x5067)
        guest.mmu.guestMemoryWritten(cpu, GuestAddress(0x2004), count: 4)
        #expect(guest.vm.statistics.mmu_pde_zapped.load(ordering: .relaxed) == 1)
        #expect(cpu.access(.load, at: 0) == .value(31))
    }

    @Test func `a request to free obsolete roots makes the four anew (x86 4.4)`() throws {
        let guest = try PagedGuest.physicalExtension()
        let cpu = guest.cpus[0]
        #expect(cpu.access(.store(5), at: 0x9000) == .stored)
        try guest.vm.setMemoryRegion(
            MemoryRegion(slot: 0, guestAddress: GuestAddress(0), size: 0, userAddress: at(0)))
        guest.expectFault(.load, 0x9000, 4)
        try guest.setSlot()
        #expect(cpu.access(.load, at: 0x9000) == .value(5))
        #expect(guest.mmu.checkTables() == [])
    }
}

@Suite struct X1_2_FiveLevelGuests {
    @Test func `addresses beyond 48 bits have tables of their own`() throws {
        let guest = try PagedGuest()
        let cpu = guest.cpus[0]
        try guest.write(1, 0, 0x2007)
        try guest.write(1, 1, 0x2007)
        try guest.write(2, 0, 0x3007)
        try guest.write(3, 0, 0x4007)
        try guest.write(4, 0, 0x5007)
        for i in 0..<64 { try guest.write(5, i, UInt64(i) << 12 | PagedGuest.page) }
        guest.mmu.load(.fiveLevels(root: GuestAddress(0x1000)), on: cpu)
        let high: UInt64 = 1 << 48
        #expect(cpu.access(.store(5), at: high + 0x9000) == .stored)
        #expect(cpu.access(.load, at: 0x9000) == .value(5))
        #expect(guest.made().map(\.level) == [5, 4, 3, 2, 1, 4], "the last is found again, for the lower addresses")
        guest.expectFault(.load, 2 << 48, 4)
        try guest.space.store(at(20), 20)
        #expect(cpu.access(.store(20 << 12 | PagedGuest.page), at: 0x5000 + 21 * 8) == .stored)
        #expect(guest.page(2, level: 4)!.parents.count == 2 && guest.page(1, level: 5)!.unsyncChildren == 2)
        cpu.flushAll()
        #expect(cpu.access(.load, at: high + 21 << 12) == .value(20))
        #expect(cpu.access(.store(0x2067), at: 0x1008) == .emulated)
        #expect(cpu.access(.load, at: high + 0x9000) == .value(5))
    }
}
