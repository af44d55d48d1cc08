import Audit
import Frames
import Machine
import Testing

@testable import GuestMemory
@testable import HostMemory

/// `kvm_follow_pfn`, its table in order.
@Suite struct G2_2_FollowFrame {
    @Test func `no slot is NOSLOT, and so is a slot that is being deleted`() throws {
        let guest = TestGuest()
        #expect(guest.faultIn(0) == .failed(.noSlot))
        try guest.addMemory(0, 1)
        try guest.space.store(at(0), 1)
        #expect(guest.faultIn(0).error == nil)
        let slot = try #require(guest.vm.activeSlots.first)
        guest.vm.withSlots {
            switch guest.vm.faultIn(
                gfn(0), slot: slot.invalidCopy(), write: false, snapshot: guest.vm.snapshot())
            {
            case .failed(let error, _): #expect(error == .noSlot)
            case .frame(let faulted):
                faulted.releaseUnused()
                Issue.record("an invalid slot was translated")
            }
        }
    }

    @Test func `INVALID goes before READONLY`() throws {
        let guest = TestGuest()
        try guest.addMemory(0, 1, readOnly: true)
        let slot = try #require(guest.vm.activeSlots.first)
        let invalid = slot.invalidCopy()
        let request = FollowRequest(frame: gfn(0), write: true, holder: .framePage)
        guest.vm.withSlots {
            switch guest.vm.follow(request, in: invalid) {
            case .failed(let error): #expect(error == .noSlot)
            case .mapped: Issue.record("an invalid slot was translated")
            case .page(let page, _):
                page.releaseUnused()
                Issue.record("an invalid slot was translated")
            }
        }
    }

    @Test func `a write to a read-only slot is RO_FAULT whatever lies behind it`() throws {
        let guest = TestGuest()
        try guest.addMemory(0, 2, readOnly: true)
        try guest.space.store(at(0), 1)
        try guest.space.unmap(pages(1..<2))
        for page in 0...1 { #expect(guest.faultIn(page, write: true) == .failed(.readOnly)) }
        #expect(guest.faultIn(1) == .failed(.fault), "a read looks")
    }

    @Test func `a read of a read-only slot never becomes writable`() throws {
        let guest = TestGuest()
        let bar = try #require(DeviceBAR(guest.test.host, pages: 1, filling: .atMap))
        try guest.space.mapPages(0, 1)
        try guest.space.mapPages(1, 1, .object(MemoryObject(host: guest.test.host, pages: 1)))
        try guest.space.mapPages(2, 1, .driver(bar))
        try guest.setSlot(pages: 3, readOnly: true)
        try guest.space.store(at(0), 1)
        #expect(guest.faultIn(0) == .page(guest.frame(0), writable: false))
        #expect(guest.faultIn(1) == .page(guest.frame(1), writable: false))
        #expect(guest.faultIn(2) == .mapped(bar.frames.lowerBound, writable: false))
    }

    @Test func `no entry of a read-only slot lets the guest write, PFN maps included`() throws {
        let guest = TestGuest()
        let bar = try #require(DeviceBAR(guest.test.host, pages: 1, filling: .atMap))
        try guest.space.mapPages(0, 1, .driver(bar))
        try guest.setSlot(pages: 1, readOnly: true)
        bar.write(page: 0, offset: 0, 7)
        #expect(guest.load(0) == .value(7))
        #expect(guest.leaf(0)?.writable == false)
        #expect(guest.store(0, 8) == .mmio)
        #expect(bar.read(page: 0, offset: 0) == 7)
        guest.check()
    }
}

/// `hva_to_pfn`: A fast, B slow, C the VMA, D the end; and the consequences i to v.
@Suite struct G2_3_Translate {
    @Test func `fast and slow give one reference, writable where the entry is`() throws {
        let guest = TestGuest()
        try guest.addMemory(0, 3)
        #expect(guest.faultIn(0) == .page(guest.test.host.zeroPage, writable: false))
        let fresh = guest.faultIn(1, write: true)
        #expect(fresh == .page(guest.frame(1), writable: true))
        try guest.space.store(at(2), 1)
        #expect(guest.faultIn(2) == .page(guest.frame(2), writable: true), "writable for free")
        #expect(guest.faultIn(2, write: true) == .page(guest.frame(2), writable: true))
        // The page of zeros becomes a page of one's own.
        #expect(guest.faultIn(0, write: true) == .page(guest.frame(0), writable: true))
        #expect(guest.frame(0) != guest.test.host.zeroPage)
    }

