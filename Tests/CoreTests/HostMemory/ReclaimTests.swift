import Audit
import Frames
import Synchrony
import Testing

@testable import HostMemory

/// A secondary MMU that uses every page all the time.
private final class UsingNotifier: MMUNotifier, @unchecked Sendable {
    // Unchecked: tests call from one task at a time.
    var uses = true
    override func clearFlushYoung(_ range: Range<UserAddress>) -> Bool { uses }
}

/// Reclaim and swap. What a process sees of them is compared with the running kernel in `HostConformance_RandomCalls`; here
/// is the rest: frames, counts, notifiers, the device's failures.
@Suite struct ReclaimAndSwap {
    let swap = SwapDevice(slots: 512)
    let test: TestHost
    init() { test = TestHost(ramFrames: 1024, swap: swap) }

    private func filled(_ count: Int) throws -> AddressSpace {
        let space = test.space()
        try space.mapPages(0, count)
        for page in 0..<count { try space.store(at(page), UInt64(page + 1)) }
        return space
    }

    @Test func `a page of shared memory that only was read is dropped; what anybody wrote comes back`() throws {
        let swap = SwapDevice(slots: 16)
        let test = TestHost(ramFrames: 1024, swap: swap)
        let object = MemoryObject(host: test.host, pages: 4)
        object.seal(.shrink)
        let space = test.space()
        defer { space.exit() }
        try space.mapPages(0, 4, .object(object))
        #expect(try space.load(at(0)) == 0)
        try space.store(at(1), 5)
        try object.write(page: 2, offset: 0, 6)
        let device = try Udmabuf(object, pages: 3..<4)
        device.write(page: 0, offset: 0, 7)
        device.free()
        for _ in 0..<4 { test.host.reclaim(pages: 8) }
        #expect((0..<4).allSatisfy { object.frame(of: $0) == nil } && swap.usedSlots == 3)
        #expect(try (0..<4).map { try space.load(at($0)) } == [0, 5, 6, 7])
    }

    @Test func `old pages go to the device and come back with their bytes; nothing is left over`() throws {
        let leaked = try test.leaked {
            let space = try filled(64)
            #expect(test.host.reclaim(pages: 64) > 0)
            // What was used once gets a second turn.
            while test.host.reclaim(pages: 64) > 0 {}
            #expect(swap.usedSlots == 64)
            #expect((0..<64).allSatisfy { space.translate(at($0)) == nil })
            for page in 0..<64 { #expect(try space.load(at(page)) == UInt64(page + 1)) }
            #expect(swap.usedSlots == 0)
            space.exit()
        }
        #expect(leaked == 0)
    }

    @Test func `a page that was used since the last look gets another turn, also if a secondary MMU used it`() throws {
        let space = try filled(8)
        defer { space.exit() }
        let listener = UsingNotifier()
        space.register(listener)
        for _ in 0..<3 { #expect(test.host.reclaim(pages: 4) == 0) }
        listener.uses = false
        while test.host.reclaim(pages: 8) > 0 {}
        #expect(swap.usedSlots == 8)
        space.unregister(listener)
    }

    @Test func `the notifier hears of each page before it goes and after`() throws {
        let space = try filled(1)
        defer { space.exit() }
        let listener = ListeningNotifier(space)
        space.register(listener)
        try space.advise(pages(0..<1), .pageOut)
        #expect(
            listener.calls == [
                .init(kind: .start, first: at(0).page, pages: 1, present: 1),
                .init(kind: .end, first: at(0).page, pages: 1, present: 0),
            ])
        space.unregister(listener)
    }

    @Test func `a pinned page stays where it is, and is paged out when the pin is gone`() throws {
        let space = try filled(1)
        defer { space.exit() }
        let frame = space.translate(at(0))?.frame
        let pin = try space.pinUserPageUnlocked(at(0), LookupFlags(write: true), holder: .getUserPages)
        try space.advise(pages(0..<1), .pageOut)
        #expect(space.translate(at(0))?.frame == frame)
        pin.unpin(dirty: true)
        try space.advise(pages(0..<1), .pageOut)
        #expect(space.translate(at(0)) == nil)
        #expect(try space.load(at(0)) == 1)
    }

    @Test func `a page that somebody refers to keeps its frame in the device's cache, and what he writes is not lost`()
        throws
    {
        let space = try filled(1)
        defer { space.exit() }
        let page = try space.getUserPageUnlocked(at(0), LookupFlags(write: true), holder: .getUserPages)
        let frame = page.frame
        try space.advise(pages(0..<1), .pageOut)
        #expect(space.translate(at(0)) == nil && swap.usedSlots == 1)
        // As DMA would.
        test.memory.word(at: frame.physicalAddress).storeData(0xd0a)
        page.releaseDirty(stabilisedBy: .exclusiveOwner)
        #expect(try space.load(at(0)) == 0xd0a)
        #expect(space.translate(at(0))?.frame == frame)
    }

    @Test func `after fork both processes find the page in the device's cache as one frame`() throws {
        let space = try filled(1)
        defer { space.exit() }
        try space.advise(pages(0..<1), .pageOut)
        let child = try space.fork()
        defer { child.exit() }
        #expect(try space.load(at(0)) == 1 && child.load(at(0)) == 1)
        #expect(space.translate(at(0))?.frame == child.translate(at(0))?.frame)
        #expect(swap.usedSlots == 0)
        try child.store(at(0), 2)
        #expect(try space.load(at(0)) == 1)
    }

    @Test func `memory that is advised free is dropped, unless it is written again`() throws {
        let space = try filled(2)
        defer { space.exit() }
        try space.advise(pages(0..<2), .free)
        try space.store(at(1), 7)
        while test.host.reclaim(pages: 8) > 0 {}
        #expect(try space.load(at(0)) == 0 && space.load(at(1)) == 7)
    }

    @Test func `a page that can't be written out stays, and keeps its bytes`() throws {
        let space = try filled(1)
        defer { space.exit() }
        swap.failNext(writes: 1)
        try space.advise(pages(0..<1), .pageOut)
        #expect(try space.load(at(0)) == 1)
        #expect(swap.usedSlots == 0)
    }

    @Test func `a page that can't be read back is a bus error, and is there when the device works again`() throws {
        let space = try filled(1)
        defer { space.exit() }
        try space.advise(pages(0..<1), .pageOut)
        swap.failNext(reads: 2)
        #expect(throws: UserFault.bus) { try space.access(at(0), store: nil) }
        #expect(throws: GetUserPagesError.fault) {
            try space.getUserPageUnlocked(at(0), LookupFlags(), holder: .getUserPages).releaseUnused()
        }
        #expect(try space.load(at(0)) == 1)
    }

