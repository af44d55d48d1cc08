import Audit
import Frames
import Synchrony
import Testing

@testable import HostMemory

extension AddressSpace {
    /// The PFN walk, as KVM does it: lock, look up, walk.
    func walk(_ address: UserAddress) -> PFNMapping? {
        mmapLock.lockForRead()
        defer { mmapLock.unlockRead() }
        guard let vma = vmaLookup(address) else { return nil }
        return withPFNMapping(of: address, in: vma) { $0 }
    }
    func fixup(_ address: UserAddress, write: Bool) -> FixupResult {
        mmapLock.lockForRead()
        defer { mmapLock.unlockRead() }
        return fixupUserFault(address, write: write)
    }
}

@Suite struct I5_PFNMaps {
    let test = TestHost(ramFrames: 2048, deviceFrames: 2048)

    @Test func `a walk needs a PFN or I/O mapping and a present entry`() throws {
        let space = test.space()
        defer { space.exit() }
        try space.mapPages(0, 1)
        try space.store(at(0), 1)
        #expect(space.walk(at(0)) == nil)
        #expect(space.walk(at(5)) == nil)
        let buffer = try #require(GraphicsBuffer(test.host, pages: 4, order: 2))
        try space.mapPages(8, 4, .driver(buffer))
        #expect(space.walk(at(8)) == nil)
        #expect(space.fixup(at(8), write: false) == FixupResult(error: nil, unlocked: false))
        #expect(
            space.walk(at(9))
                == PFNMapping(frame: buffer.frame(of: 1)!, writable: true, special: true, isUncounted: false))
    }

    @Test func `faults, walks and unmapping change no count of a plain block`() throws {
        let space = test.space()
        let buffer = try #require(GraphicsBuffer(test.host, pages: 8, order: 3))
        let before = (0..<8).map { test.state(buffer.frame(of: $0)!) }
        #expect(before.map(\.referenceCount) == [1, 0, 0, 0, 0, 0, 0, 0])
        try space.mapPages(0, 8, .driver(buffer))
        for page in 0..<8 {
            try space.store(at(page), UInt64(page))
            #expect(space.walk(at(page))?.frame == buffer.frame(of: page))
        }
        #expect((0..<8).map { test.state(buffer.frame(of: $0)!) } == before)
        #expect(test.journal.events.allSatisfy { $0.kind != .referenceTaken && $0.kind != .pinTaken })
        space.exit()
        #expect((0..<8).map { test.state(buffer.frame(of: $0)!) } == before)
    }

    @Test func `reserved and counted frames keep their counts and flags`() throws {
        let space = test.space()
        let reserved = try #require(ReservedMemory(test.host, pages: 2))
        let counted = try #require(CountedPagesByFrame(test.host, pages: 2))
        try space.mapPages(0, 2, .driver(reserved))
        try space.mapPages(2, 2, .driver(counted))
        let frames = Array(reserved.frames) + counted.frames
        let before = frames.map(test.state)
        for page in 0..<4 {
            try space.store(at(page), 1)
            #expect(space.walk(at(page))?.frame == frames[page])
        }
        try space.unmap(pages(0..<4))
        #expect(frames.map(test.state) == before)
        space.exit()
    }

    @Test func `a BAR has no page frames, and may be mapped by a huge leaf`() throws {
        let space = test.space()
        defer { space.exit() }
        let bar = try #require(DeviceBAR(test.host, pages: 1024, filling: .byHugeFault))
        try space.mapPages(0, 1024, .driver(bar))
        try space.store(at(700, 16), 9)
        #expect(bar.read(page: 700, offset: 16) == 9)
        #expect(space.mappingLevel(of: at(700)) == .page2M && space.mappingLevel(of: at(0)) == .page4K)
        let found = try #require(space.walk(at(700)))
        #expect(found.frame == bar.frames.lowerBound.advanced(by: 700) && !test.memory.hasPageFrame(found.frame))
        try space.protect(pages(600..<601), .read)
        #expect(space.walk(at(700)) == nil, "a device's huge leaf is removed, not split")
        #expect(try space.load(at(700, 16)) == 9)
        #expect(space.mappingLevel(of: at(700)) == .page4K)
    }

    @Test func `fixup answers -EFAULT without VMA, rights or backing, and -EINTR to the dying`() throws {
        let space = test.space()
        defer { space.exit() }
        let bar = try #require(DeviceBAR(test.host, pages: 2, filling: .byFault))
        try space.mapPages(0, 2, .driver(bar), .read)
        let fault = FixupResult(error: .EFAULT, unlocked: false)
        #expect(space.fixup(at(9), write: false) == fault)
        #expect(space.fixup(at(0), write: true) == fault)
        space.signals.fatal = true
        #expect(space.fixup(at(0), write: false) == FixupResult(error: .EINTR, unlocked: false))
        space.signals.fatal = false
        bar.disable()
        #expect(space.fixup(at(0), write: false) == fault)
        bar.enable()
        #expect(space.fixup(at(0), write: false) == FixupResult(error: nil, unlocked: false))
    }

    @Test func `a driver that needs the lock dropped makes the caller's VMA stale`() throws {
        let space = test.space()
        defer { space.exit() }
        let driver = PatientDriver(test.host)
        try space.mapPages(0, 1, .driver(driver))
        #expect(space.fixup(at(0), write: false) == FixupResult(error: nil, unlocked: true))
        #expect(driver.waits == 1 && space.walk(at(0)) != nil)
    }

    @Test func `a ring's page 0 stays read-only for walks until its first write faults`() throws {
        let space = test.space()
        defer { space.exit() }
        let ring = try #require(EventRing(test.host, dataPages: 2))
        let listener = ListeningNotifier(space)
        space.register(listener)
        try space.mapPages(0, 3, .driver(ring))
        #expect(space.fixup(at(0), write: true).error == nil)
        #expect(space.walk(at(0))?.writable == false, "a fault on an absent entry inserts it read-only")
        try space.store(at(0), 3)
        #expect(space.walk(at(0))?.writable == true)
        #expect(try space.load(at(1)) == 0)
        #expect(throws: Errno.EFAULT) { try space.store(at(1), 3) }
        #expect(listener.calls.isEmpty, "the frame stays: nothing to invalidate")
    }

    @Test func `a private PFN map copies on write, and the walk reports the copy`() throws {
        let space = test.space()
        defer { space.exit() }
        let pages = try #require(CountedPagesByFrame(test.host, pages: 1))
        try space.mapPages(0, 1, .driver(pages, shared: false))
        #expect(try space.load(at(0)) == 0)
        #expect(space.walk(at(0))?.writable == false)
        try space.store(at(0), 3)
        let found = try #require(space.walk(at(0)))
        #expect(found.frame != pages.frames[0] && found.writable && !found.special)
        #expect(test.memory.word(at: pages.frames[0].physicalAddress).load() == 0)
    }

    @Test func `a mapping that allows nothing is not walked`() throws {
        let space = test.space()
        defer { space.exit() }
        try space.mapPages(0, 1, .driver(#require(DeviceBAR(test.host, pages: 1, filling: .atMap))))
        try space.protect(pages(0..<1), .none)
        #expect(space.walk(at(0)) == nil)
        #expect(space.fixup(at(0), write: false).error == .EFAULT)
        try space.protect(pages(0..<1), .readWrite)
        #expect(space.walk(at(0))?.writable == true)
    }

    @Test func `discarding a PFN map is refused`() throws {
        let space = test.space()
        defer { space.exit() }
        try space.mapPages(0, 1, .driver(#require(DeviceBAR(test.host, pages: 1, filling: .atMap))))
        #expect(throws: Errno.EINVAL) { try space.advise(pages(0..<1), .dontNeed) }
    }

    @Test func `fork copies PFN entries, and the driver reaches the child's`() throws {
        let space = test.space()
        let buffer = try #require(GraphicsBuffer(test.host, pages: 4, order: 2))
        try space.mapPages(0, 4, .driver(buffer))
        try space.store(at(1), 5)
        let child = try space.fork()
        #expect(child.walk(at(1)) == space.walk(at(1)))
        buffer.free()
        #expect(child.walk(at(1)) == nil && space.walk(at(1)) == nil)
        #expect(throws: Errno.EFAULT) { try child.load(at(1)) }
        child.exit()
        space.exit()
    }
}

/// Says retry once.
private final class PatientDriver: DriverMapping, @unchecked Sendable {
    let pages: CountedPagesByFrame
    var waits = 0
    init(_ host: Host) {
        pages = CountedPagesByFrame(host, pages: 1)!
        super.init(name: "patient", flags: .frames)
        claim(pages.frames[0]..<pages.frames[0].advanced(by: 1))
    }
    override func fault(
        _ space: AddressSpace, _ vma: VMAInfo, _ address: UserAddress, write: Bool
    ) -> DriverFault {
        waits == 0 ? .retry : space.insertFrame(pages.frames[0], at: address, in: vma)
    }
    override func waitForRetry() {
        #expect(!isHeld(.mmap))
        waits += 1
    }
}

@Suite struct GraphicsBuffers {
    let test = TestHost(ramFrames: 2048, deviceFrames: 256)

    @Test func `a fault maps the page and some neighbours`() throws {
        let space = test.space()
        defer { space.exit() }
        let buffer = try #require(GraphicsBuffer(test.host, pages: 64, order: 2))
        try space.mapPages(0, 64, .driver(buffer))
        #expect(try space.load(at(10)) == 0)
        #expect(space.walk(at(9)) == nil && space.walk(at(25)) != nil && space.walk(at(26)) == nil)
    }

    @Test func `its bytes survive moving, eviction and swapping, and entries go in between`() throws {
        let space = test.space()
        defer { space.exit() }
        let buffer = try #require(GraphicsBuffer(test.host, pages: 8, order: 2))
        let listener = ListeningNotifier(space)
        space.register(listener)
        try space.mapPages(0, 8, .driver(buffer))
        for page in 0..<8 { try space.store(at(page, 8), UInt64(100 + page)) }
        func check(_ place: GraphicsBuffer.Place) throws {
            #expect(buffer.place == place)
            #expect(listener.calls.last.map { $0.kind == .end && $0.present == 0 } == true)
            for page in 0..<8 { #expect(try space.load(at(page, 8)) == UInt64(100 + page)) }
            for page in 0..<8 { #expect(try buffer.read(page: page, offset: 8) == UInt64(100 + page)) }
        }
        let old = try #require(buffer.frame(of: 3))
        try buffer.move(to: .deviceMemory)
        try check(.deviceMemory)
        #expect(buffer.frame(of: 3) != old && !test.memory.hasPageFrame(buffer.frame(of: 3)!))
        try buffer.evict()
        try check(.system)
        try buffer.evict()
        try check(.swappedOut)
        #expect(buffer.place == .system)
        #expect(listener.isBalanced)
    }

    @Test func `a freed buffer is unmapped before its frames go back, and faults are SIGBUS`() throws {
        let space = test.space()
        defer { space.exit() }
        let pool = GraphicsPool(host: test.host)
        let buffer = try #require(GraphicsBuffer(pool: pool, pages: 8, order: 2))
        let listener = ListeningNotifier(space)
        space.register(listener)
        try space.mapPages(0, 8, .driver(buffer))
        try space.store(at(0), 1)
        buffer.free()
        #expect(listener.calls.map(\.present) == [8, 0])
        #expect(pool.idleFrames == 8)
        #expect(throws: Errno.EFAULT) { try space.load(at(0)) }
        #expect(throws: Errno.EINVAL) { try buffer.move(to: .system) }
        let free = test.memory.freeFrames
        pool.shrink()
        #expect(test.memory.freeFrames == free + 8)
    }

    @Test func `a pool reuses blocks and hands them out as zeros`() throws {
        let pool = GraphicsPool(host: test.host)
        let first = try #require(GraphicsBuffer(pool: pool, pages: 4, order: 2))
        let frame = first.frame(of: 0)
        try first.write(page: 3, offset: 0, 77)
        first.free()
        let second = try #require(GraphicsBuffer(pool: pool, pages: 4, order: 2))
        #expect(second.frame(of: 0) == frame)
        #expect(try second.read(page: 3, offset: 0) == 0)
    }

    @Test func `all its frames come back when it is dropped`() throws {
        let leaked = test.leaked {
            let buffer = GraphicsBuffer(test.host, pages: 7, order: 2)
            #expect(buffer?.place == .system)
        }
        #expect(leaked == 0)
    }

    @Test func `without memory there is no buffer and nothing is lost`() {
        let leaked = test.leaked { #expect(GraphicsBuffer(test.host, pages: 4096, order: 2) == nil) }
        #expect(leaked == 0)
    }
}
