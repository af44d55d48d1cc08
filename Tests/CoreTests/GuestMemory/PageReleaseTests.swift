import Audit
import Frames
import Machine
import Testing

@testable import GuestMemory
@testable import HostMemory

/// The releases of a fault's page, and what they mark.
@Suite struct G2_9_Releases {
    enum Way: CaseIterable, Sendable { case unusedUnlocked, unused, clean, dirty }

    private func release(_ guest: TestGuest, _ page: Int, _ way: Way) {
        guest.vm.withSlots {
            let slot = guest.vm.slot(containing: gfn(page))
            switch guest.vm.faultIn(gfn(page), slot: slot, write: false, snapshot: guest.vm.snapshot()) {
            case .failed(let error, _): Issue.record("\(error)")
            case .frame(let faulted):
                if way == .unusedUnlocked { return faulted.releaseUnused() }
                let guardian = guest.vm.lockMMUForFault()
                switch way {
                case .clean: faulted.finish(.used(dirty: false), holding: guardian)
                case .dirty: faulted.finish(.used(dirty: true), holding: guardian)
                default: faulted.finish(.unused, holding: guardian)
                }
                guardian.unlock()
            }
        }
    }

    @Test(arguments: Way.allCases, Architecture.twoStage)
    func `each puts once and marks what it says, under KVM's name`(way: Way, architecture: Architecture) throws {
        let guest = TestGuest(architecture)
        try guest.addMemory(0, 1)
        try guest.space.store(at(0), 1)
        let frame = try #require(guest.frame(0))
        let before = guest.test.state(frame).referenceCount
        release(guest, 0, way)
        let state = guest.test.state(frame)
        #expect(state.referenceCount == before)
        #expect(state.flags.isAccessed(by: .kvm) == (way == .clean || way == .dirty))
        #expect(state.flags.isDirty(by: .kvm) == (way == .dirty))
        #expect(guest.test.events(.released).count == 1 && guest.test.events(.forgotten).isEmpty)
        let released = try #require(guest.test.events(.released).first)
        #expect((released.value & 0x100 != 0) == (way == .clean || way == .dirty), "I-10: the marks are made locked")
    }

    @Test(arguments: Way.allCases)
    func `I-14: the page of zeros is put and never marked`(way: Way) throws {
        let guest = TestGuest()
        try guest.addMemory(0, 1)
        let before = guest.test.state(guest.test.host.zeroPage)
        release(guest, 0, way)
        #expect(guest.test.state(guest.test.host.zeroPage) == before)
    }

    @Test(arguments: Way.allCases)
    func `I-14: a reserved page's flags and count are never touched`(way: Way) throws {
        let guest = TestGuest()
        let reserved = try #require(ReservedMemory(guest.test.host, pages: 1))
        try guest.space.mapPages(0, 1, .driver(reserved))
        try guest.setSlot(pages: 1)
        let before = guest.test.state(reserved.frames.lowerBound)
        release(guest, 0, way)
        #expect(guest.test.state(reserved.frames.lowerBound) == before)
    }

    @Test(arguments: Way.allCases)
    func `a PFN-mapped frame has nothing to release`(way: Way) throws {
        let guest = TestGuest()
        let counted = try #require(CountedPagesByFrame(guest.test.host, pages: 1))
        try guest.space.mapPages(0, 1, .driver(counted))
        try guest.setSlot(pages: 1)
        let before = guest.test.state(counted.frames[0])
        release(guest, 0, way)
        #expect(guest.test.state(counted.frames[0]) == before)
        #expect(guest.test.events(.released).isEmpty && guest.test.events(.referenceDropped).isEmpty)
    }

    @Test func `a tail of a huge folio is counted and marked in its head`() throws {
        let guest = TestGuest(ramFrames: 4096, thp: true)
        try guest.addMemory(0, 512)
        try guest.space.store(at(0), 1)
        let frame = try #require(guest.frame(9))
        let before = guest.test.state(frame)
        release(guest, 9, .dirty)
        let after = guest.test.state(frame)
        #expect(after.headReferenceCount == before.headReferenceCount && after.referenceCount == 0)
        #expect(after.headFlags.isDirty(by: .kvm) && !after.flags.isDirty(by: .kvm))
    }
}

