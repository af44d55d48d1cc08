import Audit
import Frames
import HostMemory
import Testing

@testable import GuestMemory
@testable import Machine
@testable import Paging

/// A guest that rewrites its page tables at random, on a host that does what hosts do: every rule at rest holds after every
/// step, and where the guest has flushed, an access comes to what its tables say. The tables are walked here, by a walk
/// that knows nothing of KVM. Spec: x86 section 8.
@Suite struct X86_8_ShadowRandomWalk {
    @Test(arguments: Array(1...6) as [UInt64])
    func `every step leaves the rules unbroken, and flushed addresses lead where the guest's tables say`(seed: UInt64)
        throws
    {
        let walk = try RandomShadowWalk(seed: seed)
        for step in 0..<250 {
            try walk.step()
            let findings = walk.guest.mmu.checkTables() + walk.guest.cpus.flatMap { $0.checkTranslations() }
            #expect(findings == [], "seed \(seed), step \(step): \(walk.did)")
            if !findings.isEmpty || walk.failed { break }
        }
        #expect(!walk.failed, "seed \(seed), \(walk.did)")
        #expect(walk.checked > 50, "seed \(seed): too few accesses that say something")
    }
}

/// Frames 1 and 14 are roots over 2 and 3; directory 3 has five entries: tables 4 and 5, a large page of the second block,
/// and, never changed, a window of all frames through table 7. Frame 6 is a table in waiting. Data is in 16 to 63 and in
/// the second block.
private final class RandomShadowWalk {
    let guest: PagedGuest
    private var random: TestRandom
    /// Pages of addresses that a vCPU may still translate as they once were.
    private var stale: [Set<Int>]
    private var readOnly: Set<Int> = []
    /// Frames that the guest has written since the last harvest, while logging was on.
    private var written: Set<Int> = []
    private var isLogged = false
    private var child: AddressSpace?
    private(set) var failed = false
    private(set) var checked = 0
    private(set) var did = ""

    private static let entries = 5
    private static let window = 3

    init(seed: UInt64) throws {
        random = TestRandom(seed: seed &* 0x9e37_79b9_7f4a_7c15)
        guest = try PagedGuest(pages: 1024, cpus: 2, ramFrames: 8192, thp: seed % 2 == 0)
        stale = [[], []]
        for root in [1, 14] { try guest.write(root, 0, 0x2007) }
        try guest.write(2, 0, 0x3007)
        for (index, entry) in [(0, 0x4067), (1, 0x20_00e7), (2, 0x5067), (3, 0x7067), (4, 0x4065)] as [(Int, UInt64)] {
            try guest.write(3, index, entry)
        }
        for i in 0..<64 {
            try guest.write(4, i, randomEntry())
            try guest.write(5, i, randomEntry())
            try guest.write(6, i, randomEntry())
            try guest.write(7, i, UInt64(i) << 12 | PagedGuest.page)
        }
        // Neighbours that the process has are mapped ahead.
        for i in 16..<64 { try guest.space.store(at(i), UInt64(i)) }
        for cpu in guest.cpus { guest.mmu.load(.longMode(root: GuestAddress(0x1000)), on: cpu) }
    }

    deinit { child?.exit() }

    private func pick(_ count: Int) -> Int { Int.random(in: 0..<count, using: &random) }
    private func chance(_ percent: Int) -> Bool { pick(100) < percent }

    private func randomEntry() -> UInt64 {
        if chance(5) { return 0 }
        var entry: UInt64 = chance(95) ? 5 : 1
        if chance(90) { entry |= 0x20 }
        if chance(20) { entry |= 1 << 63 }
        // Tables are never mapped for writing but by the window.
        if chance(10) { return entry | UInt64(1 + pick(7)) << 12 }
        if chance(60) { entry |= chance(70) ? 0x42 : 2 }
        return entry | UInt64(16 + pick(48)) << 12
    }

    private func address(_ page: Int) -> UInt64 { UInt64(page / 64) << 21 | UInt64(page % 64) << 12 }

