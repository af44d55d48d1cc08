import Audit
import Frames
import Machine
import Testing

@testable import HostMemory

@Suite struct I2_BuddyAllocator {
    /// The naive model: a set of frames that are taken.
    @Test(arguments: [1 as UInt64, 2, 3, 0xfeed, 0xdecade])
    func `blocks never overlap, are aligned, and all frames come back`(seed: UInt64) {
        let test = TestHost(ramFrames: 700)
        let memory = test.memory
        let atStart = memory.freeFrames
        var random = TestRandom(seed: seed)
        var taken = Set<UInt64>()
        var blocks: [(frame: HostFrame, order: Int, plain: Bool)] = []
        for _ in 0..<2000 {
            if blocks.isEmpty || Bool.random(using: &random) {
                let order = Int.random(in: 0...6, using: &random)
                let plain = Bool.random(using: &random)
                guard let frame = memory.allocatePages(order: order, shape: plain ? .plain : .compound) else {
                    continue
                }
                #expect(frame.number % (1 << UInt64(order)) == 0, "seed \(seed)")
                for i in 0..<UInt64(1 << order) {
                    #expect(frame.number + i > 0 && frame.number + i < 700)
                    #expect(taken.insert(frame.number + i).inserted, "seed \(seed): frame handed out twice")
                }
                blocks.append((frame, order, plain))
            } else {
                let block = blocks.remove(at: Int.random(in: 0..<blocks.count, using: &random))
                for i in 0..<UInt64(1 << block.order) { taken.remove(block.frame.number + i) }
                if block.plain {
                    memory.freePlain(block.frame, order: block.order)
                } else {
                    memory.put(memory.page(block.frame))
                }
            }
            #expect(memory.freeFrames == atStart - taken.count, "seed \(seed)")
        }
        for block in blocks {
            block.plain
                ? memory.freePlain(block.frame, order: block.order) : memory.put(memory.page(block.frame))
        }
        #expect(memory.freeFrames == atStart)
    }

    @Test func `after everything is freed the largest blocks are whole again`() {
        let test = TestHost(ramFrames: 2048 + 1024)
        let memory = test.memory
        var frames: [HostFrame] = []
        while let frame = memory.allocatePages(order: 0) { frames.append(frame) }
        #expect(memory.freeFrames == 0)
        for frame in frames.reversed() { memory.put(memory.page(frame)) }
        #expect(memory.allocatePages(order: 10) != nil)
        #expect(memory.allocatePages(order: 10) != nil)
    }

    @Test(arguments: 1...5) func `a plain block counts 1 in its first frame and 0 in all others`(order: Int) throws {
        let test = TestHost()
        let frame = try #require(test.memory.allocatePages(order: order, shape: .plain))
        for i in 0..<(1 << order) {
            let state = test.state(frame.advanced(by: i))
            #expect(state.referenceCount == (i == 0 ? 1 : 0))
            #expect(state.flags.bits & (PageFlags.head | PageFlags.tail) == 0)
            #expect(state.headReferenceCount == state.referenceCount)
        }
    }

    @Test(arguments: 1...5) func `a compound block counts in its head for every tail`(order: Int) throws {
        let test = TestHost()
        let frame = try #require(test.memory.allocatePages(order: order))
        let tail = test.memory.page(frame.advanced(by: (1 << order) - 1))
        test.memory.get(tail)
        #expect(test.state(frame).referenceCount == 2)
        #expect(test.state(frame.advanced(by: 1)).referenceCount == 0)
        test.memory.put(tail)
        let free = test.memory.freeFrames
        test.memory.put(tail)
        #expect(test.memory.freeFrames == free + (1 << order))
    }

    @Test func `a tail of a plain block can't be referenced`() throws {
        let test = TestHost()
        let frame = try #require(test.memory.allocatePages(order: 2, shape: .plain))
        #expect(!test.memory.tryGet(test.memory.page(frame.advanced(by: 3))))
        #expect(test.memory.tryGet(test.memory.page(frame)))
    }

    @Test func `a plain block whose first frame somebody holds is freed but for that frame`() throws {
        let test = TestHost()
        let free = test.memory.freeFrames
        let frame = try #require(test.memory.allocatePages(order: 3, shape: .plain))
        #expect(test.memory.tryGet(test.memory.page(frame)))
        test.memory.freePlain(frame, order: 3)
        #expect(test.memory.freeFrames == free - 1)
        test.memory.put(test.memory.page(frame))
        #expect(test.memory.freeFrames == free)
    }

    @Test func `a page that is put twice traps, or is a finding where a journal listens`() async throws {
        await #expect(processExitsWith: .failure) {
            let arena = MappedArena(size: 64 * Int(pageSize))!
            let memory = PhysicalMemory(arena: arena.base, ramFrames: 64, arenaIsZero: true)
            let frame = memory.allocatePages(order: 0)!
            memory.put(memory.page(frame))
            memory.put(memory.page(frame))
        }
        let test = TestHost()
        let frame = try #require(test.memory.allocatePages(order: 0))
        let free = test.memory.freeFrames
        test.memory.put(test.memory.page(frame))
        test.memory.put(test.memory.page(frame))
        #expect(test.memory.freeFrames == free + 1)
        #expect(test.memory.journal?.findings.map(\.invariant) == [.i2])
    }

    @Test func `a page with count 0 that is referenced traps`() async {
        await #expect(processExitsWith: .failure) {
            let test = TestHost()
            let frame = test.memory.allocatePages(order: 1, shape: .plain)!
            test.memory.get(test.memory.page(frame.advanced(by: 1)))
        }
    }

    @Test func `a reservation takes exactly its frames, each reserved and counted`() throws {
        let test = TestHost()
        let free = test.memory.freeFrames
        let frames = try #require(test.host.reserveFrames(5))
        #expect(test.memory.freeFrames == free - 5)
        for frame in frames {
            #expect(test.memory.isReserved(frame))
            #expect(test.state(frame).referenceCount == 1)
        }
        #expect(!test.memory.isReserved(frames.upperBound))
    }

    @Test func `table words belong to tables only`() async throws {
        let test = TestHost()
        let table = try #require(test.host.allocateTable(order: 2, fill: 1 << 63))
        test.host.setTableWords(table, 7, 9)
        #expect(test.host.tableWords(table) == (7, 9))
        #expect(test.memory.entry(2047, of: table).load() == 1 << 63)
        #expect(test.leaked { test.host.freeTable(table) } == -4)
        await #expect(processExitsWith: .failure) {
            let test = TestHost()
            _ = test.host.tableWords(test.memory.allocatePages(order: 0)!)
        }
    }
}
