import Frames
import HostMemory
import Machine
import SeededRandom

/// 4 MiB of physical memory with random tables in it. The lower half is the host's; the upper half is a guest's where
/// there is a second stage.
///
/// Each round has one setup: tables for one stage, for two random ones, or for a guest behind a sound second stage, which
/// maps the upper half and nothing else: 4 KiB pages, some read-only, some missing, and one large page.
final class RandomTables {
    enum Setup: Equatable {
        case alone
        case behind(sound: Bool)
    }

    let memory: PhysicalMemory
    private let arena: MappedArena
    private var random: SplitMix
    private(set) var setup = Setup.alone
    /// The format of the second stage in this round.
    private(set) var isEPT = false
    /// By guest frame below 2 MiB: nothing, readable, writable.
    private var sound: [UInt8] = []

    static let logFrame = HostFrame(1)
    private static let frames = 1024
    private static let guest = 512
    /// Tables of the sound second stage: at these frames, by level.
    private static let soundTable: UInt64 = 16
    /// Frames that random tables stand in, in either half: from here on, this many.
    private static let hotFrames = 32 as UInt64
    private static let hotStart = 64 as UInt64

    init?(seed: UInt64) {
        guard let arena = MappedArena(size: Self.frames * 4096) else { return nil }
        self.arena = arena
        // The last quarter is device memory: tables may stand in it.
        memory = PhysicalMemory(arena: arena.base, ramFrames: 768, deviceFrames: 256, arenaIsZero: true)
        random = SplitMix(seed: seed)
    }

    var base: UInt64 { UInt64(UInt(bitPattern: arena.base)) }

    // MARK: What a walk may see

    /// Entries and pages that may be read. With a sound second stage: its own tables, and what it maps.
    func mayRead(_ frame: HostFrame) -> Bool {
        guard frame.number < UInt64(Self.frames) else { return false }
        guard setup == .behind(sound: true) else { return true }
        return isMapped(frame)
    }

    func mayWrite(_ frame: HostFrame) -> Bool {
        guard frame.number < UInt64(Self.frames) else { return false }
        guard setup == .behind(sound: true) else { return true }
        return isMapped(frame) && sound[Int(frame.number) - Self.guest] > 1
    }

    private func isMapped(_ frame: HostFrame) -> Bool {
        frame.number >= UInt64(Self.guest) && sound[Int(frame.number) - Self.guest] > 0
    }

    /// Whether the second stage's own tables are in `frame`, or its log.
    func isSecondStage(_ frame: HostFrame) -> Bool {
        frame == Self.logFrame || (Self.soundTable + 1...Self.soundTable + 5).contains(frame.number)
    }

    // MARK: Roots

    /// For CR3 and PAE's pointers: mostly a table that is there.
    func root() -> UInt64 {
        if random.next() % 32 == 0 { return random.next() & random.next() }
        let low = random.next() & 0xff8
        return addressOfTable(seenByGuest: setup != .alone) | (random.next() % 4 == 0 ? low : 0)
    }

    func stageRoot(fiveLevels: Bool) -> UInt64 {
        if setup == .behind(sound: true) { return (Self.soundTable + (fiveLevels ? 5 : 4)) << 12 }
        return addressOfTable(seenByGuest: false)
    }

    /// A frame with random entries. A guest's addresses are those below 2 MiB, or the same memory through the large page.
    private func addressOfTable(seenByGuest: Bool) -> UInt64 {
        let frame = Self.hotStart + random.next() % Self.hotFrames
        guard seenByGuest, setup == .behind(sound: true) else {
            return (frame + (random.next() & 1) * UInt64(Self.guest)) << 12
        }
        return frame << 12 | (random.next() % 4 == 0 ? 0x20_0000 : 0)
    }

    // MARK: Contents

    /// Another round: new random tables.
    func renew() {
        setup = [.alone, .behind(sound: false), .behind(sound: true)][Int(random.next() % 3)]
        isEPT = random.next() & 1 != 0
        if setup == .behind(sound: true) { buildSoundStage() }
        for half in [0, UInt64(Self.guest)] {
            for frame in Self.hotStart..<Self.hotStart + Self.hotFrames { fillTable(half + frame) }
        }
    }

    private func fillTable(_ frame: UInt64) {
        let style = random.next() % 16
        let isNarrow = style == 1 || style == 2
        let isStageTwo = setup == .behind(sound: false) && isEPT && style > 8
        for index in 0..<512 {
            let value: UInt64 =
                style == 0
                ? random.next()
                : isNarrow ? narrowEntry() | narrowEntry() << 32 : isStageTwo ? eptEntry() : wideEntry()
            memory.entry(index, of: HostFrame(frame)).initialize(to: value)
        }
    }

    private func wideEntry() -> UInt64 {
        let bits = random.next()
        return RandomEntry.wide(bits, addressOfTable(seenByGuest: true)) ?? random.next()
    }

    private func narrowEntry() -> UInt64 {
        let bits = random.next()
        return RandomEntry.narrow(bits, addressOfTable(seenByGuest: true))
    }

    private func eptEntry() -> UInt64 {
        let bits = random.next()
        return RandomEntry.ept(bits, addressOfTable(seenByGuest: false))
    }

    // MARK: The sound second stage

    private func buildSoundStage() {
        for level in 1...5 as ClosedRange<UInt64> {
            for index in 0..<512 { memory.entry(index, of: HostFrame(Self.soundTable + level)).initialize(to: 0) }
        }
        for level in 2...5 as ClosedRange<UInt64> {
            set(0, of: level, to: (Self.soundTable + level - 1) << 12 | 7)
        }
        let leaf: UInt64 = isEPT ? 0x37 : 7
        // The large page is writable, all of it, or not there at all: then the small ones say who may do what.
        let hasLargePage = random.next() & 1 == 0
        if hasLargePage { set(1, of: 2, to: UInt64(Self.guest) << 12 | leaf | 0x80) }
        sound = []
        for frame in 0..<Self.guest {
            let right = [0, 1, 2, 2, 2, 2, 2, 2][Int(random.next() % 8)] as UInt8
            let address = UInt64(Self.guest + frame) << 12
            set(frame, of: 1, to: right == 0 ? 0 : address | (right == 1 ? leaf & ~2 : leaf))
            sound.append(hasLargePage ? 2 : right)
        }
    }

    private func set(_ index: Int, of level: UInt64, to value: UInt64) {
        memory.entry(index, of: HostFrame(Self.soundTable + level)).initialize(to: value)
    }
}
