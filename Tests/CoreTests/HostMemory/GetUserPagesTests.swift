import Audit
import Frames
import Synchrony
import Testing

@testable import HostMemory

/// Generic 1.9, row by row.
@Suite struct G1_9_FastOnly {
    let test = TestHost(ramFrames: 2048, deviceFrames: 64)

    @Test func `a present page gives one reference`() throws {
        let space = test.space()
        defer { space.exit() }
        try space.mapPages(0, 1)
        try space.store(at(0), 5)
        let frame = try #require(space.translate(at(0))).frame
        let before = test.state(frame).referenceCount
        guard let page = space.getUserPageFastOnly(at(0), write: true, holder: .getUserPages) else {
            Issue.record("no page")
            return
        }
        #expect(page.frame == frame)
        #expect(test.state(frame).referenceCount == before + 1)
        page.releaseUnused()
        #expect(test.state(frame).referenceCount == before)
        #expect(test.state(frame).flags.isAccessed(by: .getUserPages))
        #expect(!test.state(frame).flags.isDirty(by: .getUserPages))
    }

    @Test func `an absent page, and one without a mapping, give nothing and are not faulted in`() throws {
        let space = test.space()
        defer { space.exit() }
        try space.mapPages(0, 1)
        #expect(!space.gives(at(0), write: false))
        #expect(!space.gives(at(9), write: false))
        #expect(!space.gives(UserAddress.end, write: false))
        #expect(space.translate(at(0)) == nil)
    }

    @Test func `a write needs a writable entry`() throws {
        let space = test.space()
        defer { space.exit() }
        try space.mapPages(0, 1)
        try space.store(at(0), 5)
        try space.protect(pages(0..<1), .read)
        #expect(!space.gives(at(0), write: true))
        #expect(space.gives(at(0), write: false))
    }

    @Test func `the page of zeros is special`() throws {
        let space = test.space()
        defer { space.exit() }
        try space.mapPages(0, 1)
        #expect(try space.load(at(0)) == 0)
        #expect(space.translate(at(0))?.frame == test.host.zeroPage)
        #expect(!space.gives(at(0), write: false))
    }

    @Test func `a NUMA hint is a fault to take`() throws {
        let space = test.space()
        defer { space.exit() }
        try space.mapPages(0, 1)
        try space.store(at(0), 5)
        space.hintNUMA(pages(0..<1))
        #expect(!space.gives(at(0), write: false))
        #expect(try space.load(at(0)) == 5)
        #expect(space.gives(at(0), write: true))
    }

    @Test func `a frame mapped by number is special`() throws {
        let space = test.space()
        defer { space.exit() }
        try space.mapPages(0, 1, .driver(#require(DeviceBAR(test.host, pages: 1, filling: .atMap))))
        #expect(space.translate(at(0)) != nil)
        #expect(!space.gives(at(0), write: false))
    }

    @Test func `consecutive pages stop at the first that can't be had`() throws {
        let space = test.space()
        defer { space.exit() }
        try space.mapPages(0, 8)
        for page in [0, 1, 2, 4] { try space.store(at(page), UInt64(page)) }
        var seen: [Int] = []
        let count = space.getUserPagesFastOnly(at(0), count: 8, write: true, holder: .prefetch) { i, page in
            seen.append(i)
            #expect(page.frame == space.translate(at(i))?.frame)
            page.releaseUnused()
        }
        #expect(count == 3 && seen == [0, 1, 2])
        #expect(
            space.getUserPagesFastOnly(
                UserAddress(UserAddress.end.value - pageSize), count: 2, write: true, holder: .prefetch
            ) { _, page in
                page.releaseUnused()
            } == 0)
        #expect(test.journal.holdings.isEmpty)
    }

    @Test func `it works with mmu_lock held`() throws {
        let space = test.space()
        defer { space.exit() }
        try space.mapPages(0, 1)
        try space.store(at(0), 5)
        let mmuLock = ReadWriteLock(.mmu, spinning: true)
        mmuLock.lockForWrite()
        #expect(space.gives(at(0), write: true))
        mmuLock.unlockWrite()
    }
}

extension AddressSpace {
    /// Whether the lockless walk takes the page, which is put again.
    func gives(_ address: UserAddress, write: Bool) -> Bool {
        guard let page = getUserPageFastOnly(address, write: write, holder: .getUserPages) else { return false }
        page.releaseUnused()
        return true
    }
}

@Suite struct G1_9_Unlocked {
    let test = TestHost(ramFrames: 2048, deviceFrames: 64)
    func failure(
        _ space: AddressSpace, _ page: Int, _ flags: LookupFlags = LookupFlags()
    ) -> GetUserPagesError? {
        var error: GetUserPagesError?
        do {
            try space.getUserPageUnlocked(at(page), flags, holder: .getUserPages).releaseUnused()
        } catch { return error }
        do {
            try space.pinUserPageUnlocked(at(page), flags, holder: .getUserPages).unpin(dirty: false)
        } catch let found { error = found }
        return error
    }

