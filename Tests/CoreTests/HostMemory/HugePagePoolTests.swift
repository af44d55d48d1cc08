import Audit
import Frames
import GuestMemory
import Machine
import Synchrony
import Testing

@testable import HostMemory

/// Huge pages of a pool. Kernel: hugetlbfs, `MAP_HUGETLB`.
@Suite struct HugePagesOfAPool {
    private static let huge = PageLevel.page2M.bytes
    let test = TestHost(ramFrames: 8192)

    private func low(_ page: Int) -> UserAddress { UserAddress(0x4000_0000) + UInt64(page) * Self.huge }
    private func span(_ pages: Range<Int>) -> Range<UserAddress> { low(pages.lowerBound)..<low(pages.upperBound) }

    private func map(
        _ file: HugePageFile, _ pages: Int, shared: Bool, _ space: AddressSpace
    ) throws(Errno) {
        try space.map(
            at: low(0), length: UInt64(pages) * Self.huge, protection: .readWrite,
            backing: .huge(file, firstPage: 0, shared: shared))
    }

    @Test func `a shared mapping shows the file's pages, as one leaf each, to everybody`() throws {
        let pool = try #require(HugePagePool(test.host, level: .page2M, pages: 4))
        let leaked = try test.leaked {
            let file = HugePageFile(pool, pages: 2)
            let one = test.space()
            let other = test.space()
            for space in [one, other] { try map(file, 2, shared: true, space) }
            try one.store(low(1) + 4096, 7)
            #expect(try other.load(low(1) + 4096) == 7)
            #expect(one.translate(low(1) + 8192)?.level == .page2M && one.mappingLevel(of: low(1)) == .page2M)
            #expect(pool.idle == (free: 3, reserved: 1))
            let page = try one.getUserPageUnlocked(low(1) + 8192, LookupFlags(write: true), holder: .getUserPages)
            #expect(page.frame == one.translate(low(1))?.frame.advanced(by: 2))
            page.releaseUnused()
            one.exit()
            other.exit()
        }
        #expect(leaked == 0 && pool.idle == (free: 4, reserved: 0))
    }

    @Test func `a private mapping copies whole pages, and so does fork`() throws {
        let pool = try #require(HugePagePool(test.host, level: .page2M, pages: 4))
        let file = HugePageFile(pool, pages: 1)
        let space = test.space()
        try map(file, 1, shared: false, space)
        try space.store(low(0), 1)
        let child = try space.fork()
        #expect(child.translate(low(0))?.frame == space.translate(low(0))?.frame)
        let listener = ListeningNotifier(space)
        space.register(listener)
        try space.store(low(0) + 8, 2)
        #expect(listener.calls.map(\.pages) == [512, 512])
        space.unregister(listener)
        #expect(try child.load(low(0)) == 1 && child.load(low(0) + 8) == 0 && space.load(low(0)) == 1)
        child.exit()
        space.exit()
        #expect(pool.idle == (free: 4, reserved: 0))
    }

    @Test func `a page that is pinned stays the parent's, and the child has a copy at once`() throws {
        let pool = try #require(HugePagePool(test.host, level: .page2M, pages: 2))
        let file = HugePageFile(pool, pages: 1)
        let space = test.space()
        try map(file, 1, shared: false, space)
        try space.store(low(0), 1)
        let pin = try space.pinUserPageUnlocked(low(0), LookupFlags(write: true), holder: .getUserPages)
        let child = try space.fork()
        #expect(child.translate(low(0))?.frame != space.translate(low(0))?.frame)
        #expect(space.translate(low(0))?.writable == true)
        #expect(try child.load(low(0)) == 1)
        #expect(throws: Errno.ENOMEM) { try space.fork().exit() }
        pin.unpin(dirty: true)
        child.exit()
        space.exit()
        #expect(pool.idle == (free: 2, reserved: 0))
    }

