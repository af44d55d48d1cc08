import Audit
import Frames
import HostMemory
import Testing

@testable import GuestMemory
@testable import Machine
@testable import Paging

/// x86 4.5: what a fault makes of the guest's entries and the host's.
@Suite struct X4_5_ShadowFaults {
    @Test func `a write makes tables from the root down, and a leaf that may be written`() throws {
        let guest = try PagedGuest()
        try guest.identityMap()
        #expect(guest.cpus[0].access(.store(5), at: 0x9000) == .stored)
        #expect(try guest.space.load(at(9)) == 5)
        let made = guest.test.events(.shadowPageTaken)
        #expect(made.map(\.guest) == [1, 2, 3, 4] && made.map(\.level) == [4, 3, 2, 1])
        #expect(made.allSatisfy { $0.extra >> 33 & 1 == 1 })
        #expect(guest.entriesSet().first == .init(guest: 9, bits: 0xe67))
    }

    @Test func `neighbours that are there come along, old and writable; guest tables among them are not`() throws {
        let guest = try PagedGuest()
        try guest.identityMap()
        for page in [0] + (8..<16) { try guest.space.store(at(page), 1) }
        #expect(guest.cpus[0].access(.load, at: 0x9000) == .value(1))
        #expect(
            guest.entriesSet() == [.init(guest: 9, bits: 0xe67)]
                + [8, 10, 11, 12, 13, 14, 15].map { .init(guest: $0, bits: 0xe47) })
        // Frames 1 to 3 are tracked, 4 is shadowed and in sync.
        #expect(guest.cpus[0].access(.load, at: 0x5000) == .value(0))
        let set = guest.entriesSet()
        #expect(set.first == .init(guest: 5, bits: 0x825), "the zero page")
        #expect(
            Array(set.dropFirst()) == [.init(guest: 0, bits: 0xe47)]
                + [1, 2, 3, 4].map { .init(guest: $0, bits: 0xa05) })
    }

    @Test func `a clean page of the guest's is not writable until the guest's D is set`() throws {
        let guest = try PagedGuest()
        try guest.identityMap(flags: 0x7)
        try guest.space.store(at(9), 3)
        #expect(guest.cpus[0].access(.load, at: 0x9000) == .value(3))
        #expect(guest.entriesSet() == [.init(guest: 9, bits: 0xa25)])
        #expect(try guest.guestEntry(4, 9) == 0x9000 | 0x27, "A")
        #expect(try guest.guestEntry(1, 0) == 0x2000 | 0x27, "A")
        #expect(guest.cpus[0].access(.store(4), at: 0x9000) == .stored)
        #expect(guest.entriesSet() == [.init(guest: 9, bits: 0xe67)])
        #expect(try guest.guestEntry(4, 9) == 0x9000 | 0x67, "A and D")
    }

    @Test func `what the guest's entries do not give is the guest's own fault`() throws {
        let guest = try PagedGuest()
        try guest.identityMap()
        try guest.write(4, 10, 0)
        try guest.write(4, 11, 11 << 12 | 0x25)
        try guest.write(4, 12, 12 << 12 | 0x63)
        try guest.write(4, 13, 13 << 12 | 0x67 | 1 << 51)
        try guest.write(4, 14, 14 << 12 | 0x67 | 1 << 63)
        let cpu = guest.cpus[0]
        func fault(_ address: UInt64, _ code: UInt64) -> PagedAccessResult {
            .pageFault(GuestPageFault(address: address, code: FaultCode(rawValue: code)))
        }
        #expect(cpu.access(.load, at: 0xa000) == fault(0xa000, 4))
        #expect(cpu.access(.store(1), at: 0xa000) == fault(0xa000, 6))
        #expect(cpu.access(.store(1), at: 0xb000) == fault(0xb000, 7))
        #expect(cpu.access(.load, at: 0xb000) == .value(0))
        #expect(cpu.access(.store(1), at: 0xb000) == fault(0xb000, 7))
        #expect(cpu.access(.load, at: 0xc000) == fault(0xc000, 5))
        #expect(cpu.access(.load, at: 0xd000) == fault(0xd000, 0xd))
        #expect(cpu.access(.fetch, at: 0xe000) == fault(0xe000, 0x15))
        #expect(cpu.access(.load, at: 0x8000_0000) == fault(0x8000_0000, 4))
        #expect(guest.vm.statistics.pf_guest.load(ordering: .relaxed) == 8)
    }

    @Test func `a large page of the guest's is shadowed by small ones where the host has no large one`() throws {
        let guest = try PagedGuest(pages: 1024)
        try guest.identityMap()
        try guest.write(3, 1, 0x20_00e7)
        #expect(guest.cpus[0].access(.store(1), at: 0x20_3000) == .stored)
        let made = guest.test.events(.shadowPageTaken).last!
        #expect(made.guest == 0x200 && PageRole(rawValue: UInt32(made.value)).isDirect)
        #expect(PageRole(rawValue: UInt32(made.value)).access == .all)
        // Read while D is clear: another page, without W, until D is set.
        try guest.write(3, 1, 0x20_00a7)
        guest.cpus[0].flushAll()
        #expect(guest.cpus[0].access(.load, at: 0x20_3000) == .value(1))
    }

    @Test func `a notifier takes the leaf away, and the next access finds the new page`() throws {
        let guest = try PagedGuest()
        try guest.identityMap()
        #expect(guest.cpus[0].access(.store(5), at: 0x9000) == .stored)
        try guest.space.advise(pages(9..<10), .dontNeed)
        #expect(guest.cpus[0].access(.load, at: 0x9000) == .value(0))
        #expect(guest.cpus[0].access(.store(6), at: 0x9000) == .stored)
        #expect(try guest.space.load(at(9)) == 6)
    }

    @Test func `deleting the slot zaps every page, the root when the vCPU lets it go`() throws {
        let guest = try PagedGuest()
        try guest.identityMap()
        #expect(guest.cpus[0].access(.store(5), at: 0x9000) == .stored)
        try guest.vm.setMemoryRegion(
            MemoryRegion(slot: 0, guestAddress: GuestAddress(0), size: 0, userAddress: at(0)))
        #expect(guest.test.events(.zapAllFast).count == 1)
        #expect(guest.test.events(.shadowPageZapped).map(\.guest) == [1, 2, 3, 4])

        try guest.setSlot()
        #expect(guest.cpus[0].access(.load, at: 0x9000) == .value(5))
        #expect(guest.test.events(.shadowPageZapped).map(\.guest) == [1, 2, 3, 4, 1])
    }
}