/// I-1, I-2, I-17: a fault's reference ends in the fault.
@Suite struct I1_ReferencesAreConserved {
    @Test(arguments: Architecture.twoStage)
    func `after faults of every kind KVM holds nothing`(architecture: Architecture) throws {
        let guest = TestGuest(architecture)
        let object = MemoryObject(host: guest.test.host, pages: 2)
        let buffer = try #require(GraphicsBuffer(guest.test.host, pages: 2, order: 1))
        try guest.space.mapPages(0, 2)
        try guest.space.mapPages(2, 2, .object(object))
        try guest.space.mapPages(4, 2, .object(object, shared: false))
        try guest.space.mapPages(6, 2, .driver(buffer))
        try guest.setSlot(pages: 9)
        try guest.space.store(at(0), 1)
        let child = try guest.space.fork()
        defer { child.exit() }
        for page in 0..<9 {
            _ = guest.load(page)
            #expect(guest.heldReferences == 0)
            guest.store(page, UInt64(page))
            #expect(guest.heldReferences == 0)
        }
        #expect(guest.test.events(.forgotten).isEmpty)
        guest.check()
    }

    @Test func `I-17: an idle VM does not hold a page back`() throws {
        let guest = TestGuest()
        try guest.addMemory(0, 1)
        #expect(guest.store(0, 1) == .stored)
        let frame = try #require(guest.frame(0))
        #expect(guest.test.state(frame).referenceCount == 1 && guest.test.state(frame).mapCount == 1)
        try guest.space.advise(pages(0..<1), .dontNeed)
        #expect(guest.test.state(frame).referenceCount == 0)
        #expect(guest.load(0) == .value(0))
    }

    @Test func `a frame that is dropped is put as unused and reported`() throws {
        let guest = TestGuest()
        try guest.addMemory(0, 1)
        try guest.space.store(at(0), 1)
        let before = guest.test.state(try #require(guest.frame(0)))
        guest.vm.withSlots {
            let slot = guest.vm.slot(containing: gfn(0))
            _ = guest.vm.faultIn(gfn(0), slot: slot, write: true, snapshot: guest.vm.snapshot())
        }
        let after = guest.test.state(try #require(guest.frame(0)))
        #expect(after.referenceCount == before.referenceCount && !after.flags.isDirty(by: .kvm))
        #expect(guest.test.events(.forgotten).count == 1)
        #expect(guest.test.journal.findings.first?.invariant == .i1)
        guest.expectedFindings = 1
    }
}

/// I-29: a translation for reading is the page in the primary table.
@Suite struct I29_ReadsSeeThePrimaryPage {
    @Test(arguments: Architecture.twoStage)
    func `a guest that reads a shared page follows when the process copies it`(architecture: Architecture) throws {
        let guest = TestGuest(architecture)
        try guest.addMemory(0, 1)
        try guest.space.store(at(0), 9)
        let child = try guest.space.fork()
        defer { child.exit() }
        #expect(guest.load(0) == .value(9))
        #expect(guest.leaf(0)?.frame == guest.frame(0) && guest.leaf(0)?.writable == false)
        try guest.space.store(at(0), 10)
        #expect(guest.load(0) == .value(10))
        #expect(guest.store(0, 11) == .stored)
        #expect(try child.load(at(0)) == 9 && guest.space.load(at(0)) == 11)
        guest.check()
    }

    @Test(arguments: Architecture.twoStage)
    func `the page of zeros gives way to the guest's own`(architecture: Architecture) throws {
        let guest = TestGuest(architecture)
        try guest.addMemory(0, 1)
        #expect(guest.load(0) == .value(0))
        #expect(guest.leaf(0)?.frame == guest.test.host.zeroPage && guest.leaf(0)?.writable == false)
        #expect(guest.store(0, 3) == .stored)
        #expect(guest.leaf(0)?.frame == guest.frame(0))
        #expect(try guest.space.load(at(0)) == 3)
        guest.check()
    }
}
