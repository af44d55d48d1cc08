import Audit
import Frames
import Machine
import Synchrony
import Testing

@testable import GuestMemory
@testable import HostMemory

/// The rings beside something simpler.
@Suite struct I27_RingsAreExact {
    @Test func `a ring is a queue in shared memory, whatever userspace writes there`() throws {
        for start: UInt32 in [0, 1, .max - 300, .max] {
            let seed = UInt64.random(in: 1 ... .max)
            print("seed \(seed)")
            let host = TestHost(ramFrames: 64)
            let ring = try #require(DirtyRing(host: host.host, bytes: 4096, reserved: 64, startingAt: start))
            var model = RingModel(ring, start: start, seed: seed)
            for step in 0..<20_000 where !model.step() {
                Issue.record("seed \(seed), start \(start), step \(step)")
                break
            }
            ring.free()
        }
    }

    @Test(arguments: Architecture.twoStage)
    func `the rings hold exactly the first write to each page since its reset, in order`(
        architecture: Architecture
    ) throws {
        for _ in 0..<2 {
            let seed = UInt64.random(in: 1 ... .max)
            print("seed \(seed)")
            try LogModel(architecture, seed: seed).run(steps: 1500)
        }
    }
}

/// All words of the ring's memory, and two counters.
private struct RingModel {
    private var random: TestRandom
    private let ring: DirtyRing
    private var cells = [DirtyRingEntry](repeating: DirtyRingEntry(flags: 0, slot: 0, offset: 0), count: 256)
    private var pushed: UInt32
    private var consumed: UInt32

    init(_ ring: DirtyRing, start: UInt32, seed: UInt64) {
        self.ring = ring
        random = TestRandom(seed: seed)
        pushed = start
        consumed = start
    }

    /// One random operation; whether ring and model agree.
    mutating func step() -> Bool {
        switch UInt8.random(in: 0..<20, using: &random) {
        case 0..<9: push()
        case 9..<16: mark()
        case 16: scribble()
        default: if !consume() { return false }
        }
        return agrees()
    }

    private mutating func push() {
        guard pushed &- consumed < 256 else { return }
        let entry = randomEntry(flags: 1)
        ring.push(slot: entry.slot, offset: entry.offset)
        cells[Int(pushed % 256)] = entry
        pushed &+= 1
    }

    /// Harvests up to 20 entries, honestly.
    private mutating func mark() {
        var index = consumed
        for _ in 0..<Int.random(in: 1...20, using: &random) where index != pushed {
            ring.setFlags(3, at: index)
            cells[Int(index % 256)].flags = 3
            index &+= 1
        }
    }

    private mutating func scribble() {
        let index = UInt32.random(in: 0..<256, using: &random) &+ consumed
        let entry = randomEntry(flags: UInt32.random(in: 0..<8, using: &random))
        ring.scribble(entry, at: index)
        cells[Int(index % 256)] = entry
    }

    private mutating func consume() -> Bool {
        while consumed != pushed, cells[Int(consumed % 256)].flags & 2 != 0 {
            let cell = cells[Int(consumed % 256)]
            guard let entry = ring.takeReset(), entry.slot == cell.slot, entry.offset == cell.offset else {
                return false
            }
            cells[Int(consumed % 256)].flags = 0
            consumed &+= 1
        }
        return ring.takeReset() == nil
    }

    private func agrees() -> Bool {
        let progress = ring.progress
        guard progress.pushed == pushed, progress.consumed == consumed, ring.used == pushed &- consumed,
            ring.used <= 256, ring.isSoftFull == (ring.used >= 192)
        else { return false }
        return (UInt32(0)..<256).allSatisfy { ring.entry(at: $0) == cells[Int($0)] }
    }

    private mutating func randomEntry(flags: UInt32) -> DirtyRingEntry {
        DirtyRingEntry(
            flags: flags, slot: UInt32.random(in: 0 ... .max, using: &random),
            offset: UInt64.random(in: 0 ... .max, using: &random))
    }
}

/// A guest of two vCPUs that stores at random, and an honest VMM.
private final class LogModel {
    private struct Page: Hashable {
        var slot: UInt32
        var offset: UInt64
    }
    private let seed: UInt64
    private var random: TestRandom
    private let guest: TestGuest
    private let readers: [DirtyRingReader]
    /// Pushed and not read; read and not reset: by vCPU, in order.
    private var unread: [[Page]] = [[], []]
    private var unreset: [[Page]] = [[], []]
    /// Pages that the guest writes without a fault.
    private var writable: Set<Page> = []
    /// Slots: identity, first page, pages.
    private static let slots: [(UInt32, Int, Int)] = [(0, 0, 260), (1, 300, 65), (9, 400, 1)]

    init(_ architecture: Architecture, seed: UInt64) throws {
        self.seed = seed
        random = TestRandom(seed: seed)
        let guest = TestGuest.withRings(architecture, cpus: 2, keepsEvents: false)
        self.guest = guest
        readers = try (0..<2).map { DirtyRingReader(try guest.ring($0)) }
        for (id, first, pages) in Self.slots {
            try guest.space.mapPages(first, pages)
            try guest.setSlot(id, guest: first, pages: pages, log: true)
        }
    }

