import Frames
import Testing

@testable import HostMemory

@Suite struct BlobWindows {
    let test = TestHost(ramFrames: 2048, deviceFrames: 256)

    private func window(_ space: AddressSpace) throws -> BlobWindow {
        try BlobWindow(in: space, at: at(0), size: 64 * pageSize)
    }
    private func buffer(_ pages: Int = 8) throws -> GraphicsBuffer {
        try #require(GraphicsBuffer(test.host, pages: pages, order: 2))
    }

    @Test func `a resource shows at its offset, and nothing beside it`() throws {
        let space = test.space()
        defer { space.exit() }
        let (window, buffer) = (try window(space), try buffer())
        let shared = MemoryObject(host: test.host, pages: 4)
        try window.map(.buffer(buffer), at: 16 * pageSize)
        try window.map(.shared(shared), at: 24 * pageSize)
        try space.store(at(18, 8), 5)
        try space.store(at(25, 8), 6)
        #expect(try buffer.read(page: 2, offset: 8) == 5)
        #expect(try shared.read(page: 1, offset: 8) == 6)
        for page in [0, 15, 28, 63] { #expect(throws: Errno.EFAULT) { try space.load(at(page)) } }
    }

    @Test func `each refusal has its error, and changes nothing`() throws {
        let space = test.space()
        defer { space.exit() }
        let (window, first, second) = (try window(space), try buffer(), try buffer())
        try window.map(.buffer(first), at: 8 * pageSize)
        try space.store(at(8), 1)
        let refused: [(UInt64, Errno)] = [
            (1, .EINVAL), (pageSize / 2, .EINVAL), (57 * pageSize, .EINVAL), (64 * pageSize, .EINVAL),
            (UInt64.max & ~(pageSize - 1), .EINVAL), (pageSize, .EBUSY), (8 * pageSize, .EBUSY),
            (15 * pageSize, .EBUSY),
        ]
        for (offset, error) in refused { #expect(throws: error) { try window.map(.buffer(second), at: offset) } }
        #expect(throws: Errno.EBUSY) { try window.map(.buffer(first), at: 32 * pageSize) }
        #expect(throws: Errno.EINVAL) {
            try window.map(.shared(MemoryObject(host: test.host, pages: 0)), at: 32 * pageSize)
        }
        #expect(throws: Errno.ENOENT) { try window.unmap(at: 9 * pageSize) }
        #expect(throws: Errno.ENOENT) { try window.unmap(at: 0) }
        #expect(window.offsets == [8 * pageSize..<16 * pageSize])
        #expect(try space.load(at(8)) == 1)
        try window.map(.buffer(second), at: 0)
        try window.map(.shared(MemoryObject(host: test.host, pages: 8)), at: 56 * pageSize)
    }

    @Test func `map and unmap are one invalidation each, and end what was seen`() throws {
        let space = test.space()
        defer { space.exit() }
        let (window, buffer) = (try window(space), try buffer())
        let listener = ListeningNotifier(space)
        space.register(listener)
        try window.map(.buffer(buffer), at: 0)
        for page in 0..<8 { try space.store(at(page), 1) }
        try window.unmap(at: 0)
        #expect(listener.starts == 2 && listener.isBalanced)
        #expect(listener.calls.map(\.present) == [0, 0, 8, 0])
        #expect(throws: Errno.EFAULT) { try space.load(at(0)) }
        #expect(!buffer.isMapped)
        try window.map(.buffer(buffer), at: 32 * pageSize)
        #expect(try space.load(at(39)) == 1)
    }

    @Test func `a mapped resource moves, is swapped out, and is freed`() throws {
        let space = test.space()
        defer { space.exit() }
        let (window, buffer) = (try window(space), try buffer())
        try window.map(.buffer(buffer), at: pageSize)
        for page in 0..<8 { try space.store(at(1 + page), UInt64(page)) }
        for turn in 0..<3 {
            if turn == 0 { try buffer.move(to: .deviceMemory) } else { try buffer.evict() }
            #expect(buffer.place == [.deviceMemory, .system, .swappedOut][turn])
            for page in 0..<8 { #expect(space.walk(at(1 + page)) == nil) }
            for page in 0..<8 { #expect(try space.load(at(1 + page)) == UInt64(page)) }
        }
        buffer.free()
        #expect(throws: Errno.EFAULT) { try space.load(at(1)) }
        try window.unmap(at: pageSize)
        try window.map(.buffer(try self.buffer()), at: pageSize)
        #expect(try space.load(at(1)) == 0)
    }
}