    @Test func `it faults pages in`() throws {
        let space = test.space()
        defer { space.exit() }
        try space.mapPages(0, 2)
        let read = try space.getUserPageUnlocked(at(0), LookupFlags(), holder: .getUserPages)
        #expect(read.frame == test.host.zeroPage)
        read.releaseUnused()
        let write = try space.getUserPageUnlocked(at(1), LookupFlags(write: true), holder: .getUserPages)
        #expect(space.translate(at(1))?.writable == true && space.translate(at(1))?.frame == write.frame)
        write.releaseUnused()
    }

    @Test func `no VMA, PFN maps, and rights that don't fit are -EFAULT`() throws {
        let space = test.space()
        defer { space.exit() }
        try space.mapPages(0, 1, .driver(#require(DeviceBAR(test.host, pages: 1, filling: .atMap))))
        try space.mapPages(1, 1, .driver(#require(CountedPagesByFrame(test.host, pages: 1))))
        try space.mapPages(2, 1, .anonymous, .read)
        try space.mapPages(3, 1, .anonymous, .none)
        for page in [0, 1, 3, 7] { #expect(failure(space, page) == .fault, "page \(page)") }
        #expect(failure(space, 2) == nil)
        #expect(failure(space, 2, LookupFlags(write: true)) == .fault)
    }

    @Test func `beyond the end of an object is -EFAULT`() throws {
        let space = test.space()
        defer { space.exit() }
        try space.mapPages(0, 2, .object(MemoryObject(host: test.host, pages: 1)))
        #expect(failure(space, 0) == nil)
        #expect(failure(space, 1) == .fault)
    }

    @Test func `a special entry in a mixed map is -EEXIST, a counted one is taken`() throws {
        let space = test.space()
        defer { space.exit() }
        let buffer = try #require(MixedBuffer(test.host, pages: 2))
        try space.mapPages(0, 2, .driver(buffer))
        #expect(failure(space, 0) == nil)
        #expect(failure(space, 1) == .exists)
    }

    @Test func `out of memory is -ENOMEM`() throws {
        let space = test.space()
        defer { space.exit() }
        try space.mapPages(0, 4000)
        var error: GetUserPagesError?
        for page in 0..<4000 where error == nil { error = failure(space, page, LookupFlags(write: true)) }
        #expect(error == .noMemory)
    }

    @Test func `no-wait gives up where a page must be read, waiting succeeds`() throws {
        let space = test.space()
        defer { space.exit() }
        let object = MemoryObject(host: test.host, pages: 1, slow: true)
        try space.mapPages(0, 1, .object(object))
        #expect(failure(space, 0, LookupFlags(noWait: true)) == .wouldBlock)
        #expect(object.frame(of: 0) == nil)
        #expect(failure(space, 0) == nil)
        #expect(failure(space, 0, LookupFlags(noWait: true)) == nil)
    }

    @Test func `an ordinary signal counts only after a wait, and only if asked`() throws {
        let space = test.space()
        defer { space.exit() }
        try space.mapPages(0, 1)
        try space.mapPages(1, 2, .object(MemoryObject(host: test.host, pages: 2, slow: true)))
        space.signals.pending = true
        #expect(failure(space, 0, LookupFlags(interruptible: true)) == nil)
        #expect(failure(space, 1, LookupFlags(interruptible: true)) == .interrupted)
        #expect(failure(space, 1) == nil)
        space.signals.pending = false
        #expect(failure(space, 2, LookupFlags(interruptible: true)) == nil)
    }

    @Test func `a fatal signal is -EAGAIN at the first lock`() throws {
        let space = test.space()
        defer { space.exit() }
        try space.mapPages(0, 1)
        space.signals.fatal = true
        #expect(failure(space, 0) == .again)
        space.signals.fatal = false
        #expect(failure(space, 0) == nil)
    }

    @Test func `a fatal signal while waiting is -EINTR`() throws {
        let space = test.space()
        defer { space.exit() }
        let driver = KillingDriver(space)
        try space.mapPages(0, 1, .driver(driver))
        #expect(failure(space, 0) == .interrupted)
        space.signals.fatal = false
    }

    @Test func `poison is told only to who asks`() throws {
        let space = test.space()
        defer { space.exit() }
        try space.mapPages(0, 1)
        try space.mapPages(1, 1, .object(MemoryObject(host: test.host, pages: 1)))
        for page in 0...1 {
            try space.store(at(page), 1)
            test.host.poison(try #require(space.translate(at(page))).frame)
            #expect(failure(space, page) == .fault)
            #expect(failure(space, page, LookupFlags(hardwarePoison: true)) == .hardwarePoison)
            #expect(throws: Errno.EHWPOISON) { try space.load(at(page)) }
            #expect(throws: GetUserPagesError.fault) {
                try space.pinUserPageFast(at(page), write: true, holder: .hostMap).unpin(dirty: false)
            }
        }
        try space.advise(pages(0..<1), .dontNeed)
        #expect(try space.load(at(0)) == 0)
    }

    @Test func `a read looks through a NUMA hint unless it honours it`() throws {
        let space = test.space()
        defer { space.exit() }
        try space.mapPages(0, 1)
        try space.store(at(0), 1)
        space.hintNUMA(pages(0..<1))
        #expect(failure(space, 0) == nil)
        #expect(space.translate(at(0)) == nil)
        #expect(failure(space, 0, LookupFlags(honorNUMA: true)) == nil)
        #expect(space.translate(at(0)) != nil)
    }

    @Test func `the slow way marks the folio accessed, and dirty only if neither entry nor folio is`() throws {
        let space = test.space()
        defer { space.exit() }
        let object = MemoryObject(host: test.host, pages: 2)
        try space.mapPages(0, 2, .object(object))
        #expect(try space.load(at(0)) == 0)
        #expect(failure(space, 0, LookupFlags(write: true)) == nil)
        let clean = test.state(try #require(object.frame(of: 0)))
        #expect(clean.flags.isAccessed(by: .getUserPages) && clean.flags.isDirty(by: .getUserPages))
        try space.store(at(1), 1)
        #expect(failure(space, 1, LookupFlags(write: true)) == nil)
        #expect(!test.state(try #require(object.frame(of: 1))).flags.isDirty(by: .getUserPages))
    }
}

/// A mixed map whose faults always ask for a retry, during which its process is killed.
private final class KillingDriver: DriverMapping, @unchecked Sendable {
    unowned let space: AddressSpace
    init(_ space: AddressSpace) {
        self.space = space
        super.init(name: "killing", flags: .mixed)
    }
    override func fault(
        _ space: AddressSpace, _ vma: VMAInfo, _ address: UserAddress, write: Bool
    ) -> DriverFault { .retry }
    override func waitForRetry() { space.signals.fatal = true }
}

@Suite struct G1_9_Pins {
    let test = TestHost(ramFrames: 2048)

    @Test func `a small folio counts a pin as 1024 references`() throws {
        let space = test.space()
        defer { space.exit() }
        try space.mapPages(0, 1)
        try space.store(at(0), 1)
        let frame = try #require(space.translate(at(0))).frame
        let pin = try space.pinUserPageFast(at(0), write: true, holder: .hostMap)
        #expect(pin.frame == frame)
        #expect(test.state(frame).referenceCount == 1 + 1024)
        #expect(test.state(frame).pinCount == 0)
        pin.unpin(dirty: true)
        #expect(test.state(frame).referenceCount == 1)
        #expect(test.state(frame).flags.isDirty(by: .kvm))
    }

    @Test func `a large folio counts a pin in its pin count and once in its references`() throws {
        let huge = TestHost(ramFrames: 4096, thp: true)
        let space = huge.space()
        defer { space.exit() }
        try space.mapPages(0, 512)
        try space.store(at(3), 1)
        let frame = try #require(space.translate(at(3))).frame
        let pin = try space.pinUserPageFast(at(3), write: true, holder: .hostMap)
        #expect(pin.frame == frame)
        #expect(huge.state(frame).headReferenceCount == 2 && huge.state(frame).pinCount == 1)
        pin.unpin(dirty: false)
        #expect(huge.state(frame).headReferenceCount == 1 && huge.state(frame).pinCount == 0)
    }

    @Test func `a pin of the page of zeros counts nothing`() throws {
        let space = test.space()
        defer { space.exit() }
        try space.mapPages(0, 1)
        let before = test.state(test.host.zeroPage)
        let pin = try space.pinUserPageFast(at(0), write: false, holder: .hostMap)
        #expect(pin.frame == test.host.zeroPage)
        #expect(test.state(test.host.zeroPage) == before)
        pin.unpin(dirty: false)
        #expect(test.state(test.host.zeroPage) == before)
    }

    @Test func `pin_user_pages_fast faults pages in`() throws {
        let space = test.space()
        defer { space.exit() }
        try space.mapPages(0, 1)
        let pin = try space.pinUserPageFast(at(0), write: true, holder: .hostMap)
        #expect(space.translate(at(0))?.frame == pin.frame)
        pin.unpin(dirty: false)
    }

    @Test func `a shared anonymous page is unshared before it is pinned for reading`() throws {
        let space = test.space()
        try space.mapPages(0, 1)
        try space.store(at(0), 77)
        let child = try space.fork()
        defer {
            child.exit()
            space.exit()
        }
        let shared = try #require(space.translate(at(0))).frame
        let pin = try space.pinUserPageUnlocked(at(0), LookupFlags(), holder: .hostMap)
        let own = try #require(space.translate(at(0)))
        #expect(pin.frame == own.frame && own.frame != shared && !own.writable)
        #expect(child.translate(at(0))?.frame == shared)
        try space.store(at(0), 78)
        #expect(space.translate(at(0))?.frame == pin.frame, "a write after the pin keeps the page")
        pin.unpin(dirty: false)
        #expect(try child.load(at(0)) == 77)
    }

    @Test func `a page cache page in a private mapping is pinned as it is, and a later write leaves the pin behind`()
        throws
    {
        let space = test.space()
        defer { space.exit() }
        let object = MemoryObject(host: test.host, pages: 1)
        try space.mapPages(0, 1, .object(object, shared: false))
        let pin = try space.pinUserPageUnlocked(at(0), LookupFlags(), holder: .hostMap)
        #expect(pin.frame == object.frame(of: 0))
        try space.store(at(0), 1)
        #expect(space.translate(at(0))?.frame != pin.frame)
        #expect(object.frame(of: 0) == pin.frame)
        pin.unpin(dirty: false)
        #expect(test.journal.holdings.isEmpty)
    }
}
