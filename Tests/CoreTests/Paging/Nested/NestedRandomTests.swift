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
    @Test(
        arguments: [
            HypervisorFormat.ept(accessDirty: true), .ept(accessDirty: false), .old(.twoLevels, levels: 4),
            .old(.twoLevels, levels: 5), .old(.extended, levels: 4), .old(.extended, levels: 5),
        ], [1, 2, 3] as [UInt64])
    func `every access ends as the hypervisor's tables say`(_ format: HypervisorFormat, _ seed: UInt64) throws {
        let run = try RandomHypervisor(seed, format)
        for step in 0..<600 {
            try run.step()
            try #require(!run.failed, "\(format), seed \(seed), step \(step): \(run.did)")
            guard step % 8 == 0 else { continue }
            let findings = run.guest.mmu.checkTables()
            try #require(findings == [], "\(format), seed \(seed), step \(step): \(run.did)")
        }
        #expect(run.checked > 100)
    }
}

private final class RandomHypervisor {
    let guest: NestedGuest
    private var random: SplitMix
    private let format: HypervisorFormat
    private(set) var did = ""
    private(set) var failed = false
    private(set) var checked = 0
    /// By vCPU: tables have changed since it last said so: INVEPT, or an entry with NPT.
    private var isStale = [false, false]
    private var isLogged = false
    private var written: Set<Int> = []
    private var focus = 0

    init(_ seed: UInt64, _ format: HypervisorFormat) throws {
        random = SplitMix(seed: seed)
        self.format = format
        guest = try NestedGuest(cpus: 2) { format.configure(&$0) }
        try format.makeTables(guest)
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

    private func access() throws {
        let cpu = guest.cpus[pick(2)]
        try enter(cpu)
        let page = chance(50) ? focus : pick(32)
        let place = format.address(page, elsewhere: chance(25)) | UInt64(pick(512)) * 8
        let value = chance(20) ? format.randomEntries(&random) : random.next()
        let kind = [AccessKind.read, .write, .execute][pick(3)]
        let what: PagedAccess = [.load, .store(value), .fetch][Int(kind.rawValue)]
        let expected = try format.walk(guest, place, kind)
        // A table is only read, or what stands there would be anything.
        if case .page(let frame) = expected, kind == .write, frame < 16 { return try storeIntoTable(cpu, place, frame) }
        let result = cpu.access(what, at: place)
        did = "vcpu \(cpu.number) \(what) at \(String(place, radix: 16)): \(result), expected \(expected)"
        if case .stored = result, case .page(let frame) = expected, isLogged, !isStale[cpu.number] {
            written.insert(frame)
        }
        guard !isStale[cpu.number] else { return }
        checked += 1
        switch expected {
        case .exit(let exit): if result != .nestedExit(exit) { failed = true }
        case .page(let frame) where frame >= 64:
            if result != .mmio { failed = true }
        case .page(let frame):
            let content = try guest.space.load(at(frame) + place & 4095)
            switch result {
            // The walk may set A and D in the very word that was read.
            case .value(let seen): if seen | format.flags != content | format.flags { failed = true }
            case .stored: if content != value { failed = true }
            default: failed = true
            }
        }
    }

    /// With NPT each entry brings the tables up to date; often it goes on as it is.
    private func enter(_ cpu: NestedCPU) throws {
        if !format.isEPT {
            if guest.mmu.runsNested(cpu), chance(80) { return }
            isStale[cpu.number] = false
        }
        try format.enter(guest.mmu, cpu)
    }

    /// The nested guest writes one of its hypervisor's tables: nothing is certain until that says INVEPT.
    private func storeIntoTable(_ cpu: NestedCPU, _ place: UInt64, _ frame: Int) throws {
        guard frame == 4 || frame == 5 else { return }
        let entry = format.randomEntries(&random)
        let result = cpu.access(.store(entry), at: place & ~0xfff | UInt64(pick(16)) * 8)
        did = "vcpu \(cpu.number) writes \(String(entry, radix: 16)) into table \(frame): \(result)"
        isStale = [true, true]
        if isLogged, !isStale[cpu.number] { written.insert(frame) }
    }

    private func rewrite() throws {
        let cpu = guest.cpus[pick(2)]
        guest.mmu.leaveNested(cpu)
        let (table, word): (Int, Int)
        let entries: UInt64
        switch pick(100) {
        case 0..<22:
            (table, word) = (3, pick(2))
            entries = format.randomLinks(&random)
            focus = word * 16 + pick(16)
        case 22..<30 where format.hasPointers:
            (table, word) = (1, pick(2))
            entries = format.randomPointer(&random)
        default:
            (table, word) = (4 + pick(2), pick(16))
            entries = format.randomEntries(&random)
            focus = (table - 4) * 16 + (format.isNarrow ? word * 2 % 16 : word)
        }
        let result = cpu.access(.store(entries), at: NestedGuest.place(table, word))
        did = "hypervisor on vcpu \(cpu.number) writes \(String(entries, radix: 16)) to \(table)[\(word)]: \(result)"
        if result != .stored && result != .emulated { failed = true }
        if try guest.entry(table, word) != entries { failed = true }
        if isLogged { written.insert(table) }
        isStale = [true, true]
        if chance(70) {
            for number in 0..<2 { try invalidate(number) }
        }
    }

    private func invalidate(_ number: Int) throws {
        let cpu = guest.cpus[number]
        guest.mmu.leaveNested(cpu)
        guard format.isEPT else { return }
        guest.mmu.invalidateEPT(chance(50) ? format.pointer : nil, cpu)
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
