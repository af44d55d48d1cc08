import Frames
import SeededRandom
import Testing

@testable import LogConsumers

/// A random life of a VM on paper: slots that come and go, a guest, a VMM and a device that write between any two calls of
/// the consumer, and migrations and snapshots in between.
private final class RandomLife {
    let guest = PaperGuest()
    let writers = WriterLog()
    let migration: Migration
    let snapshots: Snapshots
    private let mistakes: Mistakes
    private var random: SplitMix
    private var value: UInt64 = 0
    private var nextID: UInt16 = 0
    /// A write that the VMM has made and not marked yet, or the other way round.
    private var unfinished: (() -> Void)?

    init(seed: UInt64, _ mistakes: Mistakes) {
        self.mistakes = mistakes
        random = SplitMix(seed: seed)
        migration = Migration(LogReader(guest, writers, mistakes))
        snapshots = Snapshots(LogReader(guest, writers, mistakes))
        guest.isManual = Bool.random(using: &random)
        guest.startsFull = Bool.random(using: &random)
        for _ in 0..<below(3) + 1 { addSlot() }
        guest.meanwhile = { [unowned self] in if below(3) == 0 { write() } }
        guest.beforePause = { [unowned self] in finish() }
    }

    private func below(_ bound: Int) -> Int { Int.random(in: 0..<bound, using: &random) }

    private func addSlot() {
        nextID += UInt16(below(3) + 1)
        guest.add(nextID, pages: UInt64(below(5) == 0 ? 60 + below(80) : 1 + below(6)), isLogged: below(4) == 0)
    }

    private func finish() {
        unfinished?()
        unfinished = nil
    }

    private func write() {
        finish()
        guard !guest.paper.isEmpty else { return }
        let slot = below(guest.paper.count)
        let page = UInt64(below(Int(guest.paper[slot].slot.pages)))
        value += 1
        let (written, id) = (value, guest.paper[slot].slot.id)
        // Some page is swapped out.
        if below(3) == 0 { guest.paper[slot].resident[below(guest.paper[slot].resident.count)] = false }
        guard below(3) == 0 else { return guest.write(written, slot: slot, page: page) }
        guard !mistakes.make(.ownWritesUnlogged) else { return guest.writeUnseen(written, slot: slot, page: page) }
        if mistakes.make(.markedBeforeWrite) {
            writers.mark(page, of: id)
            unfinished = { [unowned self] in
                guard let slot = guest.paper.firstIndex(where: { $0.slot.id == id }) else { return }
                guest.writeUnseen(written, slot: slot, page: page)
            }
        } else {
            guest.writeUnseen(written, slot: slot, page: page)
            unfinished = { [unowned self] in writers.mark(page, of: id) }
        }
    }

    private func changeSlots() {
        finish()
        if below(2) == 0, guest.paper.count < 6 {
            addSlot()
        } else if guest.paper.count > 1 {
            guest.paper.remove(at: below(guest.paper.count))
        }
    }

    /// Whether every image was right.
    func live(_ steps: Int) throws -> Bool {
        for _ in 0..<steps {
            switch below(10) {
            case 0: changeSlots()
            case 1, 2, 3: for _ in 0..<below(6) { write() }
            case 4, 5: _ = migration.isRunning ? try migration.round() : try begin()
            case 6: if migration.isRunning { _ = try migration.stop() }
            case 7: if !migration.isRunning { _ = try snapshots.full() }
            default: if !migration.isRunning, !snapshots.files.isEmpty { try useSnapshots() }
            }
        }
        if migration.isRunning { _ = try migration.stop() }
        return guest.wrong.isEmpty
    }

    private func begin() throws -> UInt64 {
        try snapshots.end()
        return try migration.start()
    }

    private func useSnapshots() throws {
        finish()
        _ = below(4) == 0 ? try snapshots.restore() : try snapshots.difference()
    }
}

@Suite struct LOG1_RandomWriters {
    @Test func `no write is lost`() throws {
        let seed = UInt64.random(in: 0...UInt64.max / 2)
        print("seed \(seed)")
        var stops = 0
        for round in 0..<300 {
            let life = RandomLife(seed: seed + UInt64(round), Mistakes())
            #expect(try life.live(40), "seed \(seed + UInt64(round)): \(life.guest.wrong)")
            stops += life.guest.stops
        }
        #expect(stops > 1000)
    }

    /// Devices' writes are the VMM's here; the world knows them apart.
    static let mistakes = Mistake.allCases.filter { $0 != .deviceWritesUnlogged }

    @Test(arguments: mistakes) func `each mistake loses one`(mistake: Mistake) throws {
        let seed = UInt64.random(in: 0...UInt64.max / 2)
        print("seed \(seed)")
        var found = false
        for round in 0..<300 where !found {
            found = try !RandomLife(seed: seed + UInt64(round), Mistakes(mistake)).live(40)
        }
        #expect(found, "seed \(seed)")
    }
}
