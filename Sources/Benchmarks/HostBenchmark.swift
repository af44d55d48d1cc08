import CBenchmarkLimits
import Frames
import HostMemory
import Machine
import SeededRandom

/// What is measured of the host.
public enum HostOperation: String, Sendable, CaseIterable, Codable {
    case getSamePage = "get a page, always the same"
    case getRandomPage = "get a page, any of them"
    case faultZero = "first store to a page, memory fresh"
    case faultCleared = "first store to a page, to be cleared"
    case getUserPagesFault = "first get of a page, to be cleared"
    case fork = "fork"
    case exit = "exit of the child"
    case reclaim = "reclaim, all to swap"
    case swapIn = "first load of a page that is swapped"

    /// What the limit row does for each page.
    public var limit: String {
        switch self {
        case .getSamePage, .getRandomPage: "4 loads one after another, lock cmpxchg, load again, lock sub"
        case .faultZero: "a store each to page frame, entry and page"
        case .faultCleared, .getUserPagesFault: "4 KiB cleared (rep stosq)"
        case .fork: "load, lock add on the page frame, lock and, store"
        case .exit: "xchg, lock sub on the page frame"
        case .reclaim, .swapIn: "4 KiB copied (rep movsb)"
        }
    }

    /// Whether the table shows the time for the whole address space, in milliseconds; else for one page.
    public var isWhole: Bool { self == .fork || self == .exit || self == .reclaim }
}

/// One line of the table: medians over the rounds, in nanoseconds for each page.
public struct HostRow: Sendable, Codable {
    public var operation: HostOperation
    public var nanoseconds: Double
    /// The bare memory traffic that it needs, in C, in the same run.
    public var limit: Double
    public var ratioToLimit: Double
}

/// What a host holds, in bytes, when one address space has all its pages.
public struct HostFootprint: Sendable, Codable {
    public var modelled: Int
    /// 64 bytes for each page.
    public var pageFrames: Int
    /// The modelled process's own page tables: Linux has the same.
    public var pageTables: Int
    /// The model's objects.
    public var objects: Int
    /// All but the page frames, in percent of the modelled memory.
    public var percentBesides: Double { Double(pageTables + objects) * 100 / Double(modelled) }
}

/// The start of a large host: its memory, its address space with one page, the first store.
public struct HostStart: Sendable, Codable {
    public var bytes: Int
    public var milliseconds: Double
    /// The two stretches mapped, and one word of each written: what Linux needs for it.
    public var limit: Double
    /// What the process holds more than before. Nil: this machine doesn't tell.
    public var residentBytes: Int?
}

public struct HostReport: Sendable, Codable {
    public var bytes: Int
    public var rounds: Int
    public var seed: UInt64
    public var rows: [HostRow]
    public var start: HostStart
    public var footprint: HostFootprint
}

/// The host's memory operations.
public struct HostBenchmark: Sendable {
    public var pages: Int
    public var rounds: Int
    public var seed: UInt64
    /// - Parameter bytes: of the address space; at most 1 GiB.
    public init(bytes: Int, rounds: Int, seed: UInt64) {
        precondition(bytes > 0 && bytes <= 1 << 30)
        pages = bytes >> 12
        self.rounds = rounds
        self.seed = seed
    }

    static let largeHost = 256 << 30

    /// - Parameter progress: told what comes next.
    public func run(progress: (String) -> Void) throws(BenchmarkError) -> HostReport {
        var samples = HostSamples()
        progress("the start of a large host")
        let start = try measureStart()
        progress("faults on fresh memory")
        for round in 0..<rounds + 1 { try measureFreshFaults(counts: round > 0, &samples) }
        progress("faults on used memory")
        try measureUsedFaults(&samples)
        progress("lookups and forks")
        let footprint = try measureSharing(&samples)
        progress("reclaim")
        try measureReclaim(&samples)
        progress("the limits")
        try measureLimits(&samples)
        var rows: [HostRow] = []
        for operation in HostOperation.allCases {
            let time = samples.median(operation, isLimit: false)
            let limit = samples.median(operation, isLimit: true)
            rows.append(
                HostRow(operation: operation, nanoseconds: time, limit: limit, ratioToLimit: time / limit))
        }
        return HostReport(
            bytes: pages << 12, rounds: rounds, seed: seed, rows: rows, start: start, footprint: footprint)
    }

