import Audit
import Frames
import Hardware
import HostMemory
import SeededRandom
import Testing

private func translation(
    _ frame: UInt64, _ level: PageLevel = .page4K, write: Bool = true, dirty: Bool = true
) -> Translation {
    Translation(
        frame: HostFrame(frame), level: level, readable: true, writable: write, executable: false, dirty: dirty)
}

@Suite struct I13_TranslationBuffer {
    @Test func `an entry serves what it permits, and a store only with D`() {
        let buffer = TranslationBuffer(capacity: 4)
        buffer.fill(GuestFrame(7), translation(70, dirty: false))
        #expect(buffer.lookup(GuestFrame(7), .read)?.frame == HostFrame(70))
        #expect(buffer.lookup(GuestFrame(7), .write) == nil)
        #expect(buffer.lookup(GuestFrame(7), .execute) == nil)
        #expect(buffer.lookup(GuestFrame(8), .read) == nil)
        buffer.fill(GuestFrame(7), translation(70))
        #expect(buffer.lookup(GuestFrame(7), .write)?.frame == HostFrame(70))
        #expect(buffer.count == 1, "the same leaf takes the same slot")
    }

    @Test func `a large leaf serves each of its frames, whichever filled it`() {
        let buffer = TranslationBuffer(capacity: 2)
        buffer.fill(GuestFrame(0x403), translation(0x1203, .page2M))
        for i in 0..<512 as Range<UInt64> {
            #expect(buffer.lookup(GuestFrame(0x400 + i), .read)?.frame == HostFrame(0x1200 + i))
        }
        #expect(buffer.lookup(GuestFrame(0x3ff), .read) == nil && buffer.lookup(GuestFrame(0x600), .read) == nil)
    }

    @Test func `eviction goes round, free slots first`() {
        let buffer = TranslationBuffer(capacity: 3)
        for i in 1...5 as ClosedRange<UInt64> { buffer.fill(GuestFrame(i), translation(i * 10)) }
        #expect(cached(buffer) == [4, 5, 3])
        buffer.invalidate(GuestFrame(5)..<GuestFrame(6))
        buffer.fill(GuestFrame(6), translation(60))
        #expect(cached(buffer) == [4, 6, 3])
        buffer.fill(GuestFrame(7), translation(70))
        #expect(cached(buffer) == [4, 6, 7])
    }

    @Test func `a flush drops what touches its range and nothing else`() {
        let buffer = TranslationBuffer(capacity: 8)
        buffer.fill(GuestFrame(0x1ff), translation(1))
        buffer.fill(GuestFrame(0x200), translation(0x800, .page2M))
        buffer.fill(GuestFrame(0x400), translation(2))
        buffer.invalidate(GuestFrame(0x3ff)..<GuestFrame(0x400))
        #expect(cached(buffer) == [0x1ff, 0x400])
        buffer.invalidate(GuestFrame(0x400)..<GuestFrame(0x400))
        #expect(buffer.count == 2, "an empty range flushes nothing")
        buffer.invalidateAll()
        #expect(buffer.count == 0)
    }

    @Test func `fills are recorded with the leaf's first frames`() {
        let journal = Journal()
        let buffer = TranslationBuffer(capacity: 1, journal: journal, vcpu: 2)
        buffer.fill(GuestFrame(0x403), translation(0x1203, .page2M, write: false, dirty: false))
        let event = journal.events[0]
        #expect(event.kind == .tlbFill && event.guest == 0x400 && event.frame == 0x1200 && event.level == 2)
        #expect(event.value == 1 && event.task == 2)
    }

