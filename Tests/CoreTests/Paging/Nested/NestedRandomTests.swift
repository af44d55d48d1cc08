import Audit
import Frames
import HostMemory
import SeededRandom
import Testing

@testable import GuestMemory
@testable import Machine
@testable import Paging

/// A hypervisor that rewrites its tables, with any bytes, on two vCPUs that run its guest, while its host takes pages away,
/// logs and ages. An oracle walks the tables as the manual says; what is stale since the last INVEPT it lets pass.
@Suite struct X86_4_10_RandomHypervisors {
    @Test(arguments: [1, 2, 3, 4, 5, 6] as [UInt64])
    func `every access ends as the hypervisor's tables say`(_ seed: UInt64) throws {
        let run = try RandomHypervisor(seed, accessDirty: seed % 2 == 0)
        for step in 0..<600 {
            try run.step()
            try #require(!run.failed, "seed \(seed), step \(step): \(run.did)")
            guard step % 8 == 0 else { continue }
            let findings = run.guest.mmu.checkTables()
            try #require(findings == [], "seed \(seed), step \(step): \(run.did)")
        }
        #expect(run.checked > 100)
    }
}

private final class RandomHypervisor {
    let guest: NestedGuest
    private var random: SplitMix
    private let pointer: UInt64
    private(set) var did = ""
    private(set) var failed = false
    private(set) var checked = 0
    /// By vCPU: tables have changed since it last said INVEPT.
    private var isStale = [false, false]
    private var isLogged = false
    private var written: Set<Int> = []
    private var focus = 0

    /// Frames 4 and 5 are lowest tables, of 16 entries each.
    init(_ seed: UInt64, accessDirty: Bool) throws {
        random = SplitMix(seed: seed)
        guest = try NestedGuest(cpus: 2)
        try guest.makeTables(count: 16)
        try guest.write(3, 1, 0x5000 | NestedGuest.table)
        for i in 0..<16 { try guest.write(5, i, NestedGuest.leaf(16 + i)) }
        pointer = accessDirty ? NestedGuest.pointer : NestedGuest.pointerWithoutAD
    }

    private func pick(_ count: Int) -> Int { Int(random.next() % UInt64(count)) }
    private func chance(_ percent: Int) -> Bool { pick(100) < percent }

    func step() throws {
        switch pick(100) {
        case 0..<55: try access()
        case 55..<73: try rewrite()
        case 73..<81: try invalidate(pick(2))
        case 81..<87: try guest.space.advise(pages(somewhere()), .dontNeed)
        case 87..<90: _ = guest.isYoung(UInt64(16 + pick(32)), clearing: true)
        case 90..<92: try leave(pick(2))
        default: try log()
        }
    }

    /// Never the tables, whose loss would be the hypervisor's.
    private func somewhere() -> Range<Int> {
        let first = 16 + pick(32)
        return first..<first + 1 + pick(3)
    }

    private func address(_ page: Int) -> UInt64 { UInt64(page / 16) << 21 | UInt64(page % 16) << 12 }

    private enum Expected {
        case page(Int)
        case violation(UInt64)
        case misconfiguration
    }

    /// What the manual says of an access that needs `rights`.
    private func walk(_ address: UInt64, _ needed: UInt64) throws -> Expected {
        var table = 1
        var rights: UInt64 = 7
        for level in [UInt64(4), 3, 2, 1] {
            let entry = try guest.entry(table, Int(address >> (12 + 9 * (level - 1)) & 511))
            rights &= entry
            guard entry & 7 != 0 else { return .violation(0) }
            let isBad = entry & 3 == 2 || entry >> 46 & 0x3f != 0
            if isBad { return .misconfiguration }
            table = Int(entry >> 12 & 0x3_ffff_ffff)
            if level == 1 {
                if [2, 3, 7].contains(entry >> 3 & 7) { return .misconfiguration }
            } else if entry & 0xf8 != 0 {
                return .misconfiguration
            }
        }
        return rights & needed == needed ? .page(table) : .violation(rights)
    }

