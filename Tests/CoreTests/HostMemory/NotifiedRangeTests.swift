import Frames
import HostMemory
import Testing

/// Keeps the ranges that it hears of.
private final class RangeListener: MMUNotifier, @unchecked Sendable {
    // Unchecked: tests call from one task at a time.
    var started: [Range<UserAddress>] = []
    var ended: [Range<UserAddress>] = []
    override func invalidateRangeStart(_ range: Range<UserAddress>, blockable: Bool) { started.append(range) }
    override func invalidateRangeEnd(_ range: Range<UserAddress>, blockable: Bool) { ended.append(range) }
}

/// Which ranges notifiers hear of: each as recorded on Linux 6.18 by `kvm_unmap_hva_range`, with `conform --trace`.
@Suite struct NotifiedRanges {
    private let test = TestHost()

    /// The ranges that `change` tells a space's notifiers, as first test page and count.
    private func told(_ space: AddressSpace, _ change: () throws -> Void) rethrows -> [[UInt64]] {
        let listener = RangeListener()
        space.register(listener)
        defer { space.unregister(listener) }
        try change()
        #expect(listener.started == listener.ended)
        return listener.started.map { [$0.lowerBound.page - at(0).page, $0.upperBound.page - $0.lowerBound.page] }
    }

    @Test func `munmap tells the range that was asked for, holes and all`() throws {
        let space = test.space()
        defer { space.exit() }
        try space.mapPages(0, 8)
        try space.unmap(pages(0..<2))
        #expect(try told(space) { try space.unmap(pages(1..<4)) } == [[1, 3]])
        #expect(try told(space) { try space.unmap(pages(1..<4)) } == [])
    }

    @Test func `mprotect tells only of what has a table`() throws {
        let space = test.space()
        defer { space.exit() }
        try space.mapPages(0, 4)
        #expect(try told(space) { try space.protect(pages(0..<4), .read) } == [])
        try space.protect(pages(0..<4), .readWrite)
        try space.store(at(3), 1)
        #expect(try told(space) { try space.protect(pages(0..<2), .read) } == [[0, 2]])
    }

    @Test func `mprotect begins at the first GiB that has a table, and again in each 512 GiB`() throws {
        let space = test.space()
        defer { space.exit() }
        let perGiB = 1 << 18
        // The test pages begin at a multiple of 512 GiB.
        try space.map(
            at: at(0), length: UInt64(600 * perGiB) * 4096, protection: .read, backing: .anonymous)
        #expect(try space.load(at(2 * perGiB + 5)) == 0)
        #expect(try space.load(at(512 * perGiB)) == 0)
        let all = try told(space) { try space.protect(pages(0..<600 * perGiB), .none) }
        #expect(
            all == [
                [UInt64(2 * perGiB), UInt64(510 * perGiB)], [UInt64(512 * perGiB), UInt64(88 * perGiB)],
            ])
    }

    @Test func `a fork tells of private areas in which something may be`() throws {
        let space = test.space()
        defer { space.exit() }
        try space.mapPages(0, 2)
        try space.mapPages(4, 2)
        try space.mapPages(8, 2, .anonymousShared)
        try space.store(at(4), 1)
        try space.store(at(8), 1)
        var child: AddressSpace?
        #expect(try told(space) { child = try space.fork() } == [[4, 2]])
        child?.exit()
    }

    @Test func `guards are placed without a word where nothing is`() throws {
        let space = test.space()
        defer { space.exit() }
        try space.mapPages(0, 4)
        #expect(try told(space) { try space.advise(pages(0..<2), .guardInstall) } == [])
        try space.store(at(3), 1)
        #expect(try told(space) { try space.advise(pages(0..<4), .guardInstall) } == [[0, 4]])
        #expect(throws: Errno.EFAULT) { try space.load(at(3)) }
    }

    @Test func `a memfd that becomes shorter tells twice of all beyond, if a page was there`() throws {
        let space = test.space()
        defer { space.exit() }
        let object = MemoryObject(host: test.host, pages: 4)
        try space.mapPages(0, 6, .object(object))
        #expect(told(space) { object.truncate(toBytes: 5000) } == [[2, 4], [2, 4]])
        // No page less.
        #expect(told(space) { object.truncate(toBytes: 4500) } == [])
        #expect(told(space) { object.truncate(toBytes: 4500) } == [])
        #expect(told(space) { object.truncate(to: 3) } == [])
    }

    @Test func `a file tells twice whenever it does not grow`() throws {
        let space = test.space()
        defer { space.exit() }
        let file = MemoryObject(host: test.host, file: Disk(pages: 4), bytes: 16384)
        try space.mapPages(0, 6, .object(file))
        #expect(told(space) { file.truncate(toBytes: 5000) } == [[2, 4], [2, 4]])
        #expect(told(space) { file.truncate(toBytes: 4500) } == [[2, 4], [2, 4]])
        #expect(told(space) { file.truncate(toBytes: 4500) } == [[2, 4], [2, 4]])
        #expect(told(space) { file.truncate(toBytes: 4600) } == [])
    }

    @Test func `a hole of a memfd reaches beyond its end, of a file it does not`() throws {
        let space = test.space()
        defer { space.exit() }
        let object = MemoryObject(host: test.host, pages: 2)
        let file = MemoryObject(host: test.host, file: Disk(pages: 2), bytes: 8192)
        try space.mapPages(0, 6, .object(object))
        try space.mapPages(8, 6, .object(file))
        #expect(told(space) { object.punchHole(1..<5) } == [[1, 4]])
        #expect(told(space) { file.punchHole(1..<5) } == [[9, 1]])
    }

    @Test func `MADV_REMOVE beyond what a file may be is EFBIG`() throws {
        let space = test.space()
        defer { space.exit() }
        let file = MemoryObject(host: test.host, file: Disk(pages: 2, largestFile: 4 << 12), bytes: 8192)
        try space.mapPages(0, 6, .object(file))
        #expect(throws: Errno.EFBIG) { try space.advise(pages(0..<5), .remove) }
        try space.advise(pages(0..<4), .remove)
        // A memfd knows no such end.
        try space.mapPages(8, 6, .object(MemoryObject(host: test.host, pages: 2)))
        try space.advise(pages(8..<14), .remove)
    }
}