    /// Against a plain list: random fills, lookups and flushes of 4 KiB and 2 MiB leaves.
    @Test(arguments: 0..<20 as Range<UInt64>)
    func `it answers as a list of leaves would`(seed: UInt64) {
        var random = SplitMix(seed: seed)
        let capacity = 1 + Int(random.next() % 5)
        let buffer = TranslationBuffer(capacity: capacity)
        var model: [TranslationBuffer.Entry?] = Array(repeating: nil, count: capacity)
        var turn = 0
        for step in 0..<2000 {
            let frame = GuestFrame(random.next() % 2048)
            switch random.next() % 8 {
            case 0...3:
                let level: PageLevel = random.next() % 3 == 0 ? .page2M : .page4K
                let base = frame.number / level.frames * level.frames
                let host = 4096 * (1 + random.next() % 4)
                let leaf = translation(host, level, write: random.next() % 2 == 0, dirty: random.next() % 2 == 0)
                buffer.fill(
                    frame, translation(host + frame.number - base, level, write: leaf.writable, dirty: leaf.dirty))
                let same = model.firstIndex { $0?.guest.number == base && $0?.translation.level == level }
                let slot = same ?? model.firstIndex { $0 == nil } ?? turn
                if same == nil, !model.contains(where: { $0 == nil }) { turn = (turn + 1) % capacity }
                model[slot] = entry(base, leaf)
            case 4...6:
                let access = AccessKind.allCases[Int(random.next() % 3)]
                let hit = model.first {
                    $0.map { $0.guestFrames.contains(frame) && $0.translation.serves(access) } ?? false
                }
                let expected = hit.map { $0!.translation.frame.number + frame.number - $0!.guest.number }
                #expect(buffer.lookup(frame, access)?.frame.number == expected, "seed \(seed), step \(step)")
            default:
                let range = frame..<GuestFrame(frame.number + random.next() % 64)
                buffer.invalidate(range)
                for i in model.indices where model[i].map({ $0.guestFrames.overlaps(range) }) ?? false {
                    model[i] = nil
                }
            }
            #expect(buffer.count == model.count { $0 != nil }, "seed \(seed), step \(step)")
        }
    }

    /// What the buffer makes of a leaf, seen through a buffer of its own.
    private func entry(_ guest: UInt64, _ leaf: Translation) -> TranslationBuffer.Entry {
        let one = TranslationBuffer(capacity: 1)
        one.fill(GuestFrame(guest), leaf)
        return one.entries[0]
    }

    private func cached(_ buffer: TranslationBuffer) -> [UInt64] {
        buffer.entries.map(\.guest.number)
    }
}

@Suite struct I13_GuestPort {
    @Test(arguments: LeafUnderTest.Format.allCases)
    func `stores reach memory, loads and fetches read it back`(format: LeafUnderTest.Format) {
        let leaf = LeafUnderTest.make(format)
        leaf.entry = leaf.clean
        let port = GuestPort(stage: leaf.stage, buffer: TranslationBuffer(capacity: 4, journal: leaf.tables.journal))
        #expect(port.store(GuestAddress(0x18), 0x1122_3344_5566_7788) == .stored)
        #expect(leaf.tables[0xd018] == 0x1122_3344_5566_7788)
        #expect(port.load(GuestAddress(0x18)) == .value(0x1122_3344_5566_7788))
        #expect(port.fetch(GuestAddress(0x18)) == .value(0x1122_3344_5566_7788))
        #expect(port.load(GuestAddress(0x1c)) == .misaligned && port.store(GuestAddress(1), 0) == .misaligned)
        #expect(leaf.tables.journal.events.map(\.kind) == [.hardwareAccessed, .hardwareDirty, .tlbFill])
    }

    @Test func `a store says that the frame is no longer known to be zero`() throws {
        let leaf = LeafUnderTest.ept()
        leaf.entry = leaf.clean
        let port = GuestPort(stage: leaf.stage, buffer: TranslationBuffer(capacity: 4))
        #expect(port.load(GuestAddress(0)) == .value(0))
        #expect(try #require(leaf.tables.memory.inspect(HostFrame(13))).flags.isKnownZero)
        #expect(port.store(GuestAddress(0), 0) == .stored)
        #expect(try !#require(leaf.tables.memory.inspect(HostFrame(13))).flags.isKnownZero)
    }

