import Audit
import Frames
import Machine
import Testing

@testable import GuestMemory
@testable import HostMemory

/// `kvm_vcpu_map` and `allow_unsafe_mappings`.
@Suite struct G2_12_HostMap {
    @Test func `ordinary memory is pinned until it is unmapped`() throws {
        let guest = TestGuest()
        try guest.addMemory(0, 1)
        let map = try guest.vm.map(gfn(0))
        let frame = map.frame
        #expect(map.isPinned && map.isWritable && map.guestFrame == gfn(0))
        #expect(guest.frame(0) == frame)
        #expect(guest.test.state(frame).referenceCount == 1 + 1024)
        let held = guest.test.journal.holdings
        #expect(held.map(\.frame) == [frame.number] && held.map(\.pins) == [1] && held.map(\.references) == [0])
        map.bytes.storeBytes(of: 6, as: UInt64.self)
        map.unmap()
        #expect(guest.test.state(frame).referenceCount == 1 && guest.test.journal.holdings.isEmpty)
        #expect(try guest.space.load(at(0)) == 6)
    }

    @Test func `a writable map dirties slot and page, a read-only map neither, written or not`() throws {
        let guest = TestGuest()
        try guest.addMemory(0, 2, log: true)
        for page in 0..<2 { try guest.space.store(at(page), 1) }
        try guest.vm.map(gfn(0)).unmap()
        try guest.vm.map(gfn(1), writable: false).unmap()
        let states = [guest.test.state(guest.frame(0)!), guest.test.state(guest.frame(1)!)]
        #expect(states.map { $0.flags.isDirty(by: .kvm) } == [true, false])
        #expect(states.map { $0.flags.isAccessed(by: .kvm) } == [true, true])
        #expect(try guest.log() == [0])
    }

    @Test func `a read-only map leaves the page of zeros and page cache shared, and unshares an anonymous page`() throws
    {
        let guest = TestGuest()
        let object = MemoryObject(host: guest.test.host, pages: 1)
        try guest.space.mapPages(0, 2)
        try guest.space.mapPages(2, 1, .object(object, shared: false))
        try guest.setSlot(pages: 3)
        try guest.space.store(at(1), 4)
        let child = try guest.space.fork()
        defer { child.exit() }
        let before = guest.test.state(guest.test.host.zeroPage)
        let zero = try guest.vm.map(gfn(0), writable: false)
        #expect(zero.frame == guest.test.host.zeroPage && guest.test.state(zero.frame) == before)
        zero.unmap()
        #expect(guest.test.state(guest.test.host.zeroPage) == before)
        let shared = guest.frame(1)
        let own = try guest.vm.map(gfn(1), writable: false)
        #expect(own.frame != shared && own.frame == guest.frame(1))
        own.unmap()
        let cached = try guest.vm.map(gfn(2), writable: false)
        #expect(cached.frame == object.frame(of: 0))
        cached.unmap()
    }

