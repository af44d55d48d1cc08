import Audit
import Frames
import Machine
import Synchrony
import Testing

@testable import GuestMemory
@testable import HostMemory

extension TestGuest {
    /// The frame of the page that is handed out for a guest frame; the page is given back at once.
    func pageHandedOut(_ page: Int, write: Bool = true) -> HostFrame? {
        vm.withSlots {
            guard let reference = vm.page(of: gfn(page), write: write) else { return nil }
            let frame = reference.frame
            reference.releaseUnused()
            return frame
        }
    }

    /// A fault that ends as `use` says.
    func fault(_ page: Int, write: Bool, _ use: FaultUse) {
        vm.withSlots {
            switch vm.faultIn(gfn(page), slot: vm.slot(containing: gfn(page)), write: write, snapshot: vm.snapshot()) {
            case .failed(let error, _): Issue.record("\(error)")
            case .frame(let faulted):
                let guardian = vm.lockMMUForFault()
                faulted.finish(use, holding: guardian)
                guardian.unlock()
            }
        }
    }
}

@Suite struct Patch01_NoPageIsNil {
    @Test func `a lookup that fails gives nil and nothing else`() throws {
        try checkPatch(1) {
            let guest = TestGuest()
            try guest.space.mapPages(0, 1)
            try guest.space.mapPages(4, 1)
            try guest.setSlot(0, pages: 2)
            try guest.setSlot(1, guest: 4, pages: 1, readOnly: true)
            for (page, write) in [(1, true), (1, false), (9, true), (9, false), (4, true)] {
                #expect(guest.pageHandedOut(page, write: write) == nil, "page \(page)")
            }
            #expect(guest.pageHandedOut(0) == guest.frame(0))
        }
    }
}

@Suite struct Patch02_NothingMayBeReleased {
    @Test func `the end of a fault that has no page does nothing`() throws {
        try checkPatch(2) {
            let guest = TestGuest()
            let bar = try #require(DeviceBAR(guest.test.host, pages: 1, filling: .atMap))
            try guest.space.mapPages(0, 1, .driver(bar))
            try guest.setSlot(pages: 1)
            for use in [FaultUse.unused, .used(dirty: false), .used(dirty: true)] {
                guest.fault(0, write: true, use)
                #expect(guest.test.journal.findings.isEmpty)
            }
            #expect(guest.test.events(.released).isEmpty && guest.test.events(.referenceDropped).isEmpty)
        }
    }
}

@Suite struct Patch03_ReleaseUnused {
    @Test func `it drops the reference and marks nothing`() throws {
        try checkPatch(3) {
            let guest = TestGuest()
            try guest.addMemory(0, 1)
            try guest.space.store(at(0), 1)
            let frame = try #require(guest.frame(0))
            guard let reference = guest.vm.page(of: gfn(0)) else {
                Issue.record("no page")
                return
            }
            let flags = guest.test.state(frame).flags
            #expect(guest.test.state(frame).referenceCount == 2)
            reference.releaseUnused()
            #expect(guest.test.state(frame).referenceCount == 1)
            #expect(guest.test.state(frame).flags == flags)
        }
    }
}

/// Changed the name (`kvm_prefetch_pages`) and nothing to be seen.
@Suite struct Patch11_PrefetchPages {
    @Test func `-1 without a slot to be written, 0 at its end, else the pages that are there`() throws {
        let guest = TestGuest()
        try guest.space.mapPages(0, 4)
        try guest.setSlot(0, pages: 3)
        try guest.setSlot(1, guest: 3, pages: 1, readOnly: true)
        for page in 0..<2 { try guest.space.store(at(page), 1) }
        func prefetch(_ page: Int, _ count: Int) -> Int {
            let slot = guest.vm.slot(containing: gfn(page))
            return guest.vm.prefetchPages(gfn(page), slot: slot, count: count) { _, reference in
                #expect(reference.frame == guest.frame(page) || reference.frame == guest.frame(page + 1))
                reference.releaseUnused()
            }
        }
        #expect([prefetch(9, 1), prefetch(3, 1), prefetch(2, 2), prefetch(2, 1)] == [-1, -1, 0, 0])
        #expect([prefetch(0, 1), prefetch(0, 2), prefetch(0, 3), prefetch(1, 2)] == [1, 2, 2, 1])
    }
}

/// Moved code.
@Suite struct Patch28_ReleasesMoved {
    @Test(arguments: [FaultUse.used(dirty: false), .used(dirty: true)])
    func `a used page is accessed, and dirty if that is said`(use: FaultUse) throws {
        let guest = TestGuest()
        try guest.addMemory(0, 1)
        try guest.space.store(at(0), 1)
        guest.fault(0, write: true, use)
        let state = guest.test.state(try #require(guest.frame(0)))
        #expect(state.referenceCount == 1 && state.flags.isAccessed(by: .kvm))
        #expect(state.flags.isDirty(by: .kvm) == (use == .used(dirty: true)))
    }
}

@Suite struct Patch75_PageFromGetUserPages {
    @Test func `PFN-mapped memory has no page for the caller, though it has a page frame`() throws {
        try checkPatch(75) {
            let guest = TestGuest()
            let counted = try #require(CountedPagesByFrame(guest.test.host, pages: 1))
            try guest.space.mapPages(0, 1, .driver(counted))
            try guest.setSlot(pages: 1)
            for write in [false, true] { #expect(guest.pageHandedOut(0, write: write) == nil) }
            #expect(guest.test.events(.referenceTaken).isEmpty)
            #expect(guest.test.state(counted.frames[0]).referenceCount == 1)
        }
    }
}

@Suite struct Patch76_PageForReading {
    @Test func `a read-only slot gives its page to who only reads`() throws {
        try checkPatch(76) {
            let guest = TestGuest()
            try guest.addMemory(0, 2, readOnly: true)
            try guest.space.store(at(0), 1)
            #expect(guest.pageHandedOut(0, write: false) == guest.frame(0))
            #expect(guest.pageHandedOut(1, write: false) == guest.test.host.zeroPage)
            #expect(guest.pageHandedOut(0, write: true) == nil)
        }
    }
}

@Suite struct Patch81_PageIsRequired {
    @Test func `who does not take the page is told, and the page is put`() throws {
        try checkPatch(81) {
            let guest = TestGuest()
            try guest.addMemory(0, 1)
            try guest.space.store(at(0), 1)
            guest.expectedFindings = 1
            guest.vm.withSlots {
                let slot = guest.vm.slot(containing: gfn(0))
                _ = guest.vm.faultIn(gfn(0), slot: slot, write: true, snapshot: guest.vm.snapshot())
            }
            #expect(guest.test.journal.findings.map(\.invariant) == [.i1])
            #expect(guest.test.state(try #require(guest.frame(0))).referenceCount == 1)
        }
    }
}