    @Test func `what is mapped is promised; what is not may end in a bus error`() throws {
        let pool = try #require(HugePagePool(test.host, level: .page2M, pages: 2))
        let file = HugePageFile(pool, pages: 4)
        let space = test.space()
        #expect(throws: Errno.ENOMEM) { try map(file, 3, shared: true, space) }
        #expect(throws: Errno.ENOMEM) { try map(file, 3, shared: false, space) }
        try map(file, 2, shared: false, space)
        #expect(pool.idle == (free: 2, reserved: 2))
        try space.store(low(0), 1)
        try space.store(low(1), 2)
        let child = try space.fork()
        #expect(throws: UserFault.bus) { try child.access(low(0), store: 3) }
        child.exit()
        try space.unmap(span(0..<1))
        try space.store(low(1), 3)
        space.exit()
        #expect(pool.idle == (free: 2, reserved: 0))
    }

    @Test func `calls take whole pages only`() throws {
        let pool = try #require(HugePagePool(test.host, level: .page2M, pages: 2))
        let space = test.space()
        defer { space.exit() }
        let file = HugePageFile(pool, pages: 2)
        #expect(throws: Errno.EINVAL) {
            try space.map(at: at(1), length: Self.huge, protection: .read, backing: .huge(file))
        }
        try map(file, 2, shared: true, space)
        try space.store(low(0), 4)
        let part = low(0)..<low(0) + 4096
        #expect(throws: Errno.EINVAL) { try space.unmap(part) }
        #expect(throws: Errno.EINVAL) { try space.protect(part, .read) }
        for advice in [Advice.cold, .pageOut, .free, .guardInstall, .guardRemove, .hugePage, .collapse] {
            #expect(throws: Errno.EINVAL) { try space.advise(part, advice) }
        }
        // Where nothing changes nothing is split.
        for advice in [Advice.mergeable, .unmergeable, .populateRead, .populateWrite] { try space.advise(part, advice) }
        try space.protect(part, .readWrite)
        try space.protect(span(0..<1), .read)
        #expect(throws: UserFault.segmentation) { try space.access(low(0), store: 1) }
        try space.advise(span(0..<2), .dontNeed)
        #expect(try space.load(low(0)) == 4)
        file.punchHole(0..<1)
        #expect(try space.load(low(0)) == 0)
    }

    @Test func `MADV_DONTNEED begins at a page and takes those that lie in it as a whole`() throws {
        let pool = try #require(HugePagePool(test.host, level: .page2M, pages: 2))
        let space = test.space()
        defer { space.exit() }
        try map(HugePageFile(pool, pages: 2), 2, shared: false, space)
        for page in 0..<2 { try space.store(low(page), 4) }
        try space.advise(low(0)..<low(0) + 4096, .dontNeed)
        #expect(try space.load(low(0)) == 4)
        #expect(throws: Errno.EINVAL) { try space.advise(low(0) + 4096..<low(1) + 4096, .dontNeed) }
        try space.advise(low(0)..<low(1) + 4096, .dontNeed)
        #expect(try space.load(low(0)) == 0 && space.load(low(1)) == 4)
        #expect(throws: Errno.EACCES) { try space.advise(span(0..<1), .remove) }
    }

    @Test func `MADV_REMOVE clears what it has of a page, and takes whole pages out`() throws {
        let pool = try #require(HugePagePool(test.host, level: .page2M, pages: 3))
        let space = test.space()
        let file = HugePageFile(pool, pages: 3)
        try map(file, 3, shared: true, space)
        for page in 0..<3 {
            try space.store(low(page), 5)
            try space.store(low(page) + (Self.huge - 4096), 6)
        }
        try space.advise(low(0) + 4096..<low(2) + 4096, .remove)
        #expect(try space.load(low(0)) == 5 && space.load(low(0) + (Self.huge - 4096)) == 0)
        #expect(space.translate(low(1)) == nil && pool.idle.free == 1)
        #expect(try space.load(low(2)) == 0 && space.load(low(2) + (Self.huge - 4096)) == 6)
        space.exit()
    }

    @Test func `mremap moves and cuts whole pages, and lets none grow`() throws {
        let pool = try #require(HugePagePool(test.host, level: .page2M, pages: 4))
        let space = test.space()
        let file = HugePageFile(pool, pages: 4)
        try map(file, 4, shared: false, space)
        for page in 0..<4 { try space.store(low(page), UInt64(page)) }
        let frames = (0..<4).map { space.translate(low($0))?.frame }
        #expect(throws: Errno.EINVAL) { try space.remap(span(2..<4), length: 3 * Self.huge) }
        #expect(throws: Errno.EINVAL) { try space.remap(span(0..<1), length: Self.huge, to: low(8) + 4096) }
        #expect(throws: Errno.EINVAL) { try space.remap(low(0) + 4096..<low(1), length: 4096) }
        // The last page counts as a whole.
        try space.remap(low(0)..<low(0) + 4096, length: 8192)
        try space.remap(span(0..<4), length: 2 * Self.huge + 4096)
        #expect(space.translate(low(3)) == nil && pool.idle.free == 1)
        let listener = ListeningNotifier(space)
        space.register(listener)
        try space.remap(span(1..<3), length: 2 * Self.huge, to: low(8))
        #expect(listener.calls.map(\.pages) == [1024, 1024, 1024, 1024], "the move, and the end of the old place")
        space.unregister(listener)
        #expect(space.translate(low(1)) == nil && space.translate(low(8))?.frame == frames[1])
        #expect(try space.translate(low(9))?.frame == frames[2] && space.load(low(9)) == 2 && space.load(low(0)) == 0)
        space.exit()
        #expect(pool.idle == (free: 4, reserved: 0))
    }

    @Test func `what was promised to a mapping moves with it`() throws {
        let pool = try #require(HugePagePool(test.host, level: .page2M, pages: 1))
        let space = test.space()
        let file = HugePageFile(pool, pages: 1)
        try map(file, 1, shared: false, space)
        try space.remap(span(0..<1), length: Self.huge, to: low(8))
        #expect(pool.idle == (free: 1, reserved: 1))
        try space.store(low(8), 1)
        space.exit()
        #expect(pool.idle == (free: 1, reserved: 0))
    }

    @Test func `broken memory takes the whole page`() throws {
        let pool = try #require(HugePagePool(test.host, level: .page2M, pages: 2))
        let space = test.space()
        let file = HugePageFile(pool, pages: 1)
        try map(file, 1, shared: false, space)
        try space.store(low(0) + 8192, 1)
        let frame = try #require(space.translate(low(0) + 8192)?.frame)
        #expect(test.host.poison(frame))
        #expect(throws: UserFault.poisoned) { try space.access(low(0), store: nil) }
        space.exit()
        #expect(pool.idle.free == 1)
    }

    /// On memory that is committed only where it is used.
    @Test func `a gigabyte is one leaf`() throws {
        let size = 2 << 30
        guard let arena = MappedArena(size: size), let frames = MappedArena(size: size / 64) else {
            Issue.record("no room for an arena that is not committed")
            return
        }
        let memory = PhysicalMemory(
            arena: arena.base, ramFrames: size >> 12, arenaIsZero: true, pageFrameStorage: frames.base)
        let host = Host(memory: memory, transparentHugePages: false)
        let pool = try #require(HugePagePool(host, level: .page1G, pages: 1))
        #expect(HugePagePool(host, level: .page1G, pages: 1) == nil)
        let space = AddressSpace(host: host)
        let file = HugePageFile(pool, pages: 1)
        let start = UserAddress(PageLevel.page1G.bytes * 3)
        try space.map(at: start, length: PageLevel.page1G.bytes, protection: .readWrite, backing: .huge(file))
        let deep = start + 0x3000_1000
        try space.store(deep, 5)
        let found = try #require(space.translate(deep))
        #expect(found.level == .page1G && found.frame.number & (PageLevel.page1G.frames - 1) == 0x30001)
        let page = try space.getUserPageUnlocked(deep, LookupFlags(write: true), holder: .getUserPages)
        #expect(page.frame == found.frame)
        page.releaseUnused()
        #expect(pool.idle == (free: 0, reserved: 0))
        #expect(throws: Errno.EINVAL) { try space.unmap(start..<start + Self.huge) }
        try space.protect(start..<start + PageLevel.page1G.bytes, .read)
        #expect(throws: UserFault.segmentation) { try space.access(deep, store: 1) }
        #expect(try space.load(deep) == 5)
        try space.unmap(start..<start + PageLevel.page1G.bytes)
        file.punchHole(0..<1)
        #expect(pool.idle == (free: 1, reserved: 0))
        space.exit()
        withExtendedLifetime((arena, frames)) {}
    }
}