    // MARK: What the tables say

    private struct Translation {
        var frame: Int
        var entry: UInt64
        var rights: UInt64
        var executes: Bool
    }

    private func translate(_ address: UInt64) throws -> Translation? {
        guard guest.vm.activeSlots.count == 1 else { return nil }
        var table = 3
        var rights: UInt64 = 7
        var executes = true
        for level in [UInt64(2), 1] {
            let entry = try guest.guestEntry(table, Int(address >> (12 + 9 * (level - 1)) & 511))
            guard entry & 1 != 0 else { return nil }
            rights &= entry
            executes = executes && entry >> 63 == 0
            let frame = Int(entry >> 12 & 0xff_ffff)
            if level == 1 { return Translation(frame: frame, entry: entry, rights: rights, executes: executes) }
            if entry & 0x80 != 0 {
                return Translation(
                    frame: frame + Int(address >> 12 & 511), entry: entry, rights: rights, executes: executes)
            }
            table = frame
        }
        return nil
    }

    // MARK: Steps

    func step() throws {
        switch pick(100) {
        case 0..<50: try access()
        case 50..<66: try rewrite()
        case 66..<72: flushPage()
        case 72..<76: flushAll()
        case 76..<79: loadRoot()
        case 79..<85: try discard()
        case 85..<88: try protect()
        case 88..<91: try forkOrEnd()
        case 91..<93: try collapse()
        case 93..<95: try replaceSlot()
        default: try log()
        }
    }

    private func access() throws {
        let cpu = pick(2)
        let page = pick(64 * Self.entries)
        let place = address(page) | UInt64(pick(512)) * 8
        guest.mmu.state(of: guest.cpus[cpu]).isUser = chance(80)
        let value = random.next()
        let isWindow = page / 64 == Self.window
        // Through the window only data is written here, tables in `rewrite`.
        let kind = pick(isWindow && page % 64 < 16 ? 1 : 3)
        let what: PagedAccess = [.load, .store(value), .fetch][kind]
        let before = try translate(place)
        let result = guest.cpus[cpu].access(what, at: place)
        did = "cpu \(cpu) \(what) at \(String(place, radix: 16)): \(result)"
        if case .stored = result, isLogged, !stale[cpu].contains(page), let before { written.insert(before.frame) }
        guard !stale[cpu].contains(page) else { return }
        try compare(what, place, result, before, isUser: guest.mmu.state(of: guest.cpus[cpu]).isUser)
    }

    private func compare(
        _ what: PagedAccess, _ place: UInt64, _ result: PagedAccessResult, _ before: Translation?, isUser: Bool
    ) throws {
        checked += 1
        let needed: UInt64 = isUser ? 5 : 1
        var allowed = before.map { $0.rights & needed == needed } ?? false
        if case .store = what { allowed = allowed && before!.rights & 2 != 0 }
        if case .fetch = what { allowed = allowed && before!.executes }
        guard allowed, let before else {
            guard case .pageFault = result else { return fail() }
            return
        }
        let content = try guest.space.load(at(before.frame) + place & 4095)
        let entry = try translate(place)!.entry
        switch (what, result) {
        // The walk may set A and D in the very word that was read.
        case (.load, .value(let seen)), (.fetch, .value(let seen)):
            if seen | 0x60 != content | 0x60 || entry & 0x20 == 0 { fail() }
        case (.store(let value), .stored):
            if value != content || entry & 0x60 != 0x60 || readOnly.contains(before.frame) { fail() }
        case (.store(let value), _) where readOnly.contains(before.frame):
            if value == content { fail() }
        default: fail()
        }
    }

    private func fail() { failed = true }