    @Test func `shared memory is writable for free, a private object's page only as a copy`() throws {
        let guest = TestGuest()
        let object = MemoryObject(host: guest.test.host, pages: 2)
        try guest.space.mapPages(0, 1, .object(object))
        try guest.space.mapPages(1, 1, .object(object, firstPage: 1, shared: false))
        try guest.space.mapPages(2, 1, .anonymousShared)
        try guest.setSlot(pages: 3)
        let shared = guest.faultIn(0)
        #expect(shared == .page(object.frame(of: 0), writable: true))
        let original = guest.faultIn(1)
        #expect(original == .page(object.frame(of: 1), writable: false))
        let copy = guest.faultIn(1, write: true)
        #expect(copy == .page(guest.frame(1), writable: true) && copy.frame != object.frame(of: 1))
        #expect(guest.faultIn(2) == .page(guest.frame(2), writable: true))
    }

    @Test func `a signal ends the lookup before any VMA is looked at`() throws {
        let guest = TestGuest()
        let object = MemoryObject(host: guest.test.host, pages: 2, slow: true)
        try guest.space.mapPages(0, 2, .object(object))
        try guest.setSlot(pages: 3)
        guest.space.signals.pending = true
        #expect(guest.faultIn(0, interruptible: true) == .failed(.signalPending))
        #expect(guest.faultIn(0).error == nil, "an ordinary signal does not stop who can't be interrupted")
        guest.space.signals.pending = false
        guest.space.signals.fatal = true
        #expect(guest.faultIn(1) == .failed(.signalPending))
        #expect(guest.faultIn(2) == .failed(.signalPending), "even where no VMA is")
        #expect(guest.faultIn(0, write: true).error == nil, "the fast way asks for no signals")
    }

    @Test func `poison is told apart, for reads, writes and objects`() throws {
        let guest = TestGuest()
        try guest.space.mapPages(0, 1)
        try guest.space.mapPages(1, 1, .object(MemoryObject(host: guest.test.host, pages: 1)))
        try guest.setSlot(pages: 2)
        for page in 0...1 {
            try guest.space.store(at(page), 1)
            guest.test.host.poison(try #require(guest.frame(page)))
            for write in [false, true] {
                #expect(guest.faultIn(page, write: write) == .failed(.hardwarePoison))
                #expect(guest.faultIn(page, write: write, noWait: true) == .failed(.hardwarePoison))
            }
        }
    }

    @Test func `a hole and memory without rights are FAULT, with and without no-wait`() throws {
        let guest = TestGuest()
        try guest.space.mapPages(0, 1, .anonymous, .none)
        try guest.setSlot(pages: 2)
        for page in 0...1 {
            for write in [false, true] {
                #expect(guest.faultIn(page, write: write) == .failed(.fault))
                #expect(guest.faultIn(page, write: write, noWait: true) == .failed(.fault))
            }
        }
    }

    @Test func `no-wait needs I/O where a page must be read, and nothing is held between the attempts`() throws {
        let guest = TestGuest()
        let object = MemoryObject(host: guest.test.host, pages: 1, slow: true)
        try guest.space.mapPages(0, 1, .object(object))
        try guest.setSlot(pages: 1)
        #expect(guest.faultIn(0, noWait: true) == .failed(.needsIO))
        #expect(guest.faultIn(0, write: true, noWait: true) == .failed(.needsIO))
        #expect(object.frame(of: 0) == nil)
        #expect(guest.faultIn(0) == .page(object.frame(of: 0), writable: true))
        #expect(guest.faultIn(0, noWait: true).error == nil)
    }

    @Test func `out of memory is FAULT, after no-wait has asked to wait`() throws {
        let guest = TestGuest()
        try guest.addMemory(0, 600)
        var full = 0
        while (try? guest.space.store(at(full), 1)) != nil { full += 1 }
        #expect(guest.faultIn(full, write: true, noWait: true) == .failed(.needsIO))
        #expect(guest.faultIn(full, write: true) == .failed(.fault))
        #expect(guest.faultIn(full) == .page(guest.test.host.zeroPage, writable: false), "which costs nothing")
    }

    @Test(arguments: [false, true])
    func `i: a PFN map is resolved whatever no-wait and signals say`(write: Bool) throws {
        let guest = TestGuest()
        let buffer = try #require(GraphicsBuffer(guest.test.host, pages: 2, order: 0))
        try guest.space.mapPages(0, 2, .driver(buffer))
        try guest.setSlot(pages: 2)
        guest.space.signals.pending = true
        let answer = guest.faultIn(0, write: write, noWait: true, interruptible: true)
        #expect(answer == .mapped(buffer.frame(of: 0), writable: true))
        guest.space.signals.pending = false
    }

    @Test func `ii: a valid VMA whose backing fails needs I/O first, and fails only when waited for`() throws {
        let guest = TestGuest()
        try guest.space.mapPages(0, 2, .object(MemoryObject(host: guest.test.host, pages: 1)))
        try guest.setSlot(pages: 2)
        #expect(guest.faultIn(1, noWait: true) == .failed(.needsIO))
        #expect(guest.faultIn(1) == .failed(.fault))
    }

    @Test func `iii: memory that may not be written is FAULT for a write, never RO_FAULT`() throws {
        let guest = TestGuest()
        try guest.addMemory(0, 1)
        try guest.space.store(at(0), 1)
        try guest.space.protect(pages(0..<1), .read)
        #expect(guest.faultIn(0, write: true) == .failed(.fault))
        #expect(guest.faultIn(0, write: true, noWait: true) == .failed(.fault), "no VM_WRITE: waiting would not help")
        #expect(guest.faultIn(0) == .page(guest.frame(0), writable: false))
    }

    @Test func `iv: a mixed map is served by get-user-pages only`() throws {
        let guest = TestGuest()
        let buffer = try #require(MixedBuffer(guest.test.host, pages: 2))
        try guest.space.mapPages(0, 2, .driver(buffer))
        try guest.setSlot(pages: 2)
        // Without locks no page without an owner is taken, and so a read finds none for writing (Linux 6.18: read and write
        // are two faults).
        #expect(guest.faultIn(0) == .page(buffer.frame(of: 0), writable: false))
        #expect(guest.faultIn(0, write: true) == .page(buffer.frame(of: 0), writable: true))
        #expect(guest.faultIn(1) == .failed(.fault))
        #expect(guest.faultIn(1, noWait: true) == .failed(.needsIO))
    }

    @Test func `v: a present read-only PFN entry is never upgraded`() throws {
        let guest = TestGuest()
        let ring = try #require(EventRing(guest.test.host, dataPages: 1))
        try guest.space.mapPages(0, 2, .driver(ring))
        try guest.setSlot(pages: 2)
        #expect(guest.faultIn(0) == .mapped(ring.frames[0], writable: false))
        #expect(guest.faultIn(0, write: true) == .failed(.readOnly))
        try guest.space.store(at(0), 1)
        #expect(guest.faultIn(0, write: true) == .mapped(ring.frames[0], writable: true), "the process upgraded it")
        #expect(guest.faultIn(1) == .mapped(ring.frames[1], writable: false))
        #expect(guest.faultIn(1, write: true) == .failed(.readOnly))
    }
}

/// `hva_to_pfn_fast` and `hva_to_pfn_slow`.
@Suite struct G2_4_FastAndSlow {
    @Test func `a pure read does not try for a writable page, a read that would like one does`() throws {
        let guest = TestGuest()
        try guest.addMemory(0, 1)
        try guest.space.store(at(0), 1)
        #expect(guest.follow(0) == .page(guest.frame(0), writable: false))
        #expect(guest.follow(0, wantsWritable: true) == .page(guest.frame(0), writable: true))
        #expect(guest.follow(0, write: true) == .page(guest.frame(0), writable: true))
    }

