import Frames
import Machine
import Testing

@testable import HostMemory

/// Memory that nobody has used costs nothing: its page frames are zero bytes that were never written, and it stands in no
/// free list. Whoever asks for frames must not see a difference.
@Suite struct SparseMemory {
    /// Memory on storage that this test can look into.
    final class Fixture {
        let arena: MappedArena
        let pageFrames: MappedArena
        let memory: PhysicalMemory
        let frames: Int

        init(_ frames: Int, arenaIsZero: Bool = true) throws {
            arena = try #require(MappedArena(size: frames * Int(pageSize)))
            pageFrames = try #require(MappedArena(size: frames * 64))
            memory = PhysicalMemory(
                arena: arena.base, ramFrames: frames, arenaIsZero: arenaIsZero, pageFrameStorage: pageFrames.base)
            self.frames = frames
        }

        /// To be called last: the arena must outlive the memory's last use.
        func keep() { withExtendedLifetime(self) {} }
    }

    /// The oracle: which frames are taken. A block can be had if and only if one of its size and alignment is free.
    struct Oracle {
        var taken: [Bool]
        init(_ frames: Int) {
            taken = Array(repeating: false, count: frames)
            taken[0] = true
        }
        func isFree(_ first: Int, _ order: Int) -> Bool {
            first + 1 << order <= taken.count && !taken[first..<first + 1 << order].contains(true)
        }
        func canHave(_ order: Int) -> Bool {
            stride(from: 0, to: taken.count, by: 1 << order).contains { isFree($0, order) }
        }
        mutating func set(_ first: Int, _ order: Int, _ value: Bool) {
            for i in first..<first + 1 << order { taken[i] = value }
        }
        var free: Int { taken.count { !$0 } }
    }

    @Test(arguments: [16, 17, 1023, 1025, 2048, 3500, 4096 + 13], [1 as UInt64, 0xbeef, 0x5eed_5eed])
    func `a block can be had if and only if one is free`(frames: Int, seed: UInt64) throws {
        let fixture = try Fixture(frames)
        defer { fixture.keep() }
        let memory = fixture.memory
        var random = TestRandom(seed: seed)
        var oracle = Oracle(frames)
        var blocks: [(frame: HostFrame, order: Int)] = []
        for step in 0..<400 {
            // Stretches in which more is taken, then more is given back.
            let wants = Int.random(in: 0..<10, using: &random) < (step / 100 % 2 == 0 ? 7 : 3)
            if wants || blocks.isEmpty {
                let order = Int.random(in: 0...PhysicalMemory.largestOrder, using: &random)
                let block = memory.allocatePages(order: order)
                #expect((block != nil) == oracle.canHave(order), "seed \(seed), step \(step), order \(order)")
                guard let block else { continue }
                #expect(oracle.isFree(Int(block.number), order), "seed \(seed), step \(step): taken already")
                #expect(block.number % (1 << UInt64(order)) == 0, "seed \(seed), step \(step): not aligned")
                oracle.set(Int(block.number), order, true)
                blocks.append((block, order))
            } else {
                let block = blocks.remove(at: Int.random(in: 0..<blocks.count, using: &random))
                oracle.set(Int(block.frame.number), block.order, false)
                memory.put(memory.page(block.frame))
            }
            #expect(memory.freeFrames == oracle.free, "seed \(seed), step \(step)")
        }
        for block in blocks { memory.put(memory.page(block.frame)) }
        #expect(memory.freeFrames == frames - 1)
        try expectWhole(memory, frames)
    }

    @Test(arguments: [16, 17, 100, 1023, 1024, 1025, 2047, 3 * 1024 + 5])
    func `all memory can be taken frame by frame, and merges again`(frames: Int) throws {
        let fixture = try Fixture(frames)
        defer { fixture.keep() }
        let memory = fixture.memory
        var taken: [HostFrame] = []
        while let frame = memory.allocatePages(order: 0) { taken.append(frame) }
        #expect(taken.map(\.number) == Array(1..<UInt64(frames)), "every frame once, low ones first")
        #expect(memory.freeFrames == 0)
        for frame in taken.reversed() { memory.put(memory.page(frame)) }
        #expect(memory.freeFrames == frames - 1)
        try expectWhole(memory, frames)
    }

    /// With nothing in use, memory gives as many blocks of each order as its size and frame 0 leave room for.
    private func expectWhole(_ memory: PhysicalMemory, _ frames: Int) throws {
        for order in 0...PhysicalMemory.largestOrder {
            var blocks: [HostFrame] = []
            while let block = memory.allocatePages(order: order) { blocks.append(block) }
            #expect(blocks.count == max(0, frames >> order - 1), "order \(order)")
            for block in blocks { memory.put(memory.page(block)) }
        }
    }

