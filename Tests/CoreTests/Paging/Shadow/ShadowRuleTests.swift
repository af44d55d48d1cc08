import Audit
import Frames
import HostMemory
import Testing

@testable import GuestMemory
@testable import Machine
@testable import Paging

/// Corners of x86 4.5 and 4.6 where an entry, or the walk it rests on, could be of yesterday.
@Suite struct X48_X53_X54_StaleEntries {
    static let readOnly: UInt64 = 0x25  // P U A

    @Test func `one host page behind two guest frames: a refault moves the entry to the other's reverse map (X53)`()
        throws
    {
        let guest = try PagedGuest()
        try guest.identityMap()
        try guest.write(4, 9, 0x9000 | Self.readOnly | 1 << 63)
        let cpu = guest.cpus[0]
        #expect(cpu.access(.load, at: 0x9000) == .value(0), "the zero page")
        #expect(cpu.access(.store(0xa000 | Self.readOnly), at: 0x4000 + 9 * 8) == .stored)
        #expect(cpu.access(.fetch, at: 0x9000) == .value(0), "the zero page too, for frame 10")
        #expect(guest.mmu.checkTables() == [])
        try guest.space.store(at(10), 77)
        #expect(cpu.access(.fetch, at: 0x9000) == .value(77))
    }

    @Test func `what an old leaf permitted says nothing of the frame that replaces it (X48, X58)`() throws {
        let guest = try PagedGuest()
        try guest.identityMap()
        try guest.write(4, 9, 0x9000 | PagedGuest.page | 1 << 63)
        let cpu = guest.cpus[0]
        #expect(cpu.access(.store(5), at: 0x9000) == .stored)
        // To the page directory, without a flush; the fetch faults, for the old entry has NX.
        #expect(cpu.access(.store(0x3000 | PagedGuest.page), at: 0x4000 + 9 * 8) == .stored)
        #expect(cpu.access(.fetch, at: 0x9000) == .value(0x4000 | 0x27))
        #expect(guest.mmu.checkTables() == [])
        #expect(cpu.access(.store(0x4000 | 0x27), at: 0x9000) == .emulated)
    }

    @Test func `a huge leaf does not cover the tables that the same fault begins to shadow (X41, X48)`() throws {
        let guest = try PagedGuest(pages: 1024, ramFrames: 4096, thp: true)
        // The root lies in the second block, all else in the first, which the guest maps as one page.
        try guest.write(513, 0, 0x2000 | PagedGuest.table)
        try guest.write(2, 0, 0x3000 | PagedGuest.table)
        try guest.write(3, 1, 0xe7)
        let cpu = guest.cpus[0]
        guest.mmu.load(.longMode(root: GuestAddress(513 << 12)), on: cpu)
        #expect(cpu.access(.store(1), at: 0x20_9000) == .stored)
        #expect(guest.mmu.checkTables() == [])
        #expect(guest.entriesSet().allSatisfy { $0.level == 1 })
        #expect(cpu.access(.store(0), at: 0x20_3010) == .emulated)
    }

    enum Mode: Sendable, CaseIterable { case long, pae }