    private func access() throws {
        let cpu = guest.cpus[pick(2)]
        try guest.enter(pointer, cpu)
        let page = chance(50) ? focus : pick(32)
        let place = address(page) | UInt64(pick(512)) * 8
        let value = chance(20) ? randomEntry() : random.next()
        let kind = pick(3)
        let what: PagedAccess = [.load, .store(value), .fetch][kind]
        let expected = try walk(place, [1, 2, 4][kind])
        // A table is only read, or what stands there would be anything.
        if case .page(let frame) = expected, kind == 1, frame < 16 { return try storeIntoTable(cpu, place, frame) }
        let result = cpu.access(what, at: place)
        did = "vcpu \(cpu.number) \(what) at \(String(place, radix: 16)): \(result), expected \(expected)"
        if case .stored = result, case .page(let frame) = expected, isLogged, !isStale[cpu.number] {
            written.insert(frame)
        }
        guard !isStale[cpu.number] else { return }
        checked += 1
        switch expected {
        case .violation(let rights):
            let exit = NestedExit.violation(
                GuestAddress(place), qualification: 0x180 | rights << 3 | [1, 2, 4][kind])
            if result != .nestedExit(exit) { failed = true }
        case .misconfiguration:
            if result != .nestedExit(.misconfiguration(GuestAddress(place))) { failed = true }
        case .page(let frame) where frame >= 64:
            if result != .mmio { failed = true }
        case .page(let frame):
            let content = try guest.space.load(at(frame) + place & 4095)
            switch result {
            // The walk may set A and D in the very word that was read.
            case .value(let seen): if seen | 0x300 != content | 0x300 { failed = true }
            case .stored: if content != value { failed = true }
            default: failed = true
            }
        }
    }

    /// The nested guest writes one of its hypervisor's tables: nothing is certain until that says INVEPT.
    private func storeIntoTable(_ cpu: NestedCPU, _ place: UInt64, _ frame: Int) throws {
        guard frame == 4 || frame == 5 else { return }
        let entry = randomEntry()
        let result = cpu.access(.store(entry), at: place & ~0xfff | UInt64(pick(16)) * 8)
        did = "vcpu \(cpu.number) writes \(String(entry, radix: 16)) into table \(frame): \(result)"
        isStale = [true, true]
        if isLogged, !isStale[cpu.number] { written.insert(frame) }
    }

    private func randomEntry() -> UInt64 {
        let rights = [7, 7, 7, 5, 1, 3, 4, 0, 2, 6][pick(10)]
        let type = chance(90) ? 6 : UInt64(pick(8))
        let frame = chance(85) ? 16 + pick(32) : [4, 5, 3, 200][pick(4)]
        let flags = [UInt64(0x300), 0x100, 0][pick(3)]
        let high: UInt64 = chance(95) ? 0 : 1 << UInt64(46 + pick(6))
        return UInt64(frame) << 12 | UInt64(rights) | type << 3 | flags | high
    }

    private func rewrite() throws {
        let cpu = guest.cpus[pick(2)]
        guest.mmu.leaveNested(cpu)
        let isHigh = chance(25)
        let table = isHigh ? 3 : 4 + pick(2)
        let index = isHigh ? pick(2) : pick(16)
        let links: [UInt64] = [0x4007, 0x5007, 0x4005, 0x5003, 0, 0x4087, 0x4002]
        let entry = isHigh ? links[pick(links.count)] : randomEntry()
        focus = isHigh ? index * 16 + pick(16) : (table - 4) * 16 + index
        let result = cpu.access(.store(entry), at: NestedGuest.place(table, index))
        did = "hypervisor on vcpu \(cpu.number) writes \(String(entry, radix: 16)) to \(table)[\(index)]: \(result)"
        if result != .stored && result != .emulated { failed = true }
        if try guest.entry(table, index) != entry { failed = true }
        if isLogged { written.insert(table) }
        isStale = [true, true]
        if chance(70) {
            for number in 0..<2 { try invalidate(number) }
        }
    }

    private func invalidate(_ number: Int) throws {
        let cpu = guest.cpus[number]
        guest.mmu.leaveNested(cpu)
        guest.mmu.invalidateEPT(chance(50) ? pointer : nil, cpu)
        isStale[number] = false
        did = "vcpu \(number): INVEPT"
    }

    private func leave(_ number: Int) throws {
        guest.mmu.leaveNested(guest.cpus[number])
        did = "vcpu \(number) leaves"
    }

    private func log() throws {
        guard isLogged else {
            isLogged = true
            written = []
            return try guest.setSlot(log: true)
        }
        let log = try guest.vm.getDirtyLog(slot: 0)[0]
        did = "log \(String(log, radix: 16)), written \(written.sorted())"
        if written.contains(where: { log >> UInt64($0) & 1 == 0 }) { failed = true }
        written = []
        guard chance(40) else { return }
        isLogged = false
        try guest.setSlot(log: false)
    }
}
