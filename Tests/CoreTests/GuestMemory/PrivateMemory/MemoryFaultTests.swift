import Audit
import Frames
import HostMemory
import Synchrony
import Testing

@testable import GuestMemory
@testable import Machine

@Suite struct G7_MemoryFaultExits {
    @Test func `an access that wants the other kind of memory is userspace's`() throws {
        let guest = PrivateGuest()
        _ = try guest.bound(4, private: 0..<2)
        for page in 0..<6 {
            for wants in [false, true] {
                let isPrivate = page < 2
                for access in AccessKind.allCases where isPrivate != wants {
                    #expect(guest.fault(page, access, private: wants) == .memoryFault(.EFAULT))
                    #expect(guest.memoryFault == MemoryFaultExit(gfn(page), isPrivate: wants))
                }
            }
        }
        #expect(guest.guest.leafCount == 0 && guest.guest.heldReferences == 0)
        let exit = MemoryFaultExit(gfn(3), isPrivate: true)
        #expect(exit.flags == 8 && exit.address == gfn(3).address && exit.size == 4096)
        #expect(MemoryFaultExit(gfn(3), isPrivate: false).flags == 0)
    }

    @Test func `the address is the page's, whatever byte was accessed`() throws {
        let guest = PrivateGuest()
        _ = try guest.bound(4, private: 0..<1)
        let cpu = guest.guest.cpus[0]
        let fault = GuestFault(
            address: gfn(0).address + 0x7f8, access: .write, entryPresent: false, isPrivate: false)
        #expect(guest.vm.withSlots { guest.vm.mmu.handleFault(cpu, fault) } == .memoryFault(.EFAULT))
        #expect(cpu.memoryFault?.address == gfn(0).address)
    }

    @Test func `an access that agrees is served`() throws {
        let guest = PrivateGuest()
        let file = try guest.bound(4, private: 0..<2)
        #expect(guest.fault(0, .write, private: true) == .fixed)
        #expect(guest.fault(3, .write, private: false) == .fixed)
        #expect(guest.fault(1, .read) == .fixed)
        #expect(guest.memoryFault == nil)
        #expect(guest.guest.leaf(0)?.frame == file.frame(of: 0) && guest.guest.leaf(0)?.writable == true)
        #expect(guest.guest.leaf(1)?.frame == file.frame(of: 1))
        #expect(guest.guest.leaf(3)?.frame == guest.guest.frame(3))
        guest.check()
    }

    /// The entry would allow the access: the fast path must not say so.
    @Test func `a present entry does not hide a mismatch`() throws {
        let guest = PrivateGuest()
        _ = try guest.bound(4, private: 0..<2)
        guest.guest.store(0, 1)
        let cpu = guest.guest.cpus[0]
        for access in AccessKind.allCases {
            let fault = GuestFault(
                address: gfn(0).address, access: access, entryPresent: true, isPrivate: false)
            #expect(guest.vm.withSlots { guest.vm.mmu.handleFault(cpu, fault) } == .memoryFault(.EFAULT))
        }
        #expect(guest.guest.leaf(0) != nil)
    }

    @Test func `private memory that is not there fails with the errno of its cause`() throws {
        let guest = PrivateGuest()
        let file = try guest.bound(4, private: 0..<8)
        // No slot at all: no MMIO.
        #expect(guest.fault(6) == .memoryFault(.EFAULT))
        #expect(guest.memoryFault == MemoryFaultExit(gfn(6), isPrivate: true))
        // A slot without private memory.
        try guest.guest.setSlot(1, guest: 4, pages: 2)
        #expect(guest.fault(5, .write) == .memoryFault(.EFAULT))
        #expect(guest.memoryFault == MemoryFaultExit(gfn(5), isPrivate: true))
        // Tables first, so that the page is what is missing.
        #expect(guest.fault(0) == .fixed)
        guest.memory.failAllocation(1)
        #expect(guest.fault(1) == .memoryFault(.ENOMEM))
        #expect(guest.fault(1) == .fixed)
        #expect(guest.test.host.poison(try #require(file.frame(of: 1))))
        guest.brokenFrames = 1
        #expect(guest.fault(1) == .memoryFault(.EHWPOISON))
        #expect(guest.memoryFault == MemoryFaultExit(gfn(1), isPrivate: true))
        // The file does not know the slot: nothing but a mistake does this.
        let bindings = file.bindings
        file.setBindings([])
        #expect(guest.fault(2) == .memoryFault(.EIO))
        file.setBindings(bindings)
        guest.close(file)
        #expect(guest.fault(2) == .memoryFault(.EFAULT))
        #expect(guest.guest.heldReferences == 0)
        guest.check()
    }

    @Test func `a run that does not end so says nothing`() throws {
        let guest = PrivateGuest()
        _ = try guest.bound(4, private: 0..<2)
        try guest.makePrivate(7..<8)
        #expect(guest.guest.load(7) == .failed(.EFAULT) && guest.memoryFault != nil)
        #expect(guest.guest.load(0) == .value(0) && guest.memoryFault == nil)
        // MMIO, and memory that the process lacks.
        #expect(guest.guest.load(20) == .mmio && guest.memoryFault == nil)
        try guest.guest.space.unmap(pages(3..<4))
        #expect(guest.guest.load(3) == .failed(.EFAULT) && guest.memoryFault == nil)
    }

    @Test func `a VM without private memory knows none`() throws {
        let guest = PrivateGuest(type: .standard)
        try guest.guest.addMemory(0, 2)
        #expect(guest.fault(0, private: true) == .memoryFault(.EFAULT))
        #expect(guest.fault(0, private: false) == .fixed)
        #expect(guest.fault(9, private: true) == .memoryFault(.EFAULT))
        #expect(guest.fault(9) == .emulate)
    }