    @Test func `without room on the device pages stay`() throws {
        let small = SwapDevice(slots: 2)
        let tight = TestHost(ramFrames: 256, swap: small)
        let space = tight.space()
        defer { space.exit() }
        try space.mapPages(0, 4)
        for page in 0..<4 { try space.store(at(page), UInt64(page)) }
        try space.advise(pages(0..<4), .pageOut)
        #expect((0..<4).count { space.translate(at($0)) != nil } == 2 && small.usedSlots == 2)
        for page in 0..<4 { #expect(try space.load(at(page)) == UInt64(page)) }
    }

    @Test func `a process that needs more than there is gets it page by page from the others`() throws {
        let tight = TestHost(ramFrames: 256, swap: swap)
        let space = tight.space()
        try space.mapPages(0, 400)
        for page in 0..<400 { try space.store(at(page), UInt64(page) ^ 0xabc) }
        for page in 0..<400 { #expect(try space.load(at(page)) == UInt64(page) ^ 0xabc) }
        space.exit()
        #expect(swap.usedSlots == 0)
    }

    @Test func `shared memory goes to the device too, for all who map it`() throws {
        let object = MemoryObject(host: test.host, pages: 4)
        let one = test.space()
        let other = test.space()
        defer {
            one.exit()
            other.exit()
        }
        for space in [one, other] {
            try space.map(at: at(0), length: 4 * pageSize, protection: .readWrite, backing: .object(object))
        }
        for page in 0..<4 { try one.store(at(page), UInt64(page + 9)) }
        while test.host.reclaim(pages: 4) > 0 {}
        #expect(swap.usedSlots == 4 && object.frame(of: 0) == nil)
        for page in 0..<4 { #expect(try other.load(at(page)) == UInt64(page + 9)) }
        #expect(try object.read(page: 3, offset: 0) == 12)
        try one.advise(pages(0..<4), .pageOut)
        object.truncate(to: 1)
        #expect(throws: UserFault.bus) { try one.access(at(2), store: nil) }
    }

    @Test func `a slow device is waited for without the lock; a caller who may not wait is told`() throws {
        let slow = SwapDevice(slots: 16, slow: true)
        let late = TestHost(ramFrames: 256, swap: slow)
        let space = late.space()
        defer { space.exit() }
        try space.mapPages(0, 1)
        try space.store(at(0), 5)
        try space.advise(pages(0..<1), .pageOut)
        #expect(throws: GetUserPagesError.wouldBlock) {
            try space.getUserPageUnlocked(at(0), LookupFlags(noWait: true), holder: .getUserPages).releaseUnused()
        }
        space.mmapLock.lockForRead()
        #expect(space.fixupUserFault(at(0), write: false) == FixupResult(error: nil, unlocked: true))
        space.mmapLock.unlockRead()
        #expect(try space.load(at(0)) == 5)
    }

    @Test func `guards stand in the way of everybody, survive fork and moves, and go with the area`() throws {
        let space = try filled(4)
        defer { space.exit() }
        try space.advise(pages(1..<2), .guardInstall)
        #expect(throws: UserFault.segmentation) { try space.access(at(1), store: nil) }
        #expect(throws: GetUserPagesError.fault) {
            try space.getUserPageUnlocked(at(1), LookupFlags(), holder: .getUserPages).releaseUnused()
        }
        try space.advise(pages(1..<2), .dontNeed)
        let child = try space.fork()
        defer { child.exit() }
        #expect(throws: UserFault.segmentation) { try child.access(at(1), store: 1) }
        try space.remap(pages(0..<4), length: 4 * pageSize, to: at(600))
        #expect(throws: UserFault.segmentation) { try space.access(at(601), store: nil) }
        try space.advise(pages(601..<602), .guardRemove)
        #expect(try space.load(at(601)) == 0 && space.load(at(602)) == 3)
    }
}
