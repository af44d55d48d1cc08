import Audit
import Frames
import Synchrony
import Testing

@testable import HostMemory

/// Pages that change their frame, or share it, without their process's doing: migration, compaction, splitting, merging,
/// collapsing.
@Suite struct MovedFrames {
    let test = TestHost(ramFrames: 4096, reclaims: true)

    private func filled(_ count: Int) throws -> AddressSpace {
        let space = test.space()
        try space.mapPages(0, count)
        for page in 0..<count { try space.store(at(page), UInt64(page + 1)) }
        return space
    }

    @Test func `a migrated page has another frame, the same bytes and rights, and its processes still share it`() throws
    {
        let space = try filled(4)
        let child = try space.fork()
        defer {
            child.exit()
            space.exit()
        }
        try space.store(at(3), 33)
        let before = (0..<4).map { space.translate(at($0))?.frame }
        #expect(test.host.migrate(space, pages(0..<4)) == 4)
        for page in 0..<4 {
            #expect(space.translate(at(page))?.frame != before[page])
            #expect(try space.load(at(page)) == (page == 3 ? 33 : UInt64(page + 1)))
        }
        #expect(space.translate(at(0))?.frame == child.translate(at(0))?.frame)
        #expect(space.translate(at(3))?.writable == true && space.translate(at(0))?.writable == false)
        #expect(try child.load(at(3)) == 4)
    }

    @Test func `a pinned page and one that somebody refers to are not moved`() throws {
        let space = try filled(2)
        defer { space.exit() }
        let before = (0..<2).map { space.translate(at($0))?.frame }
        let pin = try space.pinUserPageUnlocked(at(0), LookupFlags(write: true, longTerm: true), holder: .getUserPages)
        let page = try space.getUserPageUnlocked(at(1), LookupFlags(), holder: .getUserPages)
        #expect(test.host.migrate(space, pages(0..<2)) == 0)
        #expect((0..<2).allSatisfy { space.translate(at($0))?.frame == before[$0] })
        pin.unpin(dirty: false)
        page.releaseUnused()
        try space.store(at(0), 8)
        #expect(try space.load(at(0)) == 8 && space.load(at(1)) == 2)
        #expect(test.host.migrate(space, pages(0..<2)) == 2)
    }

    @Test func `an object's page moves for all who map it`() throws {
        let object = MemoryObject(host: test.host, pages: 1)
        let space = test.space()
        defer { space.exit() }
        try space.map(at: at(0), length: pageSize, protection: .readWrite, backing: .object(object))
        try space.store(at(0), 4)
        let before = object.frame(of: 0)
        #expect(test.host.migrate(space, pages(0..<1)) == 1)
        #expect(object.frame(of: 0) != before)
        #expect(try space.load(at(0)) == 4 && object.read(page: 0, offset: 0) == 4)
    }