    private func measureStart() throws(BenchmarkError) -> HostStart {
        var times: [Double] = []
        var limits: [Double] = []
        var resident: Int?
        // The first round warms up; what it takes stays in the process, so it is the one that shows it.
        for round in 0..<rounds + 1 {
            let limit = try time { () throws(BenchmarkError) in
                let maps = try HostBenchmarkMachine.mappings(Self.largeHost)
                maps.arena.base.storeBytes(of: 1, as: UInt64.self)
                maps.pageFrames.base.storeBytes(of: 1, as: UInt64.self)
                return maps
            }.milliseconds
            let before = limit_resident_bytes()
            let started = try time { () throws(BenchmarkError) in
                try HostBenchmarkMachine(ram: Self.largeHost, pages: 1, commits: false)
            }
            let after = limit_resident_bytes()
            if before > 0 { resident = max(resident ?? 0, after - before) }
            if round > 0 {
                times.append(started.milliseconds)
                limits.append(limit)
            }
            withExtendedLifetime(started.result) {}
        }
        return HostStart(
            bytes: Self.largeHost, milliseconds: times.sorted()[rounds / 2], limit: limits.sorted()[rounds / 2],
            residentBytes: resident)
    }

    /// Each round on memory that nobody has used, as the allocator sees it; this machine's own memory is there already.
    private func measureFreshFaults(counts: Bool, _ samples: inout HostSamples) throws(BenchmarkError) {
        let machine = try HostBenchmarkMachine(pages: pages)
        samples.keep(.faultZero, counts, pages, try machine.storeAll())
    }

    private func measureUsedFaults(_ samples: inout HostSamples) throws(BenchmarkError) {
        let machine = try HostBenchmarkMachine(pages: pages, arenaIsZero: false)
        for round in 0..<rounds + 1 {
            samples.keep(.faultCleared, round > 0, pages, try machine.storeAll())
            try machine.unmapAndMap()
            samples.keep(.getUserPagesFault, round > 0, pages, try machine.getAll())
            try machine.unmapAndMap()
        }
    }

    /// A host whose process has all its pages, and what it holds.
    private func fill(
        _ random: inout SplitMix
    ) throws(BenchmarkError) -> (machine: HostBenchmarkMachine, footprint: HostFootprint) {
        limit_empty_caches()
        defer { limit_fill_caches() }
        let machine = try HostBenchmarkMachine(pages: pages)
        let heap = limit_heap_bytes()
        try machine.fill(shuffledBy: &random)
        let grown = max(0, limit_heap_bytes() - heap)
        return (machine, machine.footprint(objects: grown + machine.objectsAtStart))
    }

    private func measureSharing(_ samples: inout HostSamples) throws(BenchmarkError) -> HostFootprint {
        var random = SplitMix(seed: seed)
        let (machine, footprint) = try fill(&random)
        let order = (0..<UInt32(pages)).shuffled(using: &random)
        let same = [UInt32](repeating: order[0], count: pages)
        for round in 0..<rounds + 1 {
            samples.keep(.getSamePage, round > 0, pages, try machine.get(same))
            samples.keep(.getRandomPage, round > 0, pages, try machine.get(order))
            let times = try machine.forkAndExit()
            samples.keep(.fork, round > 0, pages, times.fork)
            samples.keep(.exit, round > 0, pages, times.exit)
        }
        return footprint
    }
}

extension HostBenchmark {
    /// Each round: every page is stored to, aged and written out, and read back in. The device's memory is there from the
    /// round that warms up on.
    private func measureReclaim(_ samples: inout HostSamples) throws(BenchmarkError) {
        let machine = try HostBenchmarkMachine(pages: pages, swaps: true)
        for round in 0..<rounds + 1 {
            _ = try machine.storeAll()
            samples.keep(.reclaim, round > 0, pages, try machine.reclaimAll())
            samples.keep(.swapIn, round > 0, pages, try machine.loadAll())
        }
    }
}

/// Runs `body`; its time in nanoseconds.
func time<R, E: Error>(_ body: () throws(E) -> R) throws(E) -> (result: R, nanoseconds: Double, milliseconds: Double) {
    let start = ContinuousClock.now
    let result = try body()
    let (seconds, attoseconds) = (ContinuousClock.now - start).components
    let nanoseconds = Double(seconds) * 1e9 + Double(attoseconds) / 1e9
    return (result, nanoseconds, nanoseconds / 1e6)
}

/// Times by operation, in nanoseconds for each page.
struct HostSamples {
    private var values: [(operation: HostOperation, isLimit: Bool, nanoseconds: Double)] = []

    /// - Parameter counts: false in the round that warms up.
    mutating func keep(
        _ operation: HostOperation, _ counts: Bool, _ pages: Int, _ nanoseconds: Double, isLimit: Bool = false
    ) {
        if counts { values.append((operation, isLimit, nanoseconds / Double(pages))) }
    }

    func median(_ operation: HostOperation, isLimit: Bool) -> Double {
        middle(of: values.filter { $0.operation == operation && $0.isLimit == isLimit }.map(\.nanoseconds))
    }
}

/// The median; NaN of nothing.
func middle(of values: [Double]) -> Double {
    let sorted = values.sorted()
    return sorted.isEmpty ? .nan : sorted[sorted.count / 2]
}