    @Test func `what can't be translated is EINVAL, and nothing is held`() throws {
        let guest = TestGuest()
        try guest.space.mapPages(0, 4)
        try guest.space.mapPages(4, 1, .object(MemoryObject(host: guest.test.host, pages: 1, slow: true)))
        try guest.setSlot(pages: 6)
        try guest.setSlot(1, guest: 8, pages: 1, host: 3, readOnly: true)
        try guest.space.store(at(0), 1)
        try guest.space.protect(pages(0..<1), .read)
        try guest.space.store(at(1), 1)
        guest.test.host.poison(try #require(guest.frame(1)))
        for (page, writable) in [(0, true), (1, true), (1, false), (5, true), (5, false), (8, true), (40, false)] {
            #expect(throws: Errno.EINVAL, "page \(page)") { try guest.vm.map(gfn(page), writable: writable).unmap() }
        }
        guest.space.signals.fatal = true
        #expect(throws: Errno.EINVAL) { try guest.vm.map(gfn(4)).unmap() }
        guest.space.signals.fatal = false
        try guest.vm.map(gfn(0), writable: false).unmap()
        try guest.vm.map(gfn(8), writable: false).unmap()
        #expect(guest.test.journal.holdings.isEmpty)
    }

    @Test func `I-16: PFN maps are refused unless unsafe mappings are allowed, then nothing keeps them`() throws {
        for unsafe in [false, true] {
            for kind in G2_6_Remapped.kinds { try mapPFN(kind, allowed: unsafe) }
        }
    }

    private func mapPFN(_ kind: G2_6_Remapped.Kind, allowed: Bool) throws {
        let guest = TestGuest(unsafe: allowed)
        let (driver, frame) = try kind.make(guest.test.host)
        try guest.space.mapPages(0, 2, .driver(driver))
        try guest.setSlot(pages: 2)
        let before = guest.test.memory.inspect(frame)
        let mapped = guest.frame(1)
        for writable in [true, false] {
            guard allowed else {
                #expect(throws: Errno.EINVAL) { try guest.vm.map(gfn(1), writable: writable).unmap() }
                #expect(guest.frame(1) == mapped, "refused before any walk")
                continue
            }
            let map = try guest.vm.map(gfn(1), writable: writable)
            let (pinned, found) = (map.isPinned, map.frame)
            #expect(!pinned && found == frame)
            map.unmap()
        }
        #expect(guest.test.memory.inspect(frame) == before)
    }

    @Test func `an unsafe mapping still needs the right to write`() throws {
        let guest = TestGuest(unsafe: true)
        let bar = try #require(DeviceBAR(guest.test.host, pages: 1, filling: .atMap))
        try guest.space.mapPages(0, 1, .driver(bar), .read)
        try guest.setSlot(pages: 1)
        #expect(throws: Errno.EINVAL) { try guest.vm.map(gfn(0)).unmap() }
        try guest.vm.map(gfn(0), writable: false).unmap()
    }

    /// With unsafe mappings allowed, get-user-pages memory is pinned or refused, never merely referenced.
    @Test func `I-3: memory that can be pinned is never mapped with less`() throws {
        let guest = TestGuest(unsafe: true)
        let object = MemoryObject(host: guest.test.host, pages: 1, slow: true)
        try guest.space.mapPages(0, 1, .object(object))
        try guest.setSlot(pages: 1)
        // A page table is there, so that a look at the entry is a point at which others may run.
        try guest.space.store(at(0), 1)
        var point = 0
        while true {
            object.punchHole(0..<1)
            let space = guest.space
            space.signals.fatal = true
            let interposer = Interposer(point) { space.signals.fatal = false }
            let pinned: Bool? = interposer.run {
                guard let map = try? guest.vm.map(gfn(0)) else { return nil }
                let pinned = map.isPinned
                map.unmap()
                return pinned
            }
            space.signals.fatal = false
            guard interposer.hasFired else { break }
            #expect(pinned != false, "point \(point)")
            point += 1
        }
        #expect(point > 0)
    }

    @Test(arguments: [PolicyName.tracked, .guess])
    func `the old policies hold a reference instead of a pin`(policy: PolicyName) throws {
        let guest = TestGuest(policy: policy)
        try guest.addMemory(0, 1, log: true)
        let map = try guest.vm.map(gfn(0))
        let frame = map.frame
        #expect(!map.isPinned && guest.test.state(frame).referenceCount == 2)
        map.unmap()
        #expect(guest.test.state(frame).referenceCount == 1 && guest.test.state(frame).flags.isDirty(by: .kvm))
        #expect(try guest.log() == [0])
    }

    @Test func `guess maps PFN memory that is not counted or can be, tracked asks for the parameter`() throws {
        for policy in [PolicyName.guess, .tracked] {
            for unsafe in [false, true] {
                let guest = TestGuest(policy: policy, unsafe: unsafe)
                let bar = try #require(DeviceBAR(guest.test.host, pages: 1, filling: .atMap))
                let counted = try #require(CountedPagesByFrame(guest.test.host, pages: 1))
                let buffer = try #require(GraphicsBuffer(guest.test.host, pages: 2, order: 1))
                try guest.space.mapPages(0, 1, .driver(bar))
                try guest.space.mapPages(1, 1, .driver(counted))
                try guest.space.mapPages(2, 2, .driver(buffer))
                try guest.setSlot(pages: 4)
                let works = [0, 1, 3].map { page in
                    do throws(Errno) {
                        let map = try guest.vm.map(gfn(page))
                        let state = guest.test.memory.inspect(map.frame)
                        if page == 1 { #expect(state?.referenceCount == 2) }
                        map.unmap()
                        return true
                    } catch { return false }
                }
                let allowed = policy == .guess || unsafe
                // A tail page of count 0: the heuristic fails it, `tracked` takes it for uncounted.
                #expect(works == [allowed, true, policy == .tracked && unsafe], "\(policy) \(unsafe)")
                #expect(guest.test.state(counted.frames[0]).referenceCount == 1)
                guest.expectedFindings = guest.test.journal.findings.count
            }
        }
    }
}

/// `gfn_to_page` and `kvm_prefetch_pages`.
@Suite struct G2_10_PageOfFrame {
    private func page(_ guest: TestGuest, _ page: Int, write: Bool = true) -> Answer? {
        guest.vm.withSlots {
            guard let reference = guest.vm.page(of: gfn(page), write: write) else { return nil }
            let answer = Answer(frame: reference.frame, writable: write, references: guest.heldReferences)
            reference.releaseUnused()
            return answer
        }
    }

    @Test func `a counted page with one reference, or nothing`() throws {
        let guest = TestGuest()
        let counted = try #require(CountedPagesByFrame(guest.test.host, pages: 1))
        try guest.space.mapPages(0, 2)
        try guest.space.mapPages(2, 1, .driver(counted))
        try guest.space.mapPages(3, 1)
        try guest.setSlot(0, pages: 3)
        try guest.setSlot(1, guest: 3, pages: 1, readOnly: true)
        #expect(page(guest, 0, write: false) == .page(guest.test.host.zeroPage, writable: false))
        #expect(page(guest, 1) == .page(guest.frame(1), writable: true))
        #expect(page(guest, 2) == nil && page(guest, 2, write: false) == nil, "PFN maps have no page")
        #expect(page(guest, 3) == nil, "read-only slot")
        #expect(page(guest, 3, write: false)?.references == 1)
        #expect(page(guest, 9) == nil)
        #expect(guest.test.state(counted.frames[0]).referenceCount == 1)
    }

    @Test func `allow_unsafe_mappings changes nothing here`() throws {
        let guest = TestGuest(unsafe: true)
        let counted = try #require(CountedPagesByFrame(guest.test.host, pages: 1))
        try guest.space.mapPages(0, 1, .driver(counted))
        try guest.setSlot(pages: 1)
        #expect(page(guest, 0) == nil)
    }
}

@Suite struct G2_11_PrefetchPages {
    private func prefetch(_ guest: TestGuest, _ page: Int, _ count: Int, slot: MemorySlot?) -> (Int, [HostFrame]) {
        var frames: [HostFrame] = []
        let guardian = guest.vm.lockMMU()
        let result = guest.vm.prefetchPages(gfn(page), slot: slot, count: count) { index, reference in
            #expect(index == frames.count)
            frames.append(reference.frame)
            #expect(guest.heldReferences == 1)
            reference.releaseDirty(stabilisedBy: .mmuLock)
        }
        guardian.unlock()
        #expect(guest.heldReferences == 0)
        return (result, frames)
    }

    @Test func `-1 without a usable slot, 0 at its end, else the pages that are there for write`() throws {
        let guest = TestGuest()
        try guest.space.mapPages(0, 8)
        try guest.setSlot(0, pages: 6)
        try guest.setSlot(1, guest: 6, pages: 2, readOnly: true)
        for page in [0, 1, 2, 4, 6] { try guest.space.store(at(page), 1) }
        _ = try guest.space.load(at(3))
        let slot = guest.vm.slot(containing: gfn(0))
        #expect(prefetch(guest, 0, 1, slot: nil).0 == -1)
        #expect(prefetch(guest, 0, 1, slot: slot?.invalidCopy()).0 == -1)
        #expect(prefetch(guest, 6, 1, slot: guest.vm.slot(containing: gfn(6))).0 == -1)
        #expect(prefetch(guest, 4, 3, slot: slot).0 == 0)
        #expect(prefetch(guest, 5, 1, slot: slot).0 == 0, "absent: nothing is faulted in")
        #expect(guest.frame(5) == nil)
        let (count, frames) = prefetch(guest, 0, 6, slot: slot)
        #expect(count == 3 && frames == (0..<3).map { guest.frame($0)! }, "the page of zeros ends it")
        #expect(prefetch(guest, 4, 2, slot: slot).0 == 1)
        #expect(frames.allSatisfy { guest.test.state($0).flags.isDirty(by: .kvm) })
    }

    @Test func `a read-only entry and a PFN map give nothing`() throws {
        let guest = TestGuest()
        let counted = try #require(CountedPagesByFrame(guest.test.host, pages: 1))
        try guest.space.mapPages(0, 1)
        try guest.space.mapPages(1, 1, .driver(counted))
        try guest.setSlot(pages: 2)
        try guest.space.store(at(0), 1)
        try guest.space.store(at(1), 1)
        try guest.space.protect(pages(0..<1), .read)
        let slot = guest.vm.slot(containing: gfn(0))
        #expect(prefetch(guest, 0, 1, slot: slot).0 == 0 && prefetch(guest, 1, 1, slot: slot).0 == 0)
    }
}
