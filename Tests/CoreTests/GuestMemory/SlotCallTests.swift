import Audit
import Frames
import Machine
import Testing

@testable import GuestMemory
@testable import HostMemory

/// `KVM_SET_USER_MEMORY_REGION`: which errno, and in which order. The numbers are the table's rows.
@Suite struct G4_4_SetMemoryRegion {
    struct Row: CustomTestStringConvertible, Sendable {
        let testDescription: String
        let errno: Errno
        let region: @Sendable (inout MemoryRegion) -> Void
    }

    /// What is wrong whatever the slots are; each is tried for an absent slot, a present one, and a deletion.
    static let shapes: [Row] = [
        Row(testDescription: "3: slot id beyond the user's", errno: .EINVAL) { $0.slot = 32764 },
        Row(testDescription: "3: largest id", errno: .EINVAL) { $0.slot = 0xffff },
        Row(testDescription: "9: another address space", errno: .EINVAL) { $0.slot |= 1 << 16 },
        Row(testDescription: "5: size no multiple of a page", errno: .EINVAL) { $0.size += 8 },
        Row(testDescription: "6: guest address unaligned", errno: .EINVAL) {
            $0.guestAddress = $0.guestAddress + 0x10
        },
        Row(testDescription: "7: user address unaligned", errno: .EINVAL) { $0.userAddress = $0.userAddress + 1 },
        Row(testDescription: "7: user address of the kernel", errno: .EINVAL) {
            $0.userAddress = UserAddress(0xffff_8000_0000_0000)
        },
        Row(testDescription: "7: beyond the end of user space", errno: .EINVAL) {
            $0.userAddress = UserAddress.end + pageSize
        },
    ]

    @Test(arguments: shapes)
    func `a bad shape is refused for create, change and delete`(row: Row) throws {
        let guest = TestGuest()
        try guest.addMemory(0, 4)
        let bases = [guest.region(5, guest: 8, pages: 2, host: 0), guest.region(0, pages: 4, log: true)]
        for base in bases {
            var region = base
            row.region(&region)
            #expect(throws: row.errno) { try guest.vm.setMemoryRegion(region) }
        }
        var deletion = MemoryRegion(slot: 0, guestAddress: GuestAddress(0), size: 0, userAddress: at(0))
        row.region(&deletion)
        #expect(throws: row.errno) { try guest.vm.setMemoryRegion(deletion) }
        #expect(guest.vm.activeSlots.count == 1 && guest.vm.activeSlots[0].flags == SlotFlags())
        #expect(guest.vm.slotsGeneration == 1)
    }

    @Test func `7, I-22: a slot may end where user space ends, and not one page later`() throws {
        let guest = TestGuest()
        var region = guest.region(0, pages: 2)
        region.userAddress = UserAddress(UserAddress.end.value - pageSize)
        #expect(throws: Errno.EINVAL) { try guest.vm.setMemoryRegion(region) }
        region.size = pageSize
        try guest.vm.setMemoryRegion(region)
    }

    @Test func `7: a user range that wraps`() {
        let guest = TestGuest()
        var region = guest.region(0, pages: 1)
        region.size = 0 &- 0x7000_0000_0000 &+ pageSize
        #expect(throws: Errno.EINVAL) { try guest.vm.setMemoryRegion(region) }
    }

    @Test func `10: a guest range that wraps`() {
        let guest = TestGuest()
        var region = guest.region(0, pages: 2)
        region.guestAddress = GuestAddress(0 &- pageSize)
        #expect(throws: Errno.EINVAL) { try guest.vm.setMemoryRegion(region) }
        region.guestAddress = GuestAddress(0 &- 2 * pageSize)
        #expect(throws: Errno.EINVAL) { try guest.vm.setMemoryRegion(region) }
    }

    @Test func `11: more pages than a slot may have`() throws {
        let guest = TestGuest()
        var region = guest.region(0, pages: 1)
        region.userAddress = UserAddress(pageSize)
        region.size = (1 << 31) << pageShift
        #expect(throws: Errno.EINVAL) { try guest.vm.setMemoryRegion(region) }
    }

    @Test func `12: deleting what is not there`() {
        let guest = TestGuest()
        #expect(throws: Errno.EINVAL) { try guest.deleteSlot(3) }
    }