    /// The guest changes one of its tables, and forgets to flush for now.
    private func rewrite() throws {
        let table = chance(25) ? 3 : 4 + pick(3)
        var index = pick(64)
        var entry = randomEntry()
        if table == 3 {
            index = [0, 1, 2, 4][pick(4)]
            entry = [0x4067, 0x5067, 0x6067, 0x4065, 0x6067 | 1 << 63, 0x20_00e7, 0x20_00a7, 0x20_00e5, 0][pick(9)]
        }
        if table != 3, chance(50) {
            // The frame stays: U, A, D or NX changes.
            entry = try guest.guestEntry(table, index) ^ [4, 0x20, 0x40, 1 << 63][pick(4)]
        }
        let cpu = pick(2)
        guest.mmu.state(of: guest.cpus[cpu]).isUser = true
        let place = address(Self.window * 64 + table) | UInt64(index) * 8
        for i in 0..<2 {
            for e in 0..<Self.entries where e != Self.window {
                if table != 3 { stale[i].insert(e * 64 + index) }
                if table == 3, e == index { for p in 0..<64 { stale[i].insert(e * 64 + p) } }
            }
        }
        let result = guest.cpus[cpu].access(.store(entry), at: place)
        did = "cpu \(cpu) writes \(String(entry, radix: 16)) to \(table)[\(index)]: \(result)"
        guard guest.vm.activeSlots.count == 1 else { return }
        if result != .stored && result != .emulated { fail() }
        if try guest.guestEntry(table, index) != entry { fail() }
        if isLogged { written.insert(table) }
    }

    private func flushPage() {
        let cpu = pick(2)
        let page = stale[cpu].randomElement(using: &random) ?? pick(64)
        guest.cpus[cpu].flush(address(page))
        stale[cpu].remove(page)
        did = "cpu \(cpu) flushes \(String(address(page), radix: 16))"
    }

    private func flushAll() {
        let cpu = pick(2)
        guest.cpus[cpu].flushAll()
        stale[cpu] = []
        did = "cpu \(cpu) flushes all"
    }

    private func loadRoot() {
        let cpu = pick(2)
        let root: UInt64 = chance(50) ? 0x1000 : 0xe000
        guest.mmu.load(.longMode(root: GuestAddress(root)), on: guest.cpus[cpu])
        stale[cpu] = []
        did = "cpu \(cpu) loads CR3 \(String(root, radix: 16))"
    }

    private func dataRange() -> Range<Int> {
        let first = chance(50) ? 16 + pick(44) : 512 + pick(500)
        return first..<first + 1 + pick(4)
    }

    private func discard() throws {
        let range = chance(10) ? 512..<1024 : dataRange()
        did = "discard \(range)"
        try guest.space.advise(pages(range), .dontNeed)
    }

    private func protect() throws {
        let range = dataRange()
        let on = chance(50)
        did = "protect \(range) \(on)"
        try guest.space.protect(pages(range), on ? .read : .readWrite)
        if on { readOnly.formUnion(range) } else { readOnly.subtract(range) }
    }

    private func forkOrEnd() throws {
        did = "fork or its end"
        if let child {
            child.exit()
            self.child = nil
        } else {
            child = try guest.space.fork()
        }
    }

    private func collapse() throws {
        did = "collapse"
        do { try guest.space.advise(pages(512..<1024), .collapse) } catch {
            // Protected parts, or nothing there: no collapse then.
        }
    }

    private func replaceSlot() throws {
        did = "slot replaced"
        try guest.vm.setMemoryRegion(
            MemoryRegion(slot: 0, guestAddress: GuestAddress(0), size: 0, userAddress: at(0)))
        written = []
        if chance(50) { try access() }
        #expect(guest.mmu.checkTables() == [])
        isLogged = false
        try guest.setSlot()
    }

    private func log() throws {
        guard isLogged, chance(70) else {
            isLogged.toggle()
            did = "log \(isLogged)"
            try guest.setSlot(log: isLogged)
            written = []
            return
        }
        did = "harvest"
        let bitmap = try guest.vm.getDirtyLog(slot: 0)
        for frame in written where bitmap[frame / 64] >> UInt64(frame % 64) & 1 == 0 { fail() }
        written = []
    }
}