    @Test func `a slot that is being deleted makes a private fault try again`() throws {
        let guest = PrivateGuest()
        _ = try guest.bound(4, private: 0..<4)
        var outcomes: [FaultOutcome] = []
        for point in 0..<60 {
            let interposer = Interposer(point) { outcomes.append(guest.fault(0)) }
            interposer.ignoring(.slots)
            try interposer.run { try guest.guest.deleteSlot() }
            guest.check()
            guard interposer.hasFired else { break }
            try guest.bind(guest.vm.guestMemoryFiles[0], pages: 4)
        }
        #expect(outcomes.contains(.retry) && outcomes.contains(.fixed) && outcomes.contains(.memoryFault(.EFAULT)))
        #expect(outcomes.allSatisfy { [.retry, .fixed, .spurious, .memoryFault(.EFAULT)].contains($0) })
    }
}

/// Changes nothing that could be seen; its test is there so that nothing does.
@Suite struct Patch45_PagesByTheirIndex {
    @Test func `a slot that begins within the file shows the file's page at that index`() throws {
        let guest = PrivateGuest()
        let file = try guest.file(8)
        try guest.bind(file, pages: 2, offset: 5)
        try guest.makePrivate(0..<2)
        #expect(guest.guest.store(1, 9) == .stored)
        #expect((0..<8).filter { file.frame(of: UInt64($0)) != nil } == [6])
        #expect(guest.guest.leaf(1)?.frame == file.frame(of: 6))
        guest.close(file)
    }
}

@Suite struct Patch46_GetPfnReturnsAReference {
    /// Counts of the page of `privatePage`: before, while it is held, after.
    private func counts(_ policy: PolicyName) throws -> [Int] {
        let guest = PrivateGuest(policy: policy)
        let file = try guest.bound(2, private: 0..<2)
        try file.allocate(.keepSize, offset: 0, length: 2 * pageSize)
        let frame = try #require(file.frame(of: 1))
        func count() -> Int { guest.test.state(frame).referenceCount }
        var seen = [count()]
        guest.vm.withSlots {
            let slot = guest.vm.slot(containing: gfn(1))!
            switch guest.vm.faultInPrivate(gfn(1), slot: slot, snapshot: guest.vm.snapshot()) {
            case .failed(let errno, _): Issue.record("\(errno)")
            case .frame(let faulted):
                #expect(faulted.frame == frame && faulted.isWritable && faulted.isPrivate)
                seen.append(count())
                faulted.releaseUnused()
            }
        }
        seen.append(count())
        return seen
    }

    @Test func `a private fault owns one reference until it ends`() throws {
        #expect(try counts(.precise) == [1, 2, 1])
        // Before: no page came back, and a fault kept no hold on it.
        #expect(try counts(.tracked) != [1, 2, 1])
    }

    @Test(arguments: PolicyName.allCases)
    func `whatever a fault does, it keeps nothing`(policy: PolicyName) throws {
        let guest = PrivateGuest(policy: policy)
        let file = try guest.bound(4, private: 0..<4)
        for page in 0..<4 { guest.guest.store(page, 3) }
        #expect((0..<4).allSatisfy { guest.test.state(file.frame(of: $0)!).referenceCount == 1 })
        guest.vm.mmu.flushAll()
        #expect((0..<4).allSatisfy { guest.guest.load($0) == .value(3) })
        #expect((0..<4).allSatisfy { guest.test.state(file.frame(of: $0)!).referenceCount == 1 })
        guest.takeDown()
        // The old policies mark pages by the frame numbers of entries, private ones too.
        let byFrame = guest.test.journal.findings.filter { $0.invariant == .i4 }.count
        guest.guest.expectedFindings = policy == .precise ? 0 : byFrame
    }

    @Test func `an error gives no reference`() throws {
        let guest = PrivateGuest()
        let file = try guest.bound(2, private: 0..<2)
        #expect(guest.pageError(0) == nil)
        let frame = try #require(file.frame(of: 0))
        guest.memory.failAllocation(1)
        #expect(guest.pageError(1) == .ENOMEM && file.frame(of: 1) == nil)
        #expect(guest.test.host.poison(frame))
        guest.brokenFrames = 1
        // The file's, and the one that keeps a broken page for ever.
        #expect(guest.pageError(0) == .EHWPOISON && guest.test.state(frame).referenceCount == 2)
        #expect(guest.guest.heldReferences == 0)
    }

    @Test func `a page is released dirty under mmu_lock, unused if the fault came to nothing`() throws {
        let guest = PrivateGuest()
        _ = try guest.bound(2, private: 0..<2)
        #expect(guest.fault(0, .read) == .fixed)
        let used = guest.test.events(.released).last
        #expect(used?.value == UInt64(ReleaseKind.dirty.rawValue) | 0x100)
        for point in 0..<80 {
            let interposer = Interposer(point) { try? guest.punch(guest.vm.guestMemoryFiles[0], 1..<2) }
            var outcome = FaultOutcome.fixed
            interposer.run { outcome = guest.fault(1) }
            guard interposer.hasFired else { break }
            let taken = guest.test.events(.released).last { $0.holder == .guestFault }
            if outcome == .retry { #expect(taken?.value ?? 0 & 0xff != UInt64(ReleaseKind.clean.rawValue)) }
            guest.check()
            try guest.punch(guest.vm.guestMemoryFiles[0], 1..<2)
        }
    }
}
