import Audit
import Frames
import Synchrony
import Testing

@testable import HostMemory

/// mremap, faults that map neighbours, VMAs that become one. What the calls answer is compared with the running kernel in
/// `HostConformance_RandomCalls`; here is what only the model shows: frames, counts, notifiers.
@Suite struct MovedMemory {
    let test = TestHost(ramFrames: 2048, deviceFrames: 0)

    @Test(arguments: [false, true])
    func `a cut inside of a 2 MiB block is told for the whole block, if there is a table`(touched: Bool) throws {
        let space = test.space()
        defer { space.exit() }
        try space.mapPages(0, 1024)
        if touched { try space.store(at(0), 1) }
        let listener = ListeningNotifier(space)
        space.register(listener)
        defer { space.unregister(listener) }
        try space.unmap(pages(256..<512))
        let starts = listener.calls.filter { $0.kind == .start }
        let cut = [ListeningNotifier.Call(kind: .start, first: at(0).page, pages: 512, present: 1)]
        let gone = [ListeningNotifier.Call(kind: .start, first: at(256).page, pages: 256, present: 0)]
        #expect(starts == (touched ? cut : []) + gone)
    }

    @Test func `entries move with their pages, between a start and an end; then the old place is unmapped`() throws {
        let space = test.space()
        defer { space.exit() }
        try space.mapPages(0, 4)
        for page in 0..<4 { try space.store(at(page), UInt64(page + 1)) }
        let frames = (0..<4).map { space.translate(at($0))?.frame }
        let listener = ListeningNotifier(space)
        space.register(listener)
        try space.remap(pages(1..<3), length: 2 * pageSize, to: at(600))
        #expect(
            listener.calls == [
                .init(kind: .start, first: at(1).page, pages: 2, present: 2),
                .init(kind: .end, first: at(1).page, pages: 2, present: 0),
                .init(kind: .start, first: at(1).page, pages: 2, present: 0),
                .init(kind: .end, first: at(1).page, pages: 2, present: 0),
            ])
        #expect(space.translate(at(600))?.frame == frames[1] && space.translate(at(601))?.frame == frames[2])
        #expect(try space.load(at(600)) == 2)
        #expect(throws: Errno.EFAULT) { try space.load(at(1)) }
        let frame = try #require(frames[1])
        let state = try #require(test.memory.inspect(frame))
        #expect(state.referenceCount == 1 && state.mapCount == 1)
    }

    @Test func `a move replaces what is at its target, and its pages are freed`() throws {
        let space = test.space()
        defer { space.exit() }
        try space.mapPages(0, 2)
        try space.mapPages(10, 2)
        for page in [0, 1, 10, 11] { try space.store(at(page), UInt64(page)) }
        let free = test.memory.freeFrames
        try space.remap(pages(0..<2), length: 2 * pageSize, to: at(10))
        #expect(test.memory.freeFrames == free + 2)
        #expect(try space.load(at(11)) == 1)
    }

    @Test func `without memory for tables everything stays where it was`() throws {
        let small = TestHost(ramFrames: 64, deviceFrames: 0)
        let space = small.space()
        defer { space.exit() }
        try space.mapPages(0, 2)
        for page in 0..<2 { try space.store(at(page), UInt64(page + 1)) }
        var taken: [HostFrame] = []
        while let frame = small.memory.allocatePages(order: 0) { taken.append(frame) }
        // The target is in another gigabyte: it needs tables of its own.
        #expect(throws: Errno.ENOMEM) {
            try space.remap(pages(0..<2), length: 2 * pageSize, to: at(0) + PageLevel.page1G.bytes)
        }
        for page in 0..<2 { #expect(try space.load(at(page)) == UInt64(page + 1)) }
        for frame in taken { small.memory.put(small.memory.page(frame)) }
    }

    @Test func `a huge page that is moved in part is split, and its bytes stay`() throws {
        let test = TestHost(ramFrames: 4096, deviceFrames: 0, thp: true)
        let space = test.space()
        defer { space.exit() }
        try space.mapPages(0, 512)
        try space.store(at(3), 7)
        #expect(space.translate(at(0))?.level == .page2M)
        try space.remap(pages(2..<4), length: 2 * pageSize, to: at(2048))
        #expect(try space.load(at(2049)) == 7)
        #expect(space.translate(at(0))?.level == .page4K)
    }

    @Test func `a read maps the neighbours that are there, and counts each`() throws {
        let space = test.space()
        defer { space.exit() }
        let object = MemoryObject(host: test.host, pages: 40)
        for page in [14, 15, 16, 17, 31, 32] { try object.write(page: page, offset: 0, UInt64(page)) }
        try space.mapPages(0, 40, .object(object))
        #expect(try space.load(at(17)) == 17)
        #expect((0..<40).filter { space.translate(at($0)) != nil } == [16, 17, 31])
        for page in [16, 17, 31] {
            let state = try #require(object.frame(of: page).flatMap { test.memory.inspect($0) })
            #expect(state.mapCount == 1 && state.referenceCount == 2)
        }
        #expect(space.pageMapEntry(at(16)).isExclusive && space.pageMapEntry(at(16)).isFile)
    }

    @Test func `a slow object's pages are never mapped before they were read`() throws {
        let space = test.space()
        defer { space.exit() }
        let object = MemoryObject(host: test.host, pages: 8, slow: true)
        try space.mapPages(0, 8, .object(object))
        _ = try space.load(at(3))
        #expect((0..<8).filter { space.translate(at($0)) != nil } == [3])
    }

    @Test func `what lies beyond the end of an object in its last page is zero, and lost when it shrinks`() throws {
        let space = test.space()
        defer { space.exit() }
        let object = MemoryObject(host: test.host, pages: 2)
        try space.mapPages(0, 2, .object(object))
        try space.store(at(1, 8), 1)
        try space.store(at(1, 16), 2)
        object.truncate(toBytes: Int(pageSize) + 16)
        #expect(try space.load(at(1, 8)) == 1)
        #expect(try space.load(at(1, 16)) == 0)
        object.truncate(toBytes: Int(pageSize))
        #expect(throws: UserFault.bus) { try space.access(at(1), store: nil) }
        #expect(throws: UserFault.segmentation) { try space.access(at(5), store: nil) }
    }
}