    @Test(arguments: Mode.allCases)
    func `a large page whose entry another vCPU changes during the fault is not mapped (X54)`(mode: Mode) throws {
        for point in 0..<200 {
            let guest = try PagedGuest(pages: 1536, cpus: 2, ramFrames: 512)
            try guest.identityMap()
            try guest.write(3, 1, 0x20_00e7)
            if mode == .pae {
                try guest.write(2, 0, 0x3001)
                for cpu in guest.cpus { #expect(guest.mmu.load(.physicalExtension(0x2000), on: cpu)) }
            }
            for page in [0x203, 0x403] { try guest.space.store(at(page), UInt64(page)) }
            #expect(guest.cpus[1].access(.load, at: 0x20_0000) == .value(0))
            #expect(guest.cpus[1].access(.store(0x20_00e7), at: 0x3008) == .emulated)
            var result: PagedAccessResult?
            let interposer = Interposer(point) {
                _ = guest.cpus[1].access(.store(0x40_00e7), at: 0x3008)
            }
            interposer.mayFire = { !guest.cpus[0].isInGuest }
            interposer.run { result = guest.cpus[0].access(.load, at: 0x20_3000) }
            guard interposer.hasFired else { return }
            #expect(result == .value(0x203) || result == .value(0x403), "point \(point)")
            guest.cpus[0].flushAll()
            #expect(guest.cpus[0].access(.load, at: 0x20_3000) == .value(0x403), "point \(point)")
        }
    }

    @Test func `a large page that the VMM moves is mapped from where it is now (X53)`() throws {
        let guest = try PagedGuest(pages: 1536, ramFrames: 4096)
        try guest.identityMap()
        try guest.write(3, 1, 0x20_00e7)
        for page in [0x203, 0x205, 0x403, 0x405] { try guest.space.store(at(page), UInt64(page)) }
        let cpu = guest.cpus[0]
        #expect(cpu.access(.load, at: 0x20_3000) == .value(0x203))
        try guest.write(3, 1, 0x40_00e7)
        #expect(cpu.access(.load, at: 0x20_f000) == .value(0))
        #expect(cpu.access(.load, at: 0x20_5000) == .value(0x405))
        #expect(guest.mmu.checkTables() == [])
    }

    @Test func `a table that the process may not write ends the walk, and does not repeat it for ever`() throws {
        let guest = try PagedGuest()
        try guest.identityMap(flags: 0x7)
        try guest.space.protect(pages(4..<5), .read)
        #expect(
            guest.cpus[0].access(.load, at: 0x9000) == .pageFault(GuestPageFault(address: 0x9000, code: .user)))
        try guest.space.protect(pages(4..<5), .readWrite)
        #expect(guest.cpus[0].access(.load, at: 0x9000) == .value(0))
    }

    @Test func `a huge leaf loses W with the first harvest when logging began with ones (X43)`() throws {
        let guest = try PagedGuest(pages: 1024, ramFrames: 4096, thp: true)
        try guest.identityMap()
        try guest.write(3, 1, 0x20_00e7)
        var manual = ManualProtect()
        manual.enabled = true
        manual.initiallySet = true
        try guest.vm.setManualProtect(manual)
        let cpu = guest.cpus[0]
        #expect(cpu.access(.store(1), at: 0x20_3000) == .stored)
        try guest.setSlot(log: true)
        #expect(cpu.access(.store(2), at: 0x20_3000) == .stored)
        try guest.vm.clearDirtyLog(slot: 0, firstPage: 0x200, pages: 64, bitmap: [~0])
        #expect(try guest.vm.getDirtyLog(slot: 0)[8] == 0)
        #expect(cpu.access(.store(3), at: 0x20_3000) == .stored)
        #expect(try guest.vm.getDirtyLog(slot: 0)[8] == 8)
    }

    @Test func `SMEP: the supervisor does not fetch from the user's pages, also where an entry stands`() throws {
        let guest = try PagedGuest()
        try guest.identityMap()
        let cpu = guest.cpus[0]
        var registers = GuestRegisters.longMode(root: GuestAddress(0x1000))
        registers.cr4 |= 1 << 20
        guest.mmu.load(registers, on: cpu)
        #expect(cpu.access(.fetch, at: 0x9000) == .value(0))
        guest.mmu.state(of: cpu).isUser = false
        #expect(
            cpu.access(.fetch, at: 0x9000)
                == .pageFault(GuestPageFault(address: 0x9000, code: [.present, .fetch])))
        #expect(cpu.access(.load, at: 0x9000) == .value(0))
    }

    @Test func `without CR0.WP the supervisor writes a read-only page, the user still does not`() throws {
        let guest = try PagedGuest()
        try guest.identityMap()
        try guest.write(4, 9, 0x9025)
        let cpu = guest.cpus[0]
        let state = guest.mmu.state(of: cpu)
        var registers = GuestRegisters.longMode(root: GuestAddress(0x1000))
        registers.cr0 &= ~(1 << 16)
        guest.mmu.load(registers, on: cpu)
        state.isUser = false
        #expect(cpu.access(.store(5), at: 0x9000) == .stored)
        #expect(guest.entriesSet().first == .init(guest: 9, bits: 0xe63), "the supervisor's alone")
        state.isUser = true
        #expect(
            cpu.access(.store(6), at: 0x9000)
                == .pageFault(GuestPageFault(address: 0x9000, code: [.present, .write, .user])))
        #expect(cpu.access(.load, at: 0x9000) == .value(5))
    }
}