    @Test(arguments: LeafUnderTest.Format.allCases)
    func `a store through an entry without D walks and sets it`(format: LeafUnderTest.Format) {
        let leaf = LeafUnderTest.make(format)
        leaf.entry = leaf.clean
        let port = GuestPort(stage: leaf.stage, buffer: TranslationBuffer(capacity: 4))
        #expect(port.load(GuestAddress(0)) == .value(0))
        #expect(leaf.entry & leaf.dirty == 0)
        #expect(port.store(GuestAddress(0), 1) == .stored)
        #expect(leaf.entry & leaf.dirty != 0)
    }

    @Test(arguments: LeafUnderTest.Format.allCases)
    func `a store through a cached clean entry sees that W was cleared`(format: LeafUnderTest.Format) {
        let leaf = LeafUnderTest.make(format)
        leaf.entry = leaf.clean
        let port = GuestPort(stage: leaf.stage, buffer: TranslationBuffer(capacity: 4))
        #expect(port.load(GuestAddress(0)) == .value(0))
        leaf.entry &= ~leaf.writable
        guard case .fault(.violation(let fault)) = port.store(GuestAddress(0), 1) else {
            Issue.record("the store went through a read-only entry")
            return
        }
        #expect(fault.reason == .rights && leaf.entry & leaf.dirty == 0 && leaf.tables[0xd000] == 0)
    }

    @Test(arguments: LeafUnderTest.Format.allCases)
    func `a zapped translation works until the flush and not after`(format: LeafUnderTest.Format) {
        let leaf = LeafUnderTest.make(format)
        leaf.entry = leaf.clean
        leaf.tables[0xd000] = 42
        let port = GuestPort(stage: leaf.stage, buffer: TranslationBuffer(capacity: 4))
        #expect(port.store(GuestAddress(8), 1) == .stored)
        leaf.entry = 0
        #expect(port.load(GuestAddress(0)) == .value(42), "nobody flushed")
        #expect(port.store(GuestAddress(0), 43) == .stored, "nobody flushed")
        port.buffer.invalidate(GuestFrame(0)..<GuestFrame(1))
        guard case .fault(.violation(let fault)) = port.load(GuestAddress(0)) else {
            Issue.record("the translation outlived the flush")
            return
        }
        #expect(fault.reason == .absent)
    }

    /// Dirty logging without a flush loses writes (Spec: x86 5, F5): the model must show that, not hide it.
    @Test func `D that is cleared without a flush is not set again by a cached entry`() {
        let leaf = LeafUnderTest.ept()
        leaf.entry = leaf.clean
        let port = GuestPort(stage: leaf.stage, buffer: TranslationBuffer(capacity: 4))
        #expect(port.store(GuestAddress(0), 1) == .stored)
        leaf.entry &= ~leaf.dirty
        #expect(port.store(GuestAddress(0), 2) == .stored)
        #expect(leaf.entry & leaf.dirty == 0)
        port.buffer.invalidateAll()
        #expect(port.store(GuestAddress(0), 3) == .stored)
        #expect(leaf.entry & leaf.dirty != 0)
    }

    @Test func `new rights need no flush, and a fault leaves no entry behind`() {
        let leaf = LeafUnderTest.ept()
        leaf.entry = leaf.clean & ~leaf.writable
        let port = GuestPort(stage: leaf.stage, buffer: TranslationBuffer(capacity: 4))
        #expect(port.load(GuestAddress(0)) == .value(0))
        if case .stored = port.store(GuestAddress(0), 1) { Issue.record("a read-only entry took a store") }
        #expect(port.buffer.count == 0)
        #expect(port.load(GuestAddress(0)) == .value(0))
        leaf.entry |= leaf.writable
        #expect(port.store(GuestAddress(0), 1) == .stored)
    }
}