    @Test func `compaction makes a large block where memory is in pieces`() throws {
        let small = TestHost(ramFrames: 1024, reclaims: true)
        let space = small.space()
        try space.mapPages(0, 900)
        for page in 0..<900 { try space.store(at(page), UInt64(page)) }
        // Every second page goes: half of memory is free, in single pages.
        for page in stride(from: 0, to: 900, by: 2) { try space.unmap(pages(page..<page + 1)) }
        #expect(small.memory.allocatePages(order: 7) == nil)
        #expect(small.host.compact(order: 7))
        let block = try #require(small.memory.allocatePages(order: 7))
        for page in stride(from: 1, to: 900, by: 2) { #expect(try space.load(at(page)) == UInt64(page)) }
        small.memory.put(small.memory.page(block))
        space.exit()
    }

    @Test func `a huge page is split into small ones when reclaim takes it`() throws {
        let swap = SwapDevice(slots: 600)
        let huge = TestHost(ramFrames: 2048, thp: true, swap: swap)
        let space = huge.space()
        let leaked = try huge.leaked {
            try space.map(at: at(0), length: 512 * pageSize, protection: .readWrite, backing: .anonymous)
            for page in 0..<512 { try space.store(at(page), UInt64(page)) }
            #expect(space.translate(at(7))?.level == .page2M)
            while huge.host.reclaim(pages: 512) > 0 || swap.usedSlots < 512 {}
            #expect(space.translate(at(7)) == nil)
            for page in 0..<512 { #expect(try space.load(at(page)) == UInt64(page)) }
            #expect(space.translate(at(7))?.level == .page4K)
            space.exit()
        }
        #expect(leaked == 0)
    }

    @Test func `equal pages become one, which every write copies`() throws {
        let space = test.space()
        let other = test.space()
        for each in [space, other] {
            try each.mapPages(0, 3)
            for page in 0..<3 { try each.store(at(page), page == 2 ? each === space ? 1 : 2 : 7) }
            try each.advise(pages(0..<3), .mergeable)
        }
        let free = test.memory.freeFrames
        #expect(test.host.mergeSamePages() == 3)
        #expect(test.memory.freeFrames == free + 3)
        #expect(space.translate(at(0))?.frame == other.translate(at(1))?.frame)
        #expect(space.translate(at(0))?.writable == false)
        #expect(test.host.mergeSamePages() == 0)
        try space.store(at(0), 8)
        #expect(try space.load(at(1)) == 7 && other.load(at(0)) == 7 && space.load(at(0)) == 8)
        try other.advise(pages(0..<3), .unmergeable)
        #expect(other.translate(at(0))?.frame != other.translate(at(1))?.frame)
        space.exit()
        other.exit()
    }

    @Test func `a page under DMA is not merged`() throws {
        let space = try filled(2)
        defer { space.exit() }
        try space.store(at(0), 5)
        try space.store(at(1), 5)
        try space.advise(pages(0..<2), .mergeable)
        let pin = try space.pinUserPageUnlocked(at(0), LookupFlags(write: true), holder: .getUserPages)
        #expect(test.host.mergeSamePages() == 0)
        pin.unpin(dirty: true)
        #expect(test.host.mergeSamePages() == 1)
    }

    @Test func `small pages become a huge one, unless somebody holds one of them`() throws {
        let space = test.space()
        defer { space.exit() }
        try space.map(at: at(0), length: 512 * pageSize, protection: .readWrite, backing: .anonymous)
        for page in stride(from: 0, to: 512, by: 3) { try space.store(at(page), UInt64(page)) }
        let page = try space.getUserPageUnlocked(at(3), LookupFlags(), holder: .getUserPages)
        #expect(throws: Errno.EAGAIN) { try space.advise(pages(0..<512), .collapse) }
        page.releaseUnused()
        let listener = ListeningNotifier(space)
        space.register(listener)
        try space.advise(pages(0..<512), .collapse)
        #expect(listener.calls.map(\.present) == [171, 512])
        space.unregister(listener)
        #expect(space.translate(at(1))?.level == .page2M)
        for page in 0..<512 { #expect(try space.load(at(page)) == (page % 3 == 0 ? UInt64(page) : 0)) }
        try space.protect(pages(0..<1), .read)
        #expect(try space.load(at(510)) == 510)
    }

    @Test func `khugepaged takes what was advised`() throws {
        let space = test.space()
        defer { space.exit() }
        try space.map(at: at(0), length: 1024 * pageSize, protection: .readWrite, backing: .anonymous)
        try space.store(at(3), 3)
        try space.store(at(600), 6)
        #expect(test.host.collapseHugePages() == 0)
        try space.advise(pages(512..<1024), .hugePage)
        #expect(test.host.collapseHugePages() == 1)
        #expect(space.translate(at(600))?.level == .page2M && space.translate(at(3))?.level == .page4K)
    }

    @Test func `the reaper takes a dying process's memory without sleeping, and what it touches then is a bus error`()
        throws
    {
        let space = try filled(4)
        defer { space.exit() }
        let listener = ListeningNotifier(space)
        space.register(listener)
        #expect(space.reap())
        #expect(listener.calls.map(\.present) == [4, 0])
        #expect(throws: UserFault.bus) { try space.access(at(0), store: nil) }
        #expect(space.signals.fatal)
        space.unregister(listener)
    }
}
