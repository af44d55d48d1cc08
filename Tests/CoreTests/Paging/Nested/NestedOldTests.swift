import Audit
import Frames
import Hardware
import HostMemory
import Testing

@testable import GuestMemory
@testable import Machine
@testable import Paging

/// Nested paging for hypervisors of 32 bits and with PAE: walks, faults, rights.
@Suite struct X86_4_10_NestedOldPaging {
    @Test(arguments: OldPaging.allCases, [4, 5] as [UInt8])
    func `a nested guest runs on tables of fewer levels than its host's`(_ paging: OldPaging, _ levels: UInt8) throws {
        let guest = try NestedGuest.old(paging, levels: levels)
        try guest.enter(paging)
        #expect(guest.cpu.access(.store(7), at: 0x2000) == .stored)
        #expect(guest.cpu.access(.load, at: paging.otherBase | 0x2000) == .value(7))
        #expect(try guest.value(18) == 7)
        #expect(guest.leafBits(0x2000) == 0xe67)
        let roots = guest.taken().prefix { $0.level == 2 }
        #expect(roots.count == (paging == .twoLevels ? 4 : 2))
        #expect(roots.map(\.quadrant) == (paging == .twoLevels ? [0, 1, 2, 3] : [0, 0]))
        #expect(guest.taken().allSatisfy { $0.isGuestMode && !$0.isPassthrough && $0.shadowsEntries && $0.level <= 2 })
        #expect(guest.mmu.rootPointer(for: guest.cpu) == guest.cpu.root?.physicalAddress)
        // Hand-made, from the top to the four.
        var table = try #require(guest.cpu.root)
        for level in stride(from: levels, to: 2, by: -1) {
            let entry = guest.vm.memory.entry(0, of: table).load()
            #expect(entry & ~EntryBits.frameMask == 0x27, "level \(level)")
            table = EntryBits.field.frame(in: entry)
        }
        #expect(
            guest.shadowPage(UInt64(paging.directory), level: 2) != nil && guest.nested.page(of: table).role.level == 2)
    }

    @Test(arguments: OldPaging.allCases)
    func `faults say what the hypervisor's tables lack, of a user always`(_ paging: OldPaging) throws {
        let guest = try NestedGuest.old(paging)
        let table = paging.lowestTable
        try guest.write(paging, table, 2, 0)
        try guest.write(paging, table, 3, OldPaging.leaf(3, 0x65))
        try guest.write(paging, table, 5, OldPaging.leaf(5, 0x63))
        try guest.enter(paging)
        guest.expectExit(.load, 0x2000, 4)
        guest.expectExit(.store(1), 0x2000, 6)
        guest.expectExit(.store(1), 0x3000, 7)
        guest.expectExit(.load, 0x5000, 5)
        guest.expectExit(.load, 0x8000_0000, 4)
        // F where there is NX.
        guest.expectExit(.fetch, 0x2000, paging == .twoLevels ? 4 : 0x14)
        #expect(guest.cpu.access(.fetch, at: 0x4000) == .value(0))
    }

    @Test(arguments: OldPaging.allCases)
    func `A and D are the hypervisor's to see, and a clean page is written once more`(_ paging: OldPaging) throws {
        let guest = try NestedGuest.old(paging, flags: 7)
        let table = paging.lowestTable
        // No page of zeros.
        try guest.space.store(at(25), 4)
        try guest.enter(paging)
        #expect(guest.cpu.access(.load, at: 0x9000) == .value(4))
        #expect(guest.leafBits(0x9000) == 0xa25)
        #expect(try guest.entry(paging, paging.directory, 0) == UInt64(table) << 12 | 0x27)
        #expect(try guest.entry(paging, table, 9) == OldPaging.leaf(9, 0x27))
        #expect(guest.cpu.access(.store(1), at: 0x9000) == .stored)
        #expect(guest.leafBits(0x9000) == 0xe67)
        #expect(try guest.entry(paging, table, 9) == OldPaging.leaf(9, 0x67))
        for neighbour in [8, 10] { #expect(try guest.entry(paging, table, neighbour) == OldPaging.leaf(neighbour, 7)) }
        if paging == .extended { #expect(try guest.entry(1, 0) == 0x2001, "a pointer has no A") }
    }

    @Test func `NX and reserved bits of PAE, of entries and of pointers`() throws {
        let guest = try NestedGuest.old(.extended)
        try guest.write(3, 2, OldPaging.leaf(2) | 1 << 63)
        try guest.write(3, 3, OldPaging.leaf(3) | 1 << 55)
        try guest.write(1, 1, 0x2001 | 1 << 63)
        try guest.write(1, 2, 0x2000)
        try guest.enter(.extended)
        guest.expectExit(.fetch, 0x2000, 0x15)
        guest.expectExit(.load, 0x3000, 0xd)
        guest.expectExit(.load, 0x4000_2000, 0xd)
        guest.expectExit(.load, 0x8000_2000, 4)
        for bit in [1, 2, 5, 8, 50] {
            try guest.write(1, 1, 0x2001 | 1 << UInt64(bit))
            guest.expectExit(.store(1), 0x4000_2000, 0xf)
        }
    }

    @Test func `pointers of PAE are read in every walk`() throws {
        let guest = try NestedGuest.old(.extended, cpus: 2)
        try guest.write(6, 0, 0x7000 | OldPaging.table)
        for i in 0..<32 {
            try guest.write(7, i, OldPaging.leaf(31 - i))
            try guest.space.store(at(16 + i), UInt64(i))
        }
        try guest.enter(.extended)
        #expect(guest.cpu.access(.load, at: 0x2000) == .value(2))
        guest.expectExit(.load, 0x4000_2000, 4)
        try guest.write(1, 1, 0x2001)
        #expect(guest.cpu.access(.load, at: 0x4000_2000) == .value(2))
        // Another directory: what its walks find does not get under the page of the first.
        try guest.write(1, 0, 0x6001)
        #expect(guest.cpu.access(.load, at: 0x1f_0000) != .value(0))
        #expect(guest.cpu.access(.load, at: 0x9000) == .value(22))
        #expect(guest.shadowPage(7)?.parents.count == 1 && guest.shadowPage(3)?.parents.count == 1)
        #expect(guest.cpu.access(.load, at: 0x4000_9000) == .value(9))
        try guest.write(1, 0, 0x2001)
        try guest.enter(.extended, guest.cpus[1])
        #expect(guest.cpus[1].access(.load, at: 0xa000) == .value(10))
        #expect(guest.mmu.checkTables() == [])
    }

    @Test(arguments: OldPaging.allCases)
    func `an address of more than 32 bits is a nested page fault`(_ paging: OldPaging) throws {
        let guest = try NestedGuest.old(paging)
        // The nested guest is in 64-bit mode: its tables are its pages 8 to 11.
        for (frame, next) in [(24, 9), (25, 10), (26, 11)] { try guest.write(frame, 0, UInt64(next) << 12 | 0x27) }
        try guest.write(27, 7, 0x2000 | 0x67)
        try guest.enter(paging)
        guest.cpu.registers = PagingRegisters(
            cr0: PagingRegisters.pagingBit | 1, cr3: 0x8000, cr4: PagingRegisters.physicalAddressExtensionBit,
            efer: PagingRegisters.longModeBit)
        #expect(guest.cpu.access(.store(3), at: 0x7008) == .stored)
        #expect(try guest.entry(18, 1) == 3)
        for bit in 32..<46 as Range<UInt64> {
            try guest.write(27, 7, 1 << bit | 0x2067)
            guest.cpu.dropTranslations()
            let exit = NestedExit.pageFault(GuestAddress(1 << bit | 0x2008), code: 1 << 32 | 4)
            #expect(guest.cpu.access(.load, at: 0x7008) == .nestedExit(exit), "bit \(bit)")
        }
        try guest.write(27, 7, 0x3067)
        guest.cpu.dropTranslations()
        #expect(guest.cpu.access(.load, at: 0x7008) == .value(0))
    }

    @Test(arguments: OldPaging.allCases)
    func `where nCR3 shows no memory every access faults, and sees the memory that comes`(_ paging: OldPaging) throws {
        let guest = try NestedGuest.old(paging)
        var registers = paging.registers
        registers.cr3 = 100 << 12
        try guest.mmu.enterNested(registers, guest.cpu)
        guest.expectExit(.load, 0x9000, 4)
        try guest.space.map(at: at(100), length: pageSize, protection: .readWrite, backing: .anonymous)
        try guest.write(paging, 100, 0, paging == .twoLevels ? 0x2067 : 0x2001)
        try guest.vm.setMemoryRegion(
            MemoryRegion(slot: 1, guestAddress: GuestAddress(100 << 12), size: pageSize, userAddress: at(100)))
        #expect(guest.cpu.access(.store(1), at: 0x9000) == .stored)
        #expect(try guest.value(25) == 1)
    }

    @Test func `without paging there is no nested paging`() throws {
        let guest = try NestedGuest.old(.twoLevels)
        #expect(throws: Errno.EINVAL) { try guest.mmu.enterNested(GuestRegisters.unpaged, guest.cpu) }
    }

    @Test(arguments: OldPaging.allCases)
    func `memory runs out and comes back`(_ paging: OldPaging) throws {
        var failures = 0
        // The reverse map, three tables by hand, tables in reserve, and, after the last, none.
        for failing in 1...12 {
            let guest = try NestedGuest.old(paging, levels: 5)
            guest.test.memory.failAllocation(failing)
            try guest.enter(paging)
            let first = guest.cpu.access(.load, at: 0)
            if first == .failed(.ENOMEM) { failures += 1 } else { #expect(first == .value(0)) }
            guest.test.memory.failAllocation(0)
            #expect(guest.cpu.access(.load, at: 0) == .value(0))
        }
        #expect(failures >= 10)
    }
}