/// x86 4.7: the guest's tables in and out of sync.
@Suite struct X4_7_Unsync {
    @Test func `a lowest table that the guest writes is out of sync until it flushes`() throws {
        let guest = try PagedGuest()
        try guest.identityMap()
        let cpu = guest.cpus[0]
        for page in 20..<24 { try guest.space.store(at(page), UInt64(page)) }
        #expect(cpu.access(.load, at: 20 << 12) == .value(20))
        // The guest maps page 20 to 21.
        #expect(cpu.access(.store(21 << 12 | 0x67), at: 0x4000 + 20 * 8) == .stored)
        #expect(guest.test.events(.shadowPageUnsynced).map(\.guest) == [4])
        #expect(guest.vm.statistics.mmu_unsync.load(ordering: .relaxed) == 1)
        #expect(cpu.access(.load, at: 20 << 12) == .value(20), "it has not flushed")
        cpu.flush(20 << 12)
        #expect(cpu.access(.load, at: 20 << 12) == .value(21))
        #expect(guest.vm.statistics.mmu_unsync.load(ordering: .relaxed) == 1)
        #expect(cpu.access(.store(22 << 12 | 0x67), at: 0x4000 + 20 * 8) == .stored)
        cpu.flushAll()
        #expect(guest.vm.statistics.mmu_unsync.load(ordering: .relaxed) == 0)
        #expect(guest.test.events(.shadowPageSynced).map(\.guest) == [4])
        #expect(cpu.access(.load, at: 20 << 12) == .value(22))
        // In sync it is protected again.
        #expect(cpu.access(.store(23 << 12 | 0x67), at: 0x4000 + 20 * 8) == .stored)
        #expect(guest.test.events(.shadowPageUnsynced).map(\.guest) == [4, 4])
    }

    @Test func `a higher table is never written behind KVM's back: the emulator does it, and what hung on it goes`()
        throws
    {
        let guest = try PagedGuest()
        try guest.identityMap()
        let cpu = guest.cpus[0]
        try guest.space.store(at(20), 20)
        #expect(cpu.access(.load, at: 20 << 12) == .value(20))
        for i in 0..<64 { try guest.write(6, i, UInt64(i + 1) << 12 | 0x67) }
        try guest.space.store(at(21), 21)
        #expect(cpu.access(.store(0x6000 | 0x67), at: 0x3000) == .emulated)
        #expect(cpu.access(.load, at: 20 << 12) == .value(21))
        #expect(guest.vm.statistics.mmu_pte_write.load(ordering: .relaxed) == 1)
        #expect(guest.vm.statistics.mmu_pde_zapped.load(ordering: .relaxed) == 1)
    }
}
