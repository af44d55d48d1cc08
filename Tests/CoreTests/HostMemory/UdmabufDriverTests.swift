import Audit
import Frames
import Testing

@testable import HostMemory

@Suite struct Udmabufs {
    let test = TestHost(ramFrames: 1024)

    private func sealed(_ pages: Int) -> MemoryObject {
        let object = MemoryObject(host: test.host, pages: pages)
        object.seal(.shrink)
        return object
    }

    @Test func `creating one wants the seal, and pages that are there`() throws {
        let object = MemoryObject(host: test.host, pages: 4)
        #expect(throws: Errno.EINVAL) { try Udmabuf(object, pages: 0..<4) }
        object.seal(.shrink)
        for range in [0..<0, 0..<5, 4..<5, -1..<2] {
            #expect(throws: Errno.EINVAL) { try Udmabuf(object, pages: range) }
        }
        #expect(try Udmabuf(object, pages: 1..<4).frames.count == 3)
    }

    @Test func `the seal forbids shrinking alone`() throws {
        let object = sealed(4)
        #expect(throws: Errno.EPERM) { try object.setSize(Int(pageSize)) }
        #expect(throws: Errno.EPERM) { try object.setSize(4 * Int(pageSize) - 1) }
        try object.setSize(4 * Int(pageSize))
        try object.setSize(6 * Int(pageSize))
        #expect(object.pages == 6)
        object.seal(.grow)
        #expect(object.sealed == [.shrink, .grow])
        #expect(throws: Errno.EPERM) { try object.setSize(7 * Int(pageSize)) }
        #expect(throws: Errno.EINVAL) { try object.setSize(-1) }
        let free = MemoryObject(host: test.host, pages: 4)
        try free.setSize(100)
        #expect(free.sizeInBytes == 100)
    }

    @Test func `it maps the memfd's own pages, by number and without counting`() throws {
        let space = test.space()
        defer { space.exit() }
        let object = sealed(4)
        try object.write(page: 2, offset: 8, 5)
        let buffer = try Udmabuf(object, pages: 1..<4)
        #expect(buffer.frames[1] == object.frame(of: 2))
        let before = buffer.frames.map(test.state)
        #expect(before.allSatisfy { $0.referenceCount == 1 + 1024 })
        try space.mapPages(0, 3, .driver(buffer))
        #expect(try space.load(at(1, 8)) == 5)
        try space.store(at(2), 6)
        #expect(try object.read(page: 3, offset: 0) == 6)
        #expect(space.walk(at(2)) != nil)
        #expect(throws: GetUserPagesError.fault) {
            try space.getUserPageUnlocked(at(2), LookupFlags(write: true), holder: .getUserPages).releaseUnused()
        }
        #expect(buffer.frames.map(test.state).map(\.referenceCount) == before.map(\.referenceCount))
    }

    @Test func `only shared mappings of what it has`() throws {
        let space = test.space()
        defer { space.exit() }
        let buffer = try Udmabuf(sealed(4), pages: 0..<4)
        #expect(throws: Errno.EINVAL) { try space.mapPages(0, 4, .driver(buffer, shared: false)) }
        #expect(throws: Errno.EINVAL) { try space.mapPages(0, 5, .driver(buffer)) }
        #expect(throws: Errno.EINVAL) { try space.mapPages(0, 4, .driver(buffer, firstPage: 1)) }
        try space.mapPages(0, 3, .driver(buffer, firstPage: 1))
    }

    @Test func `a hole in the memfd leaves it its pages`() throws {
        let space = test.space()
        let leaked = try test.leaked {
            let object = sealed(2)
            try object.write(page: 0, offset: 0, 1)
            let buffer = try Udmabuf(object, pages: 0..<2)
            try space.mapPages(0, 2, .driver(buffer))
            try space.mapPages(4, 2, .object(object))
            #expect(try space.load(at(0)) == 1 && space.load(at(4)) == 1)
            object.punchHole(0..<1)
            #expect(try space.load(at(0)) == 1 && space.load(at(4)) == 0)
            #expect(test.state(buffer.frames[0]).referenceCount == 1024)
            space.exit()
        }
        #expect(leaked == 0)
        #expect(test.journal.findings.isEmpty)
    }

    @Test func `freed, it is unmapped, then unpinned`() throws {
        let space = test.space()
        defer { space.exit() }
        let object = sealed(2)
        let buffer = try Udmabuf(object, pages: 0..<2)
        let listener = ListeningNotifier(space)
        space.register(listener)
        try space.mapPages(0, 2, .driver(buffer))
        try space.store(at(1), 3)
        buffer.free()
        buffer.free()
        #expect(listener.calls.map(\.present) == [1, 0])
        #expect(test.state(buffer.frames[1]).referenceCount == 1)
        #expect(throws: Errno.EFAULT) { try space.load(at(1)) }
        #expect(test.journal.findings.isEmpty)
    }

    @Test func `without memory nothing stays pinned`() throws {
        let object = MemoryObject(host: test.host, pages: 2000)
        object.seal(.shrink)
        #expect(throws: Errno.ENOMEM) { try Udmabuf(object, pages: 0..<2000) }
        object.truncate(to: 0)
        #expect(try Udmabuf(sealed(8), pages: 0..<8).frames.count == 8)
    }
}