/// x86 4.8 and 9: what is counted, and when a page is given up.
@Suite struct X4_8_EmulatedWrites {
    @Test func `three writes without a use between them zap the page, a walk through it forgets them`() throws {
        let guest = try PagedGuest(pages: 1024, ramFrames: 4096)
        try guest.identityMap()
        try guest.write(3, 1, 0x20_00e7)
        let cpu = guest.cpus[0]
        let statistics = guest.vm.statistics
        #expect(cpu.access(.store(0), at: 0x3028) == .emulated)
        #expect(cpu.access(.store(0), at: 0x3028) == .emulated)
        // A fault whose leaf the directory's entry is.
        #expect(cpu.access(.store(1), at: 0x20_3000) == .stored)
        #expect(guest.page(3, level: 2)!.floods == 0)
        guest.page(3, level: 2)!.floods = 0
        #expect(cpu.access(.store(0), at: 0x3028) == .emulated)
        #expect(cpu.access(.store(0), at: 0x3028) == .emulated)
        #expect(statistics.mmu_flooded.load(ordering: .relaxed) == 0)
        guest.page(3, level: 2)!.floods = 2
        guest.mmu.guestMemoryWritten(cpu, GuestAddress(0x3028), count: 8)
        #expect(statistics.mmu_flooded.load(ordering: .relaxed) == 1)
        #expect(guest.page(3, level: 2) == nil)
        #expect(guest.mmu.checkTables() == [])
        #expect(cpu.access(.load, at: 0x20_3000) == .value(1))
    }

    @Test func `mmu_pde_zapped counts entries that are not 0 afterwards, whatever stood there`() throws {
        let guest = try PagedGuest()
        try guest.identityMap()
        let cpu = guest.cpus[0]
        #expect(cpu.access(.load, at: 0x9000) == .value(0))
        func write(_ index: Int, _ value: UInt64) throws {
            try guest.write(3, index, value)
            guest.mmu.guestMemoryWritten(cpu, GuestAddress(0x3000 + UInt64(index) * 8), count: 8)
            guest.page(3, level: 2)!.floods = 0
        }
        func zapped() -> UInt64 { UInt64(guest.vm.statistics.mmu_pde_zapped.load(ordering: .relaxed)) }
        try write(5, 0)
        #expect(zapped() == 0)
        try write(5, 0x5000)
        #expect(zapped() == 1)
        try write(0, 0)
        #expect(zapped() == 1)
        #expect(guest.vm.statistics.mmu_pte_write.load(ordering: .relaxed) == 3)
    }

    @Test func `misaligned and narrow writes zap the page, a byte that begins an entry does not`() throws {
        for (offset, count, gone) in [
            (0, 8, false), (0, 4, false), (4, 4, false), (0, 1, false), (1, 1, true),
            (2, 2, true), (4, 8, true),
        ] {
            let guest = try PagedGuest()
            try guest.identityMap()
            let cpu = guest.cpus[0]
            #expect(cpu.access(.load, at: 0x9000) == .value(0))
            guest.mmu.guestMemoryWritten(cpu, GuestAddress(0x4048 + UInt64(offset)), count: count)
            #expect((guest.page(4) == nil) == gone, "\(offset) \(count)")
            #expect(guest.mmu.checkTables() == [])
        }
    }

    @Test func `a fault of the guest's own is no INVLPG`() throws {
        let guest = try PagedGuest()
        try guest.identityMap()
        try guest.write(4, 9, 0x9025)
        #expect(guest.cpus[0].access(.load, at: 0x9000) == .value(0))
        guard case .pageFault = guest.cpus[0].access(.store(1), at: 0x9000) else {
            Issue.record("no fault")
            return
        }
        #expect(guest.vm.statistics.invlpg.load(ordering: .relaxed) == 0)
        guest.cpus[0].flush(0x9000)
        #expect(guest.vm.statistics.invlpg.load(ordering: .relaxed) == 1)
    }
}