    func run(steps: Int) throws {
        for _ in 0..<steps {
            switch UInt8.random(in: 0..<40, using: &random) {
            case 0..<36: store()
            case 36..<39: collect()
            default: try reset()
            }
        }
        guest.check()
    }

    private func used(_ cpu: Int) -> Int { unread[cpu].count + unreset[cpu].count }

    private func store() {
        let cpu = Int.random(in: 0..<2, using: &random)
        let (slot, first, pages) = Self.slots.randomElement(using: &random)!
        let offset = Int.random(in: 0..<pages, using: &random)
        let page = Page(slot: slot, offset: UInt64(offset))
        let wasFull = used(cpu) >= 192
        let result = guest.store(first + offset, 1, cpu: cpu)
        if !wasFull, writable.insert(page).inserted { unread[cpu].append(page) }
        #expect(result == (used(cpu) >= 192 ? .dirtyRingFull : .stored), "seed \(seed)")
    }

    private func collect() {
        let cpu = Int.random(in: 0..<2, using: &random)
        let found = readers[cpu].collect(atMost: Int.random(in: 1...120, using: &random))
            .map { Page(slot: $0.slot, offset: $0.offset) }
        #expect(found == Array(unread[cpu].prefix(found.count)), "seed \(seed)")
        unread[cpu].removeFirst(found.count)
        unreset[cpu] += found
    }

    private func reset() throws {
        let count = try guest.vm.resetDirtyRings()
        #expect(count == UInt64(unreset[0].count + unreset[1].count), "seed \(seed)")
        writable.subtract(unreset[0] + unreset[1])
        unreset = [[], []]
        var open: Set<GuestFrame> = []
        guest.vm.mmu.forEachLeaf { if $0.writable { open.insert($0.guestFrame) } }
        for (slot, first, pages) in Self.slots {
            for offset in 0..<pages
            where open.contains(gfn(first + offset)) != writable.contains(Page(slot: slot, offset: UInt64(offset))) {
                Issue.record("seed \(seed), slot \(slot), page \(offset)")
            }
        }
    }
}

extension I12_NoWriteIsLost {
    /// Bitmap ∪ rings, with threads: a VMM that collects, resets and copies while two vCPUs write, and the VMM itself
    /// writes to what it then marks in the backup bitmap. The image equals memory at the stop.
    @Test(arguments: [Architecture.x86TDP, .riscvSv39x4])
    func `two vCPUs and a VMM write beside a migration over rings`(architecture: Architecture) async throws {
        let seed = UInt64.random(in: 1 ... .max)
        print("seed \(seed)")
        let guest = TestGuest.withRings(architecture, cpus: 2, backup: true, keepsEvents: false)
        for cpu in guest.cpus { cpu.patience = 1_000_000 }
        try guest.addMemory(0, 300, log: true)
        let migration = RingMigration(guest, pages: 300)
        let ended = (0..<3).map { _ in Flag() }
        var bodies: [@Sendable () throws -> Void] = (0..<2).map { number in
            {
                defer { ended[number].raise() }
                var random = TestRandom(seed: seed &+ UInt64(number))
                for round in 1...4000 {
                    let page = Int.random(in: 0..<300, using: &random)
                    while true {
                        let result = guest.store(page, UInt64(round) << 8 | UInt64(number), cpu: number)
                        if result == .stored { break }
                        guard result == .dirtyRingFull else {
                            Issue.record("\(result), seed \(seed)")
                            return
                        }
                        yieldProcessor()
                    }
                }
            }
        }
        bodies.append {
            defer { ended[2].raise() }
            var random = TestRandom(seed: seed &+ 9)
            for round in 1...500 {
                let page = Int.random(in: 0..<300, using: &random)
                try guest.space.store(at(page, 8), UInt64(round))
                guest.vm.withSlots { guest.vm.markDirty(gfn(page), in: guest.vm.slot(containing: gfn(page))!) }
                yieldProcessor()
            }
        }
        bodies.append {
            while !ended.allSatisfy(\.isRaised) {
                try migration.round()
            }
            try migration.round()
        }
        try await onThreads(bodies)
        #expect(try migration.differences() == [], "seed \(seed)")
        #expect(migration.copied > 300, "the rings were used")
        guest.check()
    }
}

/// A VMM's copy of guest memory: first everything, then what rings and bitmap say.
private final class RingMigration: @unchecked Sendable {
    // Unchecked: belongs to one thread, and to the test afterwards.
    private let guest: TestGuest
    private let readers: [DirtyRingReader]
    private var image: [[UInt64]]
    private(set) var copied = 0

    init(_ guest: TestGuest, pages: Int) {
        self.guest = guest
        readers = guest.cpus.compactMap { $0.ring.map { DirtyRingReader($0) } }
        image = [[UInt64]](repeating: [0, 0], count: pages)
    }

    func round() throws {
        var pages: Set<Int> = []
        for reader in readers { pages.formUnion(reader.collect().map { Int($0.offset) }) }
        _ = try guest.vm.resetDirtyRings()
        pages.formUnion(try guest.log())
        for page in pages.sorted() {
            image[page] = try words(page)
            copied += 1
        }
    }

    private func words(_ page: Int) throws -> [UInt64] {
        try [guest.space.load(at(page)), guest.space.load(at(page, 8))]
    }

    func differences() throws -> [Int] { try image.indices.filter { try words($0) != image[$0] } }
}