    @Test func `a shared page after fork is read as it is and copied for a write`() throws {
        let guest = TestGuest()
        try guest.addMemory(0, 1)
        try guest.space.store(at(0), 9)
        let child = try guest.space.fork()
        defer { child.exit() }
        let shared = guest.frame(0)
        #expect(guest.faultIn(0) == .page(shared, writable: false))
        let copy = guest.faultIn(0, write: true)
        #expect(copy == .page(guest.frame(0), writable: true) && copy.frame != shared)
        #expect(child.translate(at(0))?.frame == shared)
    }

    @Test func `a NUMA hint is taken as a fault`() throws {
        let guest = TestGuest()
        try guest.addMemory(0, 1)
        try guest.space.store(at(0), 1)
        let frame = guest.frame(0)
        for write in [false, true] {
            guest.space.hintNUMA(pages(0..<1))
            #expect(guest.faultIn(0, write: write) == .page(frame, writable: true))
        }
    }

    /// Between the slow lookup and the second fast one the process writes the page: another page stands there now, and
    /// the first reference is given back.
    @Test func `the page of the upgrade replaces the first one`() throws {
        let guest = TestGuest()
        let object = MemoryObject(host: guest.test.host, pages: 1)
        try guest.space.mapPages(0, 1, .object(object, shared: false))
        try guest.setSlot(pages: 1)
        var copies = 0
        for point in 0... {
            try guest.space.advise(pages(0..<1), .dontNeed)
            let space = guest.space
            let interposer = Interposer(point) { #expect(throws: Never.self) { try space.store(at(0), 5) } }
            let answer = interposer.run { guest.faultIn(0) }
            guard interposer.hasFired else { break }
            if answer.writable {
                copies += 1
                #expect(answer == .page(guest.frame(0), writable: true))
                #expect(answer.frame != object.frame(of: 0))
            } else {
                #expect(answer == .page(object.frame(of: 0), writable: false))
            }
        }
        #expect(copies > 0, "some point lies before the upgrade")
    }

    @Test func `a page of a huge folio is the exact page`() throws {
        let guest = TestGuest(ramFrames: 4096, thp: true)
        try guest.addMemory(0, 512)
        try guest.space.store(at(0), 1)
        #expect(guest.space.translate(at(7))?.level == .page2M)
        #expect(guest.faultIn(7) == .page(guest.frame(7), writable: true))
        #expect(guest.faultIn(7).frame?.number == guest.frame(0)!.number + 7)
    }
}
