import Frames
import Hardware
import HostMemory
import Testing

@Suite struct X86_3_8_ModificationLog {
    /// Guest frames 0 to 511 behind EPT, and a log at frame 9.
    private struct Logged {
        let fixture = TwoDimensionalFixture(.fourLevel, .ept)
        let log: ModificationLog
        init() { log = ModificationLog(memory: fixture.tables.memory, frame: HostFrame(9)) }
        func store(_ frame: UInt64, offset: UInt64 = 0) -> WalkResult {
            fixture.stageTwo(log: log).walk(GuestAddress(frame << 12 | offset), .write)
        }
        var logged: [UInt64] { (0..<log.count).map { log[$0].number } }
    }

    @Test func `D going from 0 to 1 is logged once, from entry 511 down, as the page's address`() {
        let logged = Logged()
        #expect(logged.store(5, offset: 0xab8).translation?.dirty == true)
        #expect(logged.store(3).translation != nil && logged.store(5).translation != nil)
        #expect(logged.fixture.tables[0x9000 + 8 * 511] == 0x5000)
        #expect(logged.fixture.tables[0x9000 + 8 * 510] == 0x3000)
        #expect(logged.fixture.tables[0x9000 + 8 * 509] == 0)
        #expect(logged.log.index == 509 && logged.logged == [5, 3])
    }

    @Test func `reads, refused stores and walks without D log nothing`() {
        let logged = Logged()
        let stage = logged.fixture.stageTwo(log: logged.log)
        _ = stage.walk(GuestAddress(0x5000), .read)
        logged.fixture.tables[logged.fixture.leaf(6)] &= ~2
        #expect(logged.store(6).violation?.reason == .rights)
        let off = EPTWalker(
            memory: logged.fixture.tables.memory, pointer: TwoDimensionalFixture.tables + 0x4000 | 0x1e,
            log: logged.log)
        #expect(off.walk(GuestAddress(0x7000), .write).translation != nil)
        #expect(logged.log.count == 0 && logged.log.index == 511)
    }

    @Test func `the log's 513th entry is an exit before anything is written`() {
        let logged = Logged()
        for frame in 0..<511 as Range<UInt64> { #expect(logged.store(frame).translation != nil) }
        #expect(!logged.log.isFull && logged.log.index == 0)
        #expect(logged.store(511).translation != nil)
        #expect(logged.log.isFull && logged.log.index == 0xffff && logged.log.count == 512)
        #expect(logged.logged == Array(0..<512))
        logged.fixture.tables[logged.fixture.leaf(8)] = logged.fixture.cleanLeaf(8)
        #expect(logged.store(8) == .modificationLogFull)
        #expect(logged.fixture.tables[logged.fixture.leaf(8)] == logged.fixture.cleanLeaf(8))
        #expect(logged.store(9).translation != nil, "its D is set already")
        #expect(logged.fixture.stageTwo(log: logged.log).walk(GuestAddress(0x8000), .read).translation != nil)
        logged.log.reset()
        #expect(logged.store(8).translation != nil && logged.logged == [8])
    }

    @Test func `a leaf that changes under the walk is logged for the walk that succeeds`() {
        let points = withHook({ _ in }, { Logged().store(5) }).points
        for at in 0..<points {
            let logged = Logged()
            let entry = logged.fixture.leaf(5)
            let change = { (number: Int) in if number == at { logged.fixture.tables[entry] = 0x80_e037 } }
            let result = withHook(change) { logged.store(5) }.result
            #expect(result.translation != nil && logged.logged == [5])
        }
    }

    @Test func `the guest's own tables are logged, as they count as written`() {
        let fixture = TwoDimensionalFixture(.fourLevel, .ept)
        let log = ModificationLog(memory: fixture.tables.memory, frame: HostFrame(9))
        #expect(fixture.walker(log: log).walk(0, .read).translation != nil)
        #expect((0..<log.count).map { log[$0].number } == [4, 3, 2, 1])
        #expect(fixture.walker(log: log).walk(0, .write).translation != nil)
        #expect((0..<log.count).map { log[$0].number } == [4, 3, 2, 1, 0xd])
    }

    @Test func `a full log ends a guest's walk where it must be written`() {
        let fixture = TwoDimensionalFixture(.fourLevel, .ept)
        let log = ModificationLog(memory: fixture.tables.memory, frame: HostFrame(9))
        let stage = fixture.stageTwo(log: log)
        for frame in 0..<512 as Range<UInt64> where frame != 2 { _ = stage.walk(GuestAddress(frame << 12), .write) }
        fixture.tables[fixture.leaf(8)] = fixture.cleanLeaf(8)
        _ = stage.walk(GuestAddress(0x8000), .write)
        #expect(log.isFull)
        let fault = fixture.walker(log: log).walk(0, .read).stageTwo
        #expect(fault?.result == .modificationLogFull && fault?.finalTranslation == false)
        log.reset()
        #expect(fixture.walker(log: log).walk(0, .read).translation != nil)
        #expect((0..<log.count).map { log[$0].number } == [2])
    }
}
