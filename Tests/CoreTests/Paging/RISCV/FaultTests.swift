import Audit
import Frames
import GuestMemory
import HostMemory
import Paging
import Synchrony
import Testing

/// The rows of arches 2.2 and generic section 7, RISC-V column.
@Suite struct Arches_8_RISCVFaultOutcomes {
    @Test(arguments: AccessKind.allCases)
    func `outside of slots, loads and stores are emulated and fetches fail`(access: AccessKind) {
        let guest = RISCVGuest()
        #expect(guest.fault(0, access) == (access == .execute ? .failed(.EOPNOTSUPP) : .emulate))
        #expect(guest.leaves.isEmpty)
        #expect(guest.vm.statistics.pf_emulate.load(ordering: .relaxed) == (access == .execute ? 0 : 1))
        guest.expectSound()
        guest.end()
    }

    @Test func `a read-only slot is read and run, and written by emulation`() throws {
        let guest = RISCVGuest()
        try guest.anonymous(count: 1, readOnly: true)
        #expect(guest.fault(0, .write) == .emulate)
        #expect(guest.leaves.isEmpty)
        #expect(guest.fault(0, .read) == .fixed)
        #expect(guest.fault(0, .execute) == .spurious)
        #expect(guest.leaf(0)?.writable == false)
        guest.expectSound()
        guest.end()
    }

    @Test(arguments: AccessKind.allCases)
    func `a slot over nothing, or over what the process may not touch, is EFAULT`(access: AccessKind) throws {
        let guest = RISCVGuest()
        try guest.slot(0, 0, count: 1)
        #expect(guest.fault(0, access) == .failed(.EFAULT))
        try guest.space.mapPages(0, 1)
        try guest.space.protect(at(0)..<at(1), .none)
        #expect(guest.fault(0, access) == .failed(.EFAULT))
        #expect(guest.leaves.isEmpty)
        guest.expectSound()
        guest.end()
    }

