import Frames
import Testing

@testable import HostMemory

@Suite struct GraphicsDevices {
    let test = TestHost(ramFrames: 2048, deviceFrames: 512)

    private func buffers(_ device: GraphicsDevice, _ count: Int, pages: Int = 8) throws -> [GraphicsBuffer] {
        try (0..<count).map { number in
            let buffer = try #require(GraphicsBuffer(device: device, pages: pages, order: 0))
            for page in 0..<pages { try buffer.write(page: page, offset: 8, UInt64(100 * number + page)) }
            return buffer
        }
    }

    private func check(_ buffer: GraphicsBuffer, _ number: Int) throws {
        for page in 0..<buffer.pages { #expect(try buffer.read(page: page, offset: 8) == UInt64(100 * number + page)) }
    }

    @Test func `device memory is full: the least recently used goes to system memory`() throws {
        let device = GraphicsDevice(test.host, deviceMemoryPages: 20)
        let all = try buffers(device, 3)
        defer { for buffer in all { buffer.free() } }
        try all[0].move(to: .deviceMemory)
        try all[1].move(to: .deviceMemory)
        #expect(device.usedDeviceMemory == 16 && device.evictions.fromDeviceMemory == 0)
        // Used again: now the second is the oldest.
        try check(all[0], 0)
        try all[2].move(to: .deviceMemory)
        #expect(all.map(\.place) == [.deviceMemory, .system, .deviceMemory])
        #expect(device.usedDeviceMemory == 16 && device.evictions.fromDeviceMemory == 1)
        for (number, buffer) in all.enumerated() { try check(buffer, number) }
    }

    @Test func `a process's fault counts as use, and an evicted buffer is unmapped first`() throws {
        let device = GraphicsDevice(test.host, deviceMemoryPages: 16)
        let all = try buffers(device, 3)
        let space = test.space()
        defer {
            for buffer in all { buffer.free() }
            space.exit()
        }
        for number in 0..<3 { try space.mapPages(16 * number, 8, .driver(all[number])) }
        try all[0].move(to: .deviceMemory)
        try all[1].move(to: .deviceMemory)
        #expect(try space.load(at(3, 8)) == 3)
        let listener = ListeningNotifier(space)
        space.register(listener)
        #expect(try space.load(at(16, 8)) == 100)
        #expect(try space.load(at(4, 8)) == 4)
        try all[2].move(to: .deviceMemory)
        // The first was found by an entry that stood: no fault, no use that a driver could hear of.
        #expect(all.map(\.place) == [.system, .deviceMemory, .deviceMemory])
        #expect(listener.isBalanced && listener.calls.contains { $0.kind == .end && $0.first == at(0).page })
        #expect(space.walk(at(3)) == nil && space.walk(at(16)) != nil)
        #expect(try space.load(at(7, 8)) == 7)
    }

    @Test func `system memory is full: the least recently used goes to swap, and comes back`() throws {
        let device = GraphicsDevice(test.host, deviceMemoryPages: 0, systemPages: 16)
        let all = try buffers(device, 3)
        defer { for buffer in all { buffer.free() } }
        #expect(all.map(\.place) == [.swappedOut, .system, .system])
        #expect(device.evictions.toSwap == 1)
        for round in 0..<3 {
            for (number, buffer) in all.enumerated() { try check(buffer, number) }
            #expect(all.map(\.place) == [.swappedOut, .system, .system], "round \(round)")
        }
    }

    @Test func `a fault on a swapped-out buffer makes room with no lock held`() throws {
        let device = GraphicsDevice(test.host, deviceMemoryPages: 0, systemPages: 8)
        let all = try buffers(device, 2)
        let space = test.space()
        defer {
            for buffer in all { buffer.free() }
            space.exit()
        }
        try space.mapPages(0, 8, .driver(all[0]))
        try space.mapPages(8, 8, .driver(all[1]))
        for _ in 0..<3 {
            #expect(try space.load(at(5, 8)) == 5)
            #expect(try space.load(at(13, 8)) == 105)
        }
        #expect(all.map(\.place) == [.swappedOut, .system])
        #expect(device.evictions.toSwap == 7)
        // KVM's way: the lock is dropped, so its VMA is stale.
        #expect(space.fixup(at(0), write: true) == FixupResult(error: nil, unlocked: true))
    }

    @Test func `eviction from device memory may need swap too`() throws {
        let device = GraphicsDevice(test.host, deviceMemoryPages: 8, systemPages: 16)
        let all = try buffers(device, 2)
        defer { for buffer in all { buffer.free() } }
        try all[0].move(to: .deviceMemory)
        let third = try #require(GraphicsBuffer(device: device, pages: 8, order: 0))
        defer { third.free() }
        try all[1].move(to: .deviceMemory)
        // Who asks for room is not the one to go.
        #expect([all[0].place, all[1].place, third.place] == [.system, .deviceMemory, .swappedOut])
        #expect(device.evictions == (1, 1))
        try third.move(to: .deviceMemory)
        #expect(third.place == .deviceMemory && device.usedDeviceMemory == 8)
        for (number, buffer) in all.enumerated() { try check(buffer, number) }
    }

    @Test func `what can never fit is ENOMEM, and all stays where it is`() throws {
        let device = GraphicsDevice(test.host, deviceMemoryPages: 8, systemPages: 32)
        let small = try buffers(device, 1)[0]
        let large = try #require(GraphicsBuffer(device: device, pages: 9, order: 0))
        defer {
            small.free()
            large.free()
        }
        try small.move(to: .deviceMemory)
        #expect(throws: Errno.ENOMEM) { try large.move(to: .deviceMemory) }
        #expect(small.place == .deviceMemory && large.place == .system && device.usedDeviceMemory == 8)
        #expect(GraphicsBuffer(device: device, pages: 33, order: 0) == nil)
        try check(small, 0)
    }

    @Test func `without frames the budget is given back`() throws {
        let device = GraphicsDevice(test.host, deviceMemoryPages: 10_000)
        let buffer = try #require(GraphicsBuffer(device: device, pages: 400, order: 0))
        defer { buffer.free() }
        try buffer.move(to: .deviceMemory)
        try buffer.move(to: .system)
        #expect(throws: Errno.ENOMEM) { try buffer.move(to: .deviceMemory) }
        #expect(buffer.place == .system && device.usedDeviceMemory == 0)
    }

    @Test func `freed buffers give everything back`() throws {
        let leaked = try test.leaked {
            let device = GraphicsDevice(test.host, deviceMemoryPages: 8, systemPages: 16)
            let all = try buffers(device, 3)
            try all[1].move(to: .deviceMemory)
            for buffer in all { buffer.free() }
            #expect(device.usedDeviceMemory == 0)
        }
        #expect(leaked == 0)
        #expect(test.journal.findings.isEmpty)
    }

    @Test(arguments: [1, 2, 3, 4, 5, 6, 7, 8])
    func `any order of moves keeps every byte`(seed: UInt64) throws {
        let host = TestHost(ramFrames: 2048, deviceFrames: 8192, keepsEvents: false)
        var random = TestRandom(seed: seed)
        let device = GraphicsDevice(host.host, deviceMemoryPages: 12, systemPages: 20)
        let all = try buffers(device, 6)
        let space = host.space()
        for (number, buffer) in all.enumerated() { try space.mapPages(16 * number, 8, .driver(buffer)) }
        for _ in 0..<300 {
            let number = Int.random(in: 0..<6, using: &random)
            switch Int.random(in: 0..<5, using: &random) {
            case 0: try all[number].move(to: .deviceMemory)
            case 1: try all[number].move(to: .system)
            case 2: try all[number].evict()
            case 3: try check(all[number], number)
            default:
                let page = Int.random(in: 0..<8, using: &random)
                #expect(try space.load(at(16 * number + page, 8)) == UInt64(100 * number + page), "seed \(seed)")
            }
            #expect(device.usedDeviceMemory <= 12)
        }
        for buffer in all { buffer.free() }
        space.exit()
        #expect(host.journal.findings.isEmpty, "seed \(seed)")
    }
}