    @Test func `page frames of memory that was never used are not written`() throws {
        let fixture = try Fixture(64 * 1024)
        defer { fixture.keep() }
        let memory = fixture.memory
        let host = Host(memory: memory, transparentHugePages: true)
        let space = AddressSpace(host: host)
        try space.map(at: UserAddress(1 << 30), length: 8 << 20, protection: .readWrite, backing: .anonymous)
        for page in 0..<UInt64(2048) { try space.store(UserAddress(1 << 30 + page << 12), page) }
        space.exit()
        memory.forgetAccessedAndDirty()
        #expect(memory.virgin < 8 * 1024)
        let words = (fixture.pageFrames.base + memory.virgin * 64).assumingMemoryBound(to: UInt64.self)
        let count = (fixture.frames - memory.virgin) * 8
        #expect((0..<count).allSatisfy { words[$0] == 0 })
    }

    @Test func `a frame that was never used is free, and known to be zero if the arena is`() throws {
        for isZero in [true, false] {
            let fixture = try Fixture(4096, arenaIsZero: isZero)
            defer { fixture.keep() }
            let memory = fixture.memory
            for number in [1, 2, 1023, 1024, 4095] as [UInt64] {
                let state = try #require(memory.inspect(HostFrame(number)))
                #expect(state.flags.isFree && state.headFlags.isFree && state.referenceCount == 0)
                #expect(state.flags.isKnownZero == isZero)
            }
            for order in [0, 3, 10] {
                let frame = try #require(memory.allocatePages(order: order))
                for i in 0..<(1 << order) {
                    let state = try #require(memory.inspect(frame.advanced(by: i)))
                    #expect(!state.flags.isFree && state.flags.isKnownZero == isZero)
                }
            }
            #expect(try #require(memory.inspect(HostFrame(0))).flags.isReserved)
        }
    }

    @Test func `frames of an arena that is not zero are cleared`() throws {
        let fixture = try Fixture(2048, arenaIsZero: false)
        defer { fixture.keep() }
        fixture.arena.base.initializeMemory(as: UInt8.self, repeating: 0xa5, count: fixture.arena.size)
        let space = AddressSpace(host: Host(memory: fixture.memory, transparentHugePages: false))
        try space.map(at: UserAddress(1 << 30), length: 1 << 20, protection: .readWrite, backing: .anonymous)
        for page in 0..<UInt64(256) {
            try space.store(UserAddress(1 << 30 + page << 12), 1)
            #expect(try space.load(UserAddress(1 << 30 + page << 12 + 4088)) == 0)
        }
        space.exit()
    }

    @Test func `memory that was never handed out can't be freed`() async {
        await #expect(processExitsWith: .failure) {
            let fixture = try Fixture(4096)
            defer { fixture.keep() }
            fixture.memory.freePages(HostFrame(2048), order: 0)
        }
    }

    @Test(arguments: [1 as UInt64, 2, 0xcafe]) func `renewed storage is as new`(seed: UInt64) throws {
        let frames = 3000
        let arena = try #require(MappedArena(size: (frames + 64) * Int(pageSize)))
        defer { withExtendedLifetime(arena) {} }
        let storage = MemoryStorage(arena: arena.base, ramFrames: frames, deviceFrames: 64)
        var random = TestRandom(seed: seed)
        for round in 0..<4 {
            do {
                let renewed = PhysicalMemory(storage)
                let fixture = try Fixture(frames)
                defer { fixture.keep() }
                let fresh = fixture.memory
                #expect(renewed.freeFrames == fresh.freeFrames)
                for number in 0..<UInt64(frames) {
                    #expect(
                        renewed.inspect(HostFrame(number)) == fresh.inspect(HostFrame(number)),
                        "seed \(seed), round \(round), frame \(number)")
                }
                let words = arena.base.assumingMemoryBound(to: UInt64.self)
                #expect((0..<arena.size / 8).allSatisfy { words[$0] == 0 }, "seed \(seed), round \(round)")
                try use(renewed, fresh, &random, seed)
            }
        }
    }

    /// The same calls on both give the same frames; the bytes are dirtied.
    private func use(
        _ renewed: PhysicalMemory, _ fresh: PhysicalMemory, _ random: inout TestRandom, _ seed: UInt64
    ) throws {
        var blocks: [HostFrame] = []
        for _ in 0..<Int.random(in: 1...300, using: &random) {
            if blocks.isEmpty || Int.random(in: 0..<3, using: &random) > 0 {
                let order = Int.random(in: 0...9, using: &random)
                let frame = renewed.allocatePages(order: order)
                #expect(frame == fresh.allocatePages(order: order), "seed \(seed)")
                guard let frame else { continue }
                blocks.append(frame)
                renewed.willWrite(frame, count: 1 << order)
                fresh.willWrite(frame, count: 1 << order)
                renewed.bytes(of: frame.advanced(by: (1 << order) - 1)).storeBytes(of: 7, as: UInt64.self)
            } else {
                let frame = blocks.remove(at: Int.random(in: 0..<blocks.count, using: &random))
                renewed.put(renewed.page(frame))
                fresh.put(fresh.page(frame))
            }
        }
        let device = try #require(renewed.allocateDeviceFrames(3))
        renewed.bytes(of: device.lowerBound).storeBytes(of: 7, as: UInt64.self)
    }
}
