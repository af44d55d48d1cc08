import Audit
import Frames
import Machine
import Synchrony
import Testing

@testable import GuestMemory
@testable import HostMemory

extension TestGuest {
    /// One map, given back: its frame, or the error.
    func mapped(_ page: Int, writable: Bool = true) -> Result<HostFrame, Errno> {
        do throws(Errno) {
            let map = try vm.map(gfn(page), writable: writable)
            let frame = map.frame
            map.unmap()
            return .success(frame)
        } catch {
            return .failure(error)
        }
    }
}

@Suite struct Patch22_RemappedHasNoPage {
    @Test func `memory without page frames is mapped and has no page`() throws {
        try checkPatch(22) {
            let guest = TestGuest(unsafe: true)
            let bar = try #require(DeviceBAR(guest.test.host, pages: 1, filling: .atMap))
            try guest.space.mapPages(0, 1, .driver(bar))
            try guest.space.mapPages(1, 1)
            try guest.setSlot(pages: 2)
            for (page, isRemapped) in [(0, true), (1, false)] {
                let map = try guest.vm.map(gfn(page))
                let says = map.isRemapped
                #expect(says == isRemapped)
                map.bytes.storeBytes(of: 7, as: UInt64.self)
                map.unmap()
                #expect(try guest.space.load(at(page)) == 7)
            }
        }
    }

    @Test func `EFAULT where the kernel can't map it, and nothing is held`() throws {
        let guest = TestGuest(unsafe: true)
        guest.vm.remapsDeviceMemory = false
        let bar = try #require(DeviceBAR(guest.test.host, pages: 1, filling: .atMap))
        try guest.space.mapPages(0, 1, .driver(bar))
        try guest.space.mapPages(1, 1)
        try guest.setSlot(pages: 2)
        #expect(guest.mapped(0) == .failure(.EFAULT))
        #expect(guest.mapped(1) == .success(try #require(guest.frame(1))))
        #expect(guest.test.journal.holdings.isEmpty)
    }
}

/// The same translation as everything else.
@Suite struct Patch30_MapsFollowFrames {
    @Test func `a map finds what a translation finds`() throws {
        let guest = TestGuest(unsafe: true)
        let bar = try #require(DeviceBAR(guest.test.host, pages: 1, filling: .byFault))
        let buffer = try #require(GraphicsBuffer(guest.test.host, pages: 2, order: 1))
        let mixed = try #require(MixedBuffer(guest.test.host, pages: 2))
        try guest.space.mapPages(0, 1)
        try guest.space.mapPages(1, 1, .anonymous, .read)
        try guest.space.mapPages(2, 1, .object(MemoryObject(host: guest.test.host, pages: 1), shared: false))
        try guest.space.mapPages(3, 1, .driver(bar))
        try guest.space.mapPages(4, 2, .driver(buffer))
        try guest.space.mapPages(6, 2, .driver(mixed))
        try guest.setSlot(0, pages: 9)
        for writable in [false, true] {
            for page in 0..<10 {
                let answer = guest.follow(page, write: writable)
                switch guest.mapped(page, writable: writable) {
                case .success(let frame): #expect(answer.frame == frame, "page \(page)")
                case .failure(let error): #expect(answer.error != nil && error == .EINVAL, "page \(page)")
                }
            }
        }
        #expect(guest.test.journal.holdings.isEmpty)
    }
}

@Suite struct Patch31_MapsArePinned {
    @Test func `a small page's count goes up by 1024, and the page does not move`() throws {
        try checkPatch(31) {
            let guest = TestGuest(reclaims: true)
            try guest.addMemory(0, 1)
            try guest.space.store(at(0), 1)
            let frame = try #require(guest.frame(0))
            let before = guest.test.state(frame).referenceCount
            let map = try guest.vm.map(gfn(0))
            let isPinned = map.isPinned
            #expect(isPinned)
            #expect(guest.test.state(frame).referenceCount == before + 1024)
            #expect(guest.test.journal.holdings.map(\.pins) == [1])
            #expect(guest.test.host.migrate(guest.space, pages(0..<1)) == 0 && guest.frame(0) == frame)
            map.unmap()
            #expect(guest.test.state(frame).referenceCount == before)
            #expect(guest.test.host.migrate(guest.space, pages(0..<1)) == 1)
        }
    }

    @Test func `of a large folio the pins are counted`() throws {
        try checkPatch(31) {
            let guest = TestGuest(ramFrames: 4096, thp: true)
            try guest.addMemory(0, 512)
            try guest.space.store(at(0), 1)
            let frame = try #require(guest.frame(5))
            let before = guest.test.state(frame)
            let map = try guest.vm.map(gfn(5))
            #expect(guest.test.state(frame).pinCount == before.pinCount + 1)
            #expect(guest.test.state(frame).headReferenceCount == before.headReferenceCount + 1)
            map.unmap()
            #expect(guest.test.state(frame).pinCount == before.pinCount)
        }
    }
}

@Suite struct Patch33_WritabilityFixedAtMap {
    @Test func `a read-only map leaves slot and page clean, a writable one dirties both, written or not`() throws {
        try checkPatch(33) {
            let guest = TestGuest()
            try guest.addMemory(0, 2, log: true)
            for page in 0..<2 { try guest.space.store(at(page), 1) }
            try guest.vm.map(gfn(0), writable: false).unmap()
            try guest.vm.map(gfn(1), writable: true).unmap()
            #expect(try guest.vm.getDirtyLog(slot: 0) == [2])
            let dirty = try (0..<2).map { guest.test.state(try #require(guest.frame($0))).flags.isDirty(by: .kvm) }
            #expect(dirty == [false, true])
        }
    }
}

@Suite struct Patch34_ReadOnlyMapsRead {
    @Test func `memory that the process may only read can be mapped to be read`() throws {
        try checkPatch(34) {
            let guest = TestGuest()
            try guest.addMemory(0, 1)
            try guest.space.store(at(0), 1)
            try guest.space.protect(pages(0..<1), .read)
            #expect(guest.mapped(0, writable: false) == .success(try #require(guest.frame(0))))
            #expect(guest.mapped(0, writable: true) == .failure(.EINVAL))
        }
    }

    @Test func `and what nobody has written stays shared`() throws {
        try checkPatch(34) {
            let guest = TestGuest()
            let object = MemoryObject(host: guest.test.host, pages: 1)
            try guest.space.mapPages(0, 1)
            try guest.space.mapPages(1, 1, .object(object, shared: false))
            try guest.setSlot(pages: 2)
            #expect(guest.mapped(0, writable: false) == .success(guest.test.host.zeroPage))
            let found = guest.mapped(1, writable: false)
            #expect(found == .success(try #require(object.frame(of: 0))))
        }
    }
}

@Suite struct Patch35_PFNMAPMapsAreRefused {
    @Test(arguments: G2_6_Remapped.kinds)
    func `memory that can't be pinned is mapped only with allow_unsafe_mappings`(kind: G2_6_Remapped.Kind) throws {
        try checkPatch(35) {
            for unsafe in [false, true] {
                let guest = TestGuest(unsafe: unsafe)
                let (driver, frame) = try kind.make(guest.test.host)
                try guest.space.mapPages(0, 2, .driver(driver))
                try guest.setSlot(pages: 2)
                let before = guest.test.memory.inspect(frame)
                for writable in [false, true] {
                    #expect(guest.mapped(1, writable: writable) == (unsafe ? .success(frame) : .failure(.EINVAL)))
                }
                #expect(guest.test.memory.inspect(frame) == before)
                #expect(guest.store(1, 1) == .stored, "the guest itself may use it")
            }
        }
    }
}
