import Audit
import Frames
import Hardware
import HostMemory
import Testing

@testable import GuestMemory
@testable import Machine
@testable import Paging

@Suite struct X86_4_10_NestedEPT {
    @Test func `a nested guest reaches its hypervisor's frames through one table`() throws {
        let guest = try NestedGuest()
        try guest.makeTables()
        try guest.enter()
        #expect(guest.cpu.access(.store(7), at: 0x2000) == .stored)
        #expect(try guest.value(18) == 7)
        #expect(guest.cpu.access(.load, at: 0x2000) == .value(7))
        // R W X, write-back, IPAT, A, D, present, HW, MW. Spec: x86 1.4.
        #expect(guest.leafBits(0x2000) == 0x8600_0000_0000_0b77)
        #expect(guest.leaf(0x2000).map { EntryBits.field.frame(in: $0) } == guest.frame(18))
        // The reverse map knows the hypervisor's frame.
        #expect(guest.nested.reverseMap(guest.vm.activeSlots[0]).entries(GuestFrame(18), .page4K).count == 1)
        let root = try #require(guest.shadowPage(1, level: 4))
        #expect(root.role.rawValue == 4 | 7 << 8 | 1 << 17)
    }

    @Test func `the hypervisor's own accesses go on through its own tables`() throws {
        let guest = try NestedGuest()
        try guest.makeTables()
        #expect(guest.cpu.access(.store(5), at: 0xa000) == .stored)
        try guest.enter()
        #expect(guest.cpu.access(.store(7), at: 0xa000) == .stored)
        guest.mmu.leaveNested(guest.cpu)
        #expect(guest.cpu.access(.load, at: 0xa000) == .value(5))
        #expect(guest.cpu.access(.load, at: 0x1_a000) == .value(7))
        // The tables of the nested guest are still there, and found again.
        let made = guest.test.events(.shadowPageTaken).count
        try guest.enter()
        #expect(guest.cpu.access(.load, at: 0xa000) == .value(7))
        #expect(guest.test.events(.shadowPageTaken).count == made)
    }

    @Test(
        arguments: [
            // The access, the hypervisor's entry, what it sees: access, rights, an address is known, final.
            (PagedAccess.load, UInt64(0), UInt64(0x181)), (.store(1), 0, 0x182), (.fetch, 0, 0x184),
            (.store(1), 5, 0x1aa), (.fetch, 3, 0x19c), (.load, 4, 0x1a1),
        ] as [(PagedAccess, UInt64, UInt64)])
    func `what its tables do not permit the hypervisor hears of`(
        _ access: PagedAccess, _ rights: UInt64, _ qualification: UInt64
    ) throws {
        let guest = try NestedGuest()
        try guest.makeTables()
        let leaf = rights == 0 ? 0 : NestedGuest.leaf(2, rights | 6 << 3 | 3 << 8)
        try guest.write(4, 2, leaf)
        try guest.enter()
        let expected = NestedExit.violation(GuestAddress(0x2000), qualification: qualification)
        #expect(guest.cpu.access(access, at: 0x2000) == .nestedExit(expected))
        #expect(guest.cpu.statistics.pf_guest.load(ordering: .relaxed) == 0)
    }

    @Test(
        arguments: [
            UInt64(2), 6, 0x17, 0x1f, 0x3f, 0x4000_0000_0007,
        ])
    func `an entry that means nothing is a misconfiguration`(_ bits: UInt64) throws {
        let guest = try NestedGuest()
        try guest.makeTables()
        try guest.write(4, 2, NestedGuest.leaf(2, bits))
        try guest.enter()
        let expected = PagedAccessResult.nestedExit(.misconfiguration(GuestAddress(0x2000)))
        #expect(guest.cpu.access(.load, at: 0x2000) == expected)
    }

    @Test func `a link with a leaf's bits is a misconfiguration`() throws {
        for bits in [UInt64(1) << 3, 1 << 6, 1 << 7] {
            let guest = try NestedGuest()
            try guest.makeTables()
            try guest.write(1, 0, 0x2000 | NestedGuest.table | bits)
            try guest.enter()
            let expected = PagedAccessResult.nestedExit(.misconfiguration(GuestAddress(0)))
            #expect(guest.cpu.access(.load, at: 0) == expected)
        }
    }