    @Test func `15: size, user address and READONLY of a slot never change`() throws {
        let guest = TestGuest()
        try guest.space.mapPages(0, 8)
        try guest.setSlot(0, pages: 4)
        let changes = [
            guest.region(0, pages: 3), guest.region(0, pages: 5), guest.region(0, pages: 4, host: 1),
            guest.region(0, pages: 4, readOnly: true), guest.region(0, pages: 4, log: true, readOnly: true),
            guest.region(0, guest: 64, pages: 4, host: 1),
        ]
        for region in changes { #expect(throws: Errno.EINVAL) { try guest.vm.setMemoryRegion(region) } }
        #expect(guest.vm.slotsGeneration == 1)
    }

    @Test func `15 goes before 17: a changed slot that would also overlap is EINVAL`() throws {
        let guest = TestGuest()
        try guest.space.mapPages(0, 8)
        try guest.setSlot(0, pages: 2)
        try guest.setSlot(1, guest: 4, pages: 2)
        #expect(throws: Errno.EINVAL) { try guest.vm.setMemoryRegion(guest.region(0, guest: 4, pages: 2, host: 1)) }
        #expect(throws: Errno.EEXIST) { try guest.vm.setMemoryRegion(guest.region(0, guest: 4, pages: 2, host: 0)) }
    }

    @Test func `16: the same slot again is nothing, not even a new generation`() throws {
        let guest = TestGuest()
        try guest.addMemory(0, 4, log: true)
        let slot = try #require(guest.vm.activeSlots.first)
        try guest.setSlot(pages: 4, log: true)
        #expect(guest.vm.slotsGeneration == 1 && guest.vm.activeSlots.first === slot)
    }

    @Test func `17: create and move may not overlap another slot, but may touch it`() throws {
        let guest = TestGuest()
        try guest.space.mapPages(0, 16)
        try guest.setSlot(0, guest: 4, pages: 4)
        for (first, count) in [(0, 5), (7, 1), (5, 2), (3, 6), (4, 4)] {
            #expect(throws: Errno.EEXIST) { try guest.setSlot(1, guest: first, pages: count) }
        }
        try guest.setSlot(1, guest: 0, pages: 4)
        try guest.setSlot(2, guest: 8, pages: 4)
        #expect(throws: Errno.EEXIST) { try guest.setSlot(2, guest: 7, pages: 4, host: 8) }
        try guest.setSlot(0, guest: 40, pages: 4, host: 4)
        try guest.setSlot(2, guest: 7, pages: 4, host: 8)
        #expect(guest.vm.slotSetsAgree())
    }

    @Test func `17: a move may overlap the slot's own old place`() throws {
        let guest = TestGuest()
        try guest.addMemory(0, 4)
        try guest.setSlot(guest: 2, pages: 4, host: 0)
        #expect(guest.vm.activeSlots.map(\.baseFrame) == [gfn(2)])
    }

    @Test(arguments: Architecture.twoStage)
    func `22: beyond the guest's address bits, and 17 before it`(architecture: Architecture) throws {
        let guest = TestGuest(architecture)
        let errno: Errno = ArchitectureSet.x86.contains(architecture) ? .EINVAL : .EFAULT
        let end = GuestAddress(1 << UInt64(guest.vm.mmu.guestAddressBits))
        try guest.space.mapPages(0, 8)
        var region = guest.region(0, pages: 2)
        region.guestAddress = GuestAddress(end.value - pageSize)
        #expect(throws: errno) { try guest.vm.setMemoryRegion(region) }
        #expect(guest.vm.slotsGeneration == 0)
        region.size = pageSize
        try guest.vm.setMemoryRegion(region)
        region.slot = 1
        region.size = 2 * pageSize
        #expect(throws: Errno.EEXIST) { try guest.vm.setMemoryRegion(region) }
    }

    @Test(arguments: [Architecture.riscvSv39x4, .riscvSv48x4])
    func `22: RISC-V wants a writable mapping for a writable slot, and no log over a PFN map`(
        architecture: Architecture
    ) throws {
        let guest = TestGuest(architecture)
        let bar = try #require(DeviceBAR(guest.test.host, pages: 1, filling: .atMap))
        try guest.space.mapPages(0, 1, .anonymous, .read)
        try guest.space.mapPages(4, 1, .driver(bar))
        #expect(throws: Errno.EPERM) { try guest.setSlot(pages: 1) }
        try guest.setSlot(pages: 1, readOnly: true)
        #expect(throws: Errno.EINVAL) { try guest.setSlot(1, guest: 4, pages: 1, log: true) }
        try guest.setSlot(1, guest: 4, pages: 1)
        #expect(throws: Errno.EINVAL) { try guest.setSlot(1, guest: 4, pages: 1, log: true) }
        #expect(guest.vm.activeSlots.allSatisfy { !$0.isLogged })
        #expect(guest.vm.slotsGeneration == 2)
    }
}