    @Test func `a poisoned page is told apart`() throws {
        let guest = RISCVGuest()
        try guest.anonymous(count: 1)
        try guest.space.store(at(0), 1)
        guest.host.host.poison(try #require(guest.hostFrame(0)))
        #expect(guest.fault(0, .read) == .failed(.EHWPOISON))
        #expect(guest.leaves.isEmpty)
        guest.expectSound()
    }

    @Test func `a write through a read-only PFN mapping is EFAULT, not MMIO`() throws {
        let guest = RISCVGuest()
        let ring = try #require(EventRing(guest.host.host, dataPages: 1))
        try guest.space.mapPages(0, ring.frames.count, .driver(ring), .read)
        try guest.slot(0, 0, count: ring.frames.count, readOnly: true)
        #expect(guest.fault(0, .read) == .fixed)
        #expect(guest.leaf(0)?.writable == false)
        guest.expectSound()

        let bar = RISCVGuest(deviceFrames: 4)
        let device = try #require(DeviceBAR(bar.host.host, pages: 1, filling: .byFault))
        try bar.space.mapPages(0, 1, .driver(device))
        try bar.slot(0, 0, count: 1)
        try bar.space.protect(at(0)..<at(1), .read)
        #expect(bar.fault(0, .write) == .failed(.EFAULT))
        #expect(bar.fault(0, .read) == .fixed)
        #expect(bar.leaf(0)?.writable == false)
        bar.expectSound()
        bar.end()
    }

    /// Arches X-11, I-23: the driver's entry is writable, and the slot is not.
    @Test(arguments: PolicyKind.allCases)
    func `a read-only slot over a writable PFN mapping is not writable`(policy: PolicyKind) throws {
        let guest = RISCVGuest(policy: policy, deviceFrames: 4)
        let device = try #require(DeviceBAR(guest.host.host, pages: 2, filling: .atMap))
        try guest.space.mapPages(0, 2, .driver(device))
        try guest.slot(0, 0, count: 2, readOnly: true)
        #expect(guest.space.translate(at(0))?.writable == true)
        #expect(guest.fault(0, .read) == .fixed)
        #expect(guest.leaf(0).map { $0.entry & 0xff } == 0xdb)
        #expect(guest.fault(0, .write) == .emulate)
        #expect(guest.walk(0, .write).violation?.reason == .rights)
        guest.expectSound()
        guest.end()
    }

    @Test func `without memory for tables a fault is ENOMEM, and touches no page`() throws {
        let guest = RISCVGuest(ramFrames: 64)
        try guest.anonymous(count: 1)
        try guest.space.store(at(0), 1)
        let before = guest.host.state(try #require(guest.hostFrame(0)))
        var taken: [HostFrame] = []
        while let table = guest.host.host.allocateTable(order: 0, fill: 0) { taken.append(table) }
        #expect(guest.fault(0, .write) == .failed(.ENOMEM))
        #expect(guest.host.state(try #require(guest.hostFrame(0))) == before)
        for table in taken { guest.host.host.freeTable(table) }
        #expect(guest.fault(0, .write) == .fixed)
        guest.expectSound()
        guest.end()
    }

    @Test func `T6: a read of a writable page maps it writable at once`() throws {
        let guest = RISCVGuest()
        try guest.anonymous(count: 1)
        try guest.space.store(at(0), 1)
        #expect(guest.fault(0, .read) == .fixed)
        #expect(guest.leaf(0).map { $0.entry & 0xff } == 0xdf)
        #expect(guest.flags(0).isDirty(by: .kvm))
        #expect(guest.fault(0, .write) == .spurious)
        #expect(guest.vm.statistics.pf_taken.load(ordering: .relaxed) == 2)
        #expect(guest.vm.statistics.pf_fixed.load(ordering: .relaxed) == 1)
        #expect(guest.vm.statistics.pf_spurious.load(ordering: .relaxed) == 1)
        guest.expectSound()
        guest.end()
    }

    @Test func `the zero page is read without W, and a write replaces it`() throws {
        let guest = RISCVGuest()
        try guest.anonymous(count: 1)
        #expect(guest.fault(0, .read) == .fixed)
        #expect(guest.leaf(0)?.frame == guest.host.host.zeroPage)
        #expect(guest.leaf(0)?.writable == false)
        // The replacement of the zero page is itself an invalidation, younger than the fault's snapshot.
        #expect(guest.fault(0, .write) == .retry)
        #expect(guest.leaves.isEmpty)
        #expect(guest.fault(0, .write) == .fixed)
        #expect(guest.leaf(0)?.frame != guest.host.host.zeroPage)
        #expect(guest.leaf(0)?.writable == true)
        guest.expectSound()
        guest.end()
    }

    @Test func `a fault is told to the journal with its outcome`() throws {
        let guest = RISCVGuest()
        try guest.anonymous(count: 1)
        guest.fault(0, .write)
        let kinds: [Event.Kind] = [.fault, .snapshot, .translated, .tableLinked, .tableLinked, .entryInstalled, .flush]
        let seen = guest.host.journal.events.map(\.kind).filter { kinds.contains($0) || $0 == .faultResolved }
        #expect(seen == kinds + [.faultResolved])
        let installed = try #require(guest.host.events(.entryInstalled).first)
        #expect(installed.level == 1 && installed.guest == RISCVGuest.base && installed.value & 0xff == 0xdf)
    }
}

/// What a slot may lie over. Spec: generic 4.4 row 22.
@Suite struct Generic_4_4_RISCVSlots {
    @Test(arguments: GStageMMU.Mode.allCases)
    func `a slot may end with the guest's address space, not beyond`(mode: GStageMMU.Mode) throws {
        let guest = RISCVGuest(mode)
        let end = UInt64(1) << UInt64(mode.addressBits)
        func region(_ address: UInt64) -> MemoryRegion {
            MemoryRegion(slot: 0, guestAddress: GuestAddress(address), size: 2 * pageSize, userAddress: at(0))
        }
        #expect(throws: Errno.EFAULT) { try guest.vm.setMemoryRegion(region(end)) }
        #expect(throws: Errno.EFAULT) { try guest.vm.setMemoryRegion(region(end - pageSize)) }
        #expect(throws: Never.self) { try guest.vm.setMemoryRegion(region(end - 2 * pageSize)) }
    }

    /// Two VMAs and a hole around and under the slot: one that offends is found wherever it intersects.
    @Test func `a writable slot needs writable memory, wherever it is mapped`() throws {
        for first in 0..<6 {
            for count in 1...4 {
                let guest = RISCVGuest()
                try guest.space.mapPages(0, 2)
                try guest.space.mapPages(4, 1, .anonymous, .read)
                let offends = first <= 4 && 4 < first + count
                if offends {
                    #expect(throws: Errno.EPERM) { try guest.slot(0, 0, page: first, count: count) }
                    #expect(throws: Never.self) { try guest.slot(0, 0, page: first, count: count, readOnly: true) }
                } else {
                    #expect(throws: Never.self) { try guest.slot(0, 0, page: first, count: count) }
                }
            }
        }
    }

    @Test func `a PFN mapping is not logged, neither from the start nor later`() throws {
        let guest = RISCVGuest(deviceFrames: 4)
        let device = try #require(DeviceBAR(guest.host.host, pages: 2, filling: .byFault))
        try guest.space.mapPages(0, 2, .driver(device))
        #expect(throws: Errno.EINVAL) { try guest.slot(0, 0, count: 2, log: true) }
        try guest.slot(0, 0, count: 2)
        #expect(throws: Errno.EINVAL) { try guest.slot(0, 0, count: 2, log: true) }
        #expect(guest.fault(0, .write) == .fixed, "the slot is as it was")
        guest.expectSound()
    }
}
