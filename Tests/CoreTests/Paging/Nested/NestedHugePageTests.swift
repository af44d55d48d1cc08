import Audit
import Frames
import HostMemory
import Testing

@testable import GuestMemory
@testable import Machine
@testable import Paging

@Suite struct X86_4_10_NestedHugePages {
    private static let huge = NestedGuest.page | 1 << 7

    /// The hypervisor maps 2 MiB of its memory, from 2 MiB on, at its guest's 0.
    private func guest(thp: Bool, _ change: (inout TDPConfiguration) -> Void = { _ in }) throws -> NestedGuest {
        let guest = try NestedGuest(pages: 1024, ramFrames: 4096, thp: thp, change)
        try guest.makeTables(count: 0)
        try guest.write(3, 0, 0x20_0000 | Self.huge)
        try guest.enter()
        return guest
    }

    private func leafLevel(_ guest: NestedGuest, _ address: UInt64) -> PageLevel? {
        guest.nested.leaf(of: guest.cpu, at: address)?.level
    }

    @Test func `a huge page of the hypervisor's over one of the host's is one of KVM's`() throws {
        let guest = try guest(thp: true)
        #expect(guest.cpu.access(.store(7), at: 0x5000) == .stored)
        #expect(leafLevel(guest, 0x5000) == .page2M)
        #expect(try guest.value(512 + 5) == 7)
        #expect(guest.leafBits(0x5000) == 0x8600_0000_0000_0bf7)
    }

    @Test func `over small pages of the host's it is many small ones, in a table that shadows nothing`() throws {
        let guest = try guest(thp: false)
        #expect(guest.cpu.access(.store(7), at: 0x5000) == .stored)
        #expect(leafLevel(guest, 0x5000) == .page4K)
        let page = try #require(guest.shadowPage(512))
        #expect(page.role.isDirect && page.role.isGuestMode)
        #expect(guest.cpu.access(.load, at: 0x6000) == .value(0))
    }

    @Test func `logging makes small ones of it, and its end huge ones again`() throws {
        let guest = try guest(thp: true)
        #expect(guest.cpu.access(.store(7), at: 0x5000) == .stored)
        func set(log: Bool) throws {
            try guest.vm.setMemoryRegion(
                MemoryRegion(
                    slot: 0, flags: SlotFlags(logDirtyPages: log), guestAddress: GuestAddress(0),
                    size: 1024 * pageSize, userAddress: at(0)))
        }
        try set(log: true)
        _ = try guest.vm.getDirtyLog(slot: 0)
        #expect(guest.cpu.access(.store(8), at: 0x5000) == .stored)
        #expect(leafLevel(guest, 0x5000) == .page4K)
        #expect(try guest.vm.getDirtyLog(slot: 0)[8] == 1 << 5)
        try set(log: false)
        #expect(guest.cpu.access(.store(9), at: 0x5000) == .stored)
        #expect(leafLevel(guest, 0x5000) == .page2M)
    }

    @Test func `where huge pages are not executable, a fetch makes small ones`() throws {
        let guest = try guest(thp: true) { $0.nxHugePages = true }
        #expect(guest.cpu.access(.load, at: 0x5000) == .value(0))
        #expect(leafLevel(guest, 0x5000) == .page2M)
        #expect(guest.leaf(0x5000).map { guest.mmu.bits.isExecutable($0) } == false)
        #expect(guest.cpu.access(.fetch, at: 0x5000) == .value(0))
        #expect(leafLevel(guest, 0x5000) == .page4K)
    }

    @Test func `a huge page of the hypervisor's own never covers a table that is shadowed`() throws {
        let guest = try NestedGuest(pages: 1024, ramFrames: 4096, thp: true)
        // Frame 0 is in the same 2 MiB as the tables.
        #expect(guest.cpu.access(.store(7), at: 0) == .stored)
        var levels: [PageLevel] = []
        guest.mmu.forEachLeaf { levels.append($0.level) }
        #expect(levels == [.page2M])
        try guest.makeTables(count: 0)
        try guest.write(3, 0, 0x20_0000 | Self.huge)
        try guest.enter()
        #expect(guest.cpu.access(.load, at: 0) == .value(0))
        guest.mmu.leaveNested(guest.cpu)
        #expect(guest.cpu.access(.store(8), at: 0) == .stored)
        #expect(guest.cpu.access(.store(0x20_0000 | Self.huge), at: NestedGuest.place(3, 0)) == .emulated)
        #expect(guest.mmu.checkTables() == [])
    }
}
