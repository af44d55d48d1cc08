import Audit
import Frames
import Hardware
import HostMemory
import Testing

@testable import GuestMemory
@testable import Machine
@testable import Paging

/// Ordinary tables for nested paging, as a guest hypervisor on AMD's processors makes them.
@Suite struct X86_4_10_NestedNPT {
    static let table: UInt64 = 0x67
    static let page: UInt64 = 0x67

    private func guest(levels: UInt8 = 4) throws -> NestedGuest {
        try NestedGuest {
            $0.format = .npt
            $0.levels = levels
        }
    }

    private func enter(_ guest: NestedGuest, root: UInt64 = 0x1000) throws {
        try guest.mmu.enterNested(GuestRegisters.longMode(root: GuestAddress(root)), guest.cpu)
    }

    @Test(arguments: [4, 5] as [UInt8])
    func `a nested guest runs on its hypervisor's tables, on a host with as many levels or more`(_ levels: UInt8) throws
    {
        let guest = try guest(levels: levels)
        try guest.makeTables(leaf: Self.page, table: Self.table)
        try enter(guest)
        #expect(guest.cpu.access(.store(7), at: 0x2000) == .stored)
        #expect(guest.cpu.access(.load, at: 0x2000) == .value(7))
        #expect(try guest.value(18) == 7)
        #expect(guest.leafBits(0x2000) == 0xe67)
        let root = try #require(guest.shadowPage(1, level: levels))
        #expect(root.role.isGuestMode && root.role.isPassthrough == (levels == 5))
        // The level that only the host has shadows nothing.
        #expect(root.role.shadowsEntries == (levels == 4) && guest.shadowPage(1, level: 4) != nil)
    }

    @Test func `five levels on a host with four, and EPT, are refused`() throws {
        let guest = try guest()
        #expect(throws: Errno.EINVAL) {
            try guest.mmu.enterNested(GuestRegisters.fiveLevels(root: GuestAddress(0x1000)), guest.cpu)
        }
        #expect(throws: Errno.EINVAL) { try guest.enter() }
    }

    @Test func `a nested page fault tells what was being translated`() throws {
        let guest = try guest()
        try guest.makeTables(leaf: Self.page, table: Self.table)
        try guest.write(4, 2, 0)
        try guest.write(4, 3, NestedGuest.leaf(3, 0x65))
        try enter(guest)
        func fault(_ access: PagedAccess, _ address: UInt64, _ code: UInt64) {
            let exit = NestedExit.pageFault(GuestAddress(address), code: code)
            #expect(guest.cpu.access(access, at: address) == .nestedExit(exit))
        }
        fault(.load, 0x2000, 1 << 32 | 4)
        fault(.store(1), 0x2000, 1 << 32 | 6)
        fault(.store(1), 0x3000, 1 << 32 | 7)
        // A user's access without U.
        try guest.write(4, 5, NestedGuest.leaf(5, 0x63))
        fault(.load, 0x5000, 1 << 32 | 5)
        // A nested guest's own tables: its root is frame 2 of its memory.
        guest.cpu.registers = PagingRegisters(
            cr0: PagingRegisters.pagingBit | 1, cr3: 0x2000, cr4: PagingRegisters.physicalAddressExtensionBit,
            efer: PagingRegisters.longModeBit)
        let exit = NestedExit.pageFault(GuestAddress(0x2000), code: 1 << 33 | 6)
        #expect(guest.cpu.access(.load, at: 0x7000) == .nestedExit(exit))
    }

    @Test func `each entry of the nested guest brings its tables up to date`() throws {
        let guest = try guest()
        try guest.makeTables(leaf: Self.page, table: Self.table)
        try enter(guest)
        #expect(guest.cpu.access(.store(7), at: 0x2000) == .stored)
        guest.mmu.leaveNested(guest.cpu)
        #expect(guest.cpu.access(.store(NestedGuest.leaf(5, Self.page)), at: NestedGuest.place(4, 2)) == .stored)
        #expect(guest.shadowPage(4)?.isUnsync == true)
        try enter(guest)
        #expect(guest.shadowPage(4)?.isUnsync == false)
        #expect(guest.cpu.access(.load, at: 0x2000) == .value(0))
    }

    /// The nested guest's linear page 7 is its page 7; its tables are its pages 8 to 11, and its hypervisor's frames 24 to
    /// 27, among which its own nested tables may be.
    @Test func `a nested guest with paging on reaches its memory in two dimensions`() throws {
        let guest = try guest()
        try guest.makeTables(leaf: Self.page, table: Self.table)
        for (frame, next) in [(24, 9), (25, 10), (26, 11)] { try guest.write(frame, 0, UInt64(next) << 12 | 0x27) }
        try guest.write(27, 7, 0x7000 | 0x67)
        try enter(guest)
        guest.cpu.registers = PagingRegisters(
            cr0: PagingRegisters.pagingBit | 1, cr3: 0x8000, cr4: PagingRegisters.physicalAddressExtensionBit,
            efer: PagingRegisters.longModeBit)
        #expect(guest.cpu.access(.store(3), at: 0x7008) == .stored)
        #expect(try guest.entry(23, 1) == 3)
        #expect(guest.cpu.access(.load, at: 0x7008) == .value(3))
    }

    @Test func `tables that are the hypervisor's own as well are given up when its processor must set their A`() throws
    {
        let guest = try guest()
        // Frame 1 is the root of both: of the hypervisor's linear addresses, and of its guest's memory.
        try guest.makeTables(leaf: Self.page, table: 0x7)
        try enter(guest)
        #expect(guest.cpu.access(.load, at: 0x2000) == .value(0))
        #expect(guest.shadowPage(2, level: 3) != nil)
        guest.mmu.leaveNested(guest.cpu)
        for frame in 1...3 { try guest.write(frame, 0, UInt64(frame + 1) << 12 | 7) }
        guest.cpu.registers = PagingRegisters(
            cr0: PagingRegisters.pagingBit | 1, cr3: 0x1000, cr4: PagingRegisters.physicalAddressExtensionBit,
            efer: PagingRegisters.longModeBit)
        #expect(guest.cpu.access(.load, at: 0x2000) == .value(0))
        #expect(try guest.entry(1, 0) & 0x20 != 0)
    }
}