    @Test func `A and D go into the hypervisor's entries, and a clean page faults when it is written`() throws {
        let guest = try NestedGuest(log: true)
        try guest.makeTables(leaf: 7 | 6 << 3)
        try guest.enter()
        _ = try guest.vm.getDirtyLog(slot: 0)
        #expect(guest.cpu.access(.load, at: 0x2000) == .value(0))
        #expect(try guest.entry(4, 2) == NestedGuest.leaf(2, 7 | 6 << 3 | 1 << 8))
        #expect(try guest.entry(1, 0) & 1 << 8 != 0)
        #expect(guest.leafBits(0x2000).map { $0 & EntryBits.write } == 0)
        // The tables have been written: frames 1 to 4.
        #expect(try guest.vm.getDirtyLog(slot: 0) == [0b1_1110])
        #expect(guest.cpu.access(.store(1), at: 0x2000) == .stored)
        #expect(try guest.entry(4, 2) == NestedGuest.leaf(2))
        #expect(try guest.vm.getDirtyLog(slot: 0) == [1 << 18 | 1 << 4])
    }

    @Test func `without A and D in the hypervisor's tables they stay as they are, and ageing sets rights aside`() throws
    {
        let guest = try NestedGuest()
        try guest.makeTables(leaf: 7 | 6 << 3)
        try guest.enter(NestedGuest.pointerWithoutAD)
        #expect(guest.cpu.access(.store(3), at: 0x2000) == .stored)
        #expect(try guest.entry(4, 2) == NestedGuest.leaf(2, 7 | 6 << 3))
        #expect(guest.mmu.rootPointer(for: guest.cpu) & 1 << 6 == 0)
        #expect(guest.leafBits(0x2000).map { $0 & EntryBits.adType } == EntryBits.adDisabled)
        #expect(guest.isYoung(18, clearing: true))
        #expect(!guest.isYoung(18, clearing: false))
        let aged = try #require(guest.leafBits(0x2000))
        #expect(guest.mmu.bits.isAccessTracked(aged))
        #expect(aged & (EntryBits.savedRead | EntryBits.savedExecute) == EntryBits.savedRead | EntryBits.savedExecute)
        guest.cpu.dropTranslations()
        #expect(guest.cpu.access(.load, at: 0x2000) == .value(3))
        #expect(guest.leafBits(0x2000).map { $0 & 7 } == 7)
    }

    @Test func `the page-modification log never sees a nested guest's write`() throws {
        let guest = try NestedGuest(log: true) { $0.modificationLogEntries = 512 }
        try guest.makeTables(table: NestedGuest.table | 1 << 8)
        try guest.enter()
        _ = try guest.vm.getDirtyLog(slot: 0)
        for round in 0..<2 {
            #expect(guest.cpu.access(.store(UInt64(round)), at: 0x3000) == .stored)
            #expect(guest.leafBits(0x3000).map { $0 & EntryBits.adType } == EntryBits.writeProtectOnly)
            #expect(try guest.vm.getDirtyLog(slot: 0) == [1 << 19])
        }
    }

    @Test func `a hypervisor that is none's guest has no such tables`() throws {
        let guest = try NestedGuest()
        #expect(throws: Errno.EINVAL) { try guest.enter(NestedGuest.pointer | 1 << 46) }
        #expect(throws: Errno.EINVAL) { try guest.enter(0x1000 | 6 | 4 << 3) }
        #expect(throws: Errno.EINVAL) { try guest.enter(0x1000 | 1 | 3 << 3) }
        #expect(throws: Errno.EINVAL) {
            try guest.mmu.enterNested(GuestRegisters.longMode(root: GuestAddress(0x1000)), guest.cpu)
        }
        let plain = TDPMachine()
        #expect(throws: Errno.EINVAL) {
            try plain.mmu.enterNested(EPTTables(pointer: NestedGuest.pointer), plain.cpu)
        }
    }

    @Test func `where there is no table nobody can go, and memory that comes later is found`() throws {
        let guest = try NestedGuest()
        try guest.enter(NestedGuest.pointer & 0xfff | 0x80_0000)
        let exit = NestedExit.violation(GuestAddress(0x2000), qualification: 0x181 | 7 << 3)
        #expect(guest.cpu.access(.load, at: 0x2000) == .nestedExit(exit))
        try guest.makeTables()
        try guest.enter()
        #expect(guest.cpu.access(.load, at: 0x2000) == .value(0))
    }

    @Test func `reverse maps are made with the first nested guest, and for slots of later`() throws {
        let guest = try NestedGuest()
        #expect(guest.vm.activeSlots.allSatisfy { $0.extra == nil } && !guest.nested.knowsSlots)
        try guest.makeTables()
        try guest.enter()
        _ = guest.cpu.access(.load, at: 0)
        #expect(guest.vm.activeSlots.allSatisfy { $0.extra is ReverseMap } && guest.nested.knowsSlots)
        try guest.space.map(at: at(64), length: 4 * pageSize, protection: .readWrite, backing: .anonymous)
        try guest.vm.setMemoryRegion(
            MemoryRegion(slot: 1, guestAddress: GuestAddress(0x10_0000), size: 4 * pageSize, userAddress: at(64)))
        #expect(guest.vm.activeSlots.allSatisfy { $0.extra is ReverseMap })
    }
}
