import CBenchmarkLimits
import Frames
import GuestMemory
import Machine
import SeededRandom

/// What is measured of x86's MMUs.
public enum X86Operation: String, Sendable, CaseIterable, Codable {
    case warmFault = "fault, warm tables"
    case coldFault = "fault, cold tables"
    case split = "eager split, per 4 KiB entry"
    case writeProtect = "write-protect, per entry"
    case clearDirty = "clear dirty, per entry"
    case oneCPU = "faults of one vCPU"
    case twoCPUs = "faults of two vCPUs, two cores"
    case shadowFault = "shadow MMU: fault, warm tables"

    /// What the limit row does for each.
    public var limit: String {
        switch self {
        case .warmFault, .coldFault, .oneCPU, .twoCPUs: "the same atomics, the same memory"
        case .split: "plain stores, table not linked"
        case .writeProtect, .clearDirty: "lock and"
        case .shadowFault: "none"
        }
    }
}

/// One line of the table, in nanoseconds for each fault or entry.
public struct X86Row: Sendable, Codable {
    public var operation: X86Operation
    public var nanoseconds: Double
    /// Nil: there is none.
    public var limit: Double?
    public var ratioToLimit: Double? { limit.map { nanoseconds / $0 } }
}

public struct X86Report: Sendable, Codable {
    public var warmPages: Int
    public var coldPages: Int
    public var parallelPages: Int
    public var rounds: Int
    public var seed: UInt64
    public var rows: [X86Row]
    /// Nil: this machine can't be stepped.
    public var anatomy: FaultAnatomy?

    /// Throughput of two vCPUs to that of one, best of all rounds.
    public var parallelSpeedup: Double? { speedup(\.nanoseconds) }
    /// What this machine's two processors gave the limit's two threads meanwhile.
    public var limitSpeedup: Double? { speedup { $0.limit ?? .nan } }

    private func speedup(_ time: (X86Row) -> Double) -> Double? {
        guard let one = row(.oneCPU), let two = row(.twoCPUs) else { return nil }
        return time(one) / time(two)
    }

    public func row(_ operation: X86Operation) -> X86Row? { rows.first { $0.operation == operation } }
}

/// Faults, splits and dirty logging of x86's MMUs, each beside the least that the machine could have done.
public struct X86Benchmark: Sendable {
    public var rounds: Int
    public var seed: UInt64
    /// Pages of each guest.
    public var warmPages: Int
    public var coldPages: Int
    public var parallelPages: Int
    public var splitPages: Int

    public init(quick: Bool, coldGiB: Int = 32, rounds: Int, seed: UInt64) {
        self.rounds = quick ? 1 : rounds
        self.seed = seed
        warmPages = quick ? 512 : 2048
        coldPages = quick ? 1 << 12 : coldGiB << 18
        parallelPages = quick ? 1 << 12 : 1 << 13
        splitPages = quick ? 1 << 14 : 1 << 21
    }

    /// Words of the thread's own that a fault raises by a locked addition and lowers by a store: the slots' section, the
    /// tables' (twice), mmu_lock.
    static let sections = 4
    private static let splitPasses = 5

    public func run(progress: (String) -> Void) throws(BenchmarkError) -> X86Report {
        var samples = X86Samples()
        progress(X86Operation.warmFault.rawValue)
        let anatomy = try measureFaults(.warmFault, warmPages, passes: max(1, (1 << 19) / warmPages), &samples)
        progress(X86Operation.coldFault.rawValue)
        _ = try measureFaults(.coldFault, coldPages, passes: 1, &samples)
        progress(X86Operation.split.rawValue)
        try measureSplit(&samples)
        progress(X86Operation.twoCPUs.rawValue)
        try measureParallel(&samples)
        progress(X86Operation.shadowFault.rawValue)
        try measureShadow(&samples)
        progress("dirty logging")
        let logging = try MemoryBenchmark(guestBytes: UInt64(splitPages) << 12, rounds: rounds, seed: seed)
            .run4KPrecise()
        var rows = X86Operation.allCases.compactMap { samples.row($0) }
        for (operation, memory) in [(X86Operation.writeProtect, Operation.writeProtect), (.clearDirty, .clearDirty)] {
            guard let found = logging.rows.first(where: { $0.operation == memory }) else { continue }
            rows.append(X86Row(operation: operation, nanoseconds: found.nanoseconds, limit: found.limit))
        }
        return X86Report(
            warmPages: warmPages, coldPages: coldPages, parallelPages: parallelPages, rounds: rounds, seed: seed,
            rows: rows, anatomy: anatomy)
    }

    private func machine(
        _ pages: Int, blockOrder: Int = 0, virtualCPUs: Int = 1
    ) throws(BenchmarkError) -> BenchmarkMachine {
        guard
            let machine = BenchmarkMachine(
                pages: pages, policy: .precise, blockOrder: blockOrder, seed: seed, virtualCPUs: virtualCPUs,
                hugePages: true)
        else { throw .noMemory("a guest of \(pages >> 8) MiB") }
        return machine
    }

    private func shuffled(_ pages: Int) -> [UInt32] {
        var random = SplitMix(seed: seed &+ 1)
        return (0..<UInt32(pages)).shuffled(using: &random)
    }

    private func expect(
        _ operation: X86Operation, _ found: Int, _ wanted: Int
    ) throws(BenchmarkError) {
        if found != wanted { throw .wrongResult("\(operation.rawValue) left \(found) where \(wanted) was right") }
    }

    /// Runs `pass`, which gives its time in nanoseconds, `passes` times a round, the first round untold. A round's time is
    /// that of its best pass: a pass is short, and what else runs on the machine can only make it longer.
    /// - Parameter count: faults or entries of a pass.
    private func keepBest<E>(
        _ operation: X86Operation, isLimit: Bool = false, passes: Int, each count: Int, _ samples: inout X86Samples,
        _ pass: () throws(E) -> Double
    ) throws(E) {
        for round in 0..<rounds + 1 {
            var best = Double.infinity
            for _ in 0..<passes { best = min(best, try pass()) }
            if round > 0 { samples.keep(operation, best / Double(count), isLimit: isLimit) }
        }
    }

    // MARK: Faults

    /// All pages are faulted in once, so that the tables are there, and zapped from the guest's tables alone. Each pass
    /// faults them in again, in random order, and zaps them untimed.
    private func measureFaults(
        _ operation: X86Operation, _ pages: Int, passes: Int, _ samples: inout X86Samples
    ) throws(BenchmarkError) -> FaultAnatomy? {
        let machine = try machine(pages, virtualCPUs: 2)
        let order = shuffled(pages)
        try expect(operation, order.withUnsafeBufferPointer { machine.fault($0) }, pages)
        machine.zapAll()
        try keepBest(operation, passes: passes, each: pages, &samples) { () throws(BenchmarkError) in
            let run = time { order.withUnsafeBufferPointer { machine.fault($0) } }
            try expect(operation, run.result, pages)
            machine.zapAll()
            return run.nanoseconds
        }
        try measureFaultLimit(operation, order, passes: passes, &samples)
        return machine.anatomy()
    }

    private func measureFaultLimit(
        _ operation: X86Operation, _ order: [UInt32], passes: Int, _ samples: inout X86Samples
    ) throws(BenchmarkError) {
        let limit = try FaultLimit(pages: order.count, seed: seed)
        try keepBest(operation, isLimit: true, passes: passes, each: order.count, &samples) {
            () throws(BenchmarkError) in
            limit.zapAll()
            let run = time { order.withUnsafeBufferPointer { limit.faults($0) } }
            try expect(operation, run.result, order.count)
            return run.nanoseconds
        }
    }

    /// Each pass faults in what is not mapped ahead of use, and zaps it untimed.
    private func measureShadow(_ samples: inout X86Samples) throws(BenchmarkError) {
        let machine = try ShadowBenchmarkMachine()
        let faults = ShadowBenchmarkMachine.faults
        let passes = max(1, warmPages * 8 / faults)
        try keepBest(.shadowFault, passes: passes, each: faults, &samples) { () throws(BenchmarkError) in
            let run = time { machine.faultAll() }
            try expect(.shadowFault, run.result, faults)
            machine.zapAll()
            return run.nanoseconds
        }
    }

    // MARK: Splits

    /// A guest of 2 MiB leaves is split by turning the log on; what the log does to the entries then is not timed. The
    /// limit's tables are written and cleared in turn with the MMU's, so that each finds the other's in the caches.
    private func measureSplit(_ samples: inout X86Samples) throws(BenchmarkError) {
        let machine = try machine(splitPages, blockOrder: 9)
        guard let tables = MappedArena(size: splitPages * 8, hugePages: true) else { throw .noMemory("tables") }
        let words = tables.base.bindMemory(to: UInt64.self, capacity: splitPages)
        let order = stride(from: UInt32(0), to: UInt32(splitPages), by: 512).map { $0 }
        for round in 0..<rounds + 1 {
            var best = Double.infinity
            var bestLimit = Double.infinity
            for _ in 0..<Self.splitPasses {
                limit_and(words, splitPages, 0)
                try expect(.split, order.withUnsafeBufferPointer { machine.fault($0) }, splitPages / 512)
                try expect(.split, machine.leaves2M, splitPages / 512)
                let run = time { machine.mmu.splitHugeLeaves(of: machine.slot) }
                guard run.result else { throw .noMemory("the tables of a split") }
                try expect(.split, machine.leaves4K, splitPages)
                machine.endTables()
                best = min(best, run.nanoseconds)
                bestLimit = min(bestLimit, time { limit_split(words, splitPages, 0x8600_0000_0000_0b77) }.nanoseconds)
            }
            if round > 0 {
                samples.keep(.split, best / Double(splitPages))
                samples.keep(.split, bestLimit / Double(splitPages), isLimit: true)
            }
        }
    }

    // MARK: Two vCPUs

    /// Each vCPU has one half of the guest. The best of all rounds: what else runs on the machine can only make it worse.
    /// The limit's threads run between the vCPUs', so that both have the same machine.
    private func measureParallel(_ samples: inout X86Samples) throws(BenchmarkError) {
        let machine = try machine(parallelPages, virtualCPUs: 2)
        let limit = try FaultLimit(pages: parallelPages, seed: seed)
        let order = [UInt32](0..<UInt32(parallelPages))
        var best: [X86Operation: Double] = [:]
        var bestLimit: [X86Operation: Double] = [:]
        for round in 0..<(rounds == 1 ? 3 : 100 * rounds) {
            try order.withUnsafeBufferPointer { (order) throws(BenchmarkError) in
                let half = order.count / 2
                let halves = [
                    UnsafeBufferPointer(rebasing: order[..<half]), UnsafeBufferPointer(rebasing: order[half...]),
                ]
                for (operation, parts) in [(X86Operation.oneCPU, [order]), (.twoCPUs, halves)] {
                    let run = machine.faultInParallel(parts)
                    machine.zapAll()
                    try expect(operation, run.count, order.count)
                    limit.zapAll()
                    let least = limit.faultInParallel(parts)
                    try expect(operation, least.count, order.count)
                    // The first round only warms up.
                    guard round > 0 else { continue }
                    best[operation] = min(best[operation] ?? .infinity, run.nanoseconds)
                    bestLimit[operation] = min(bestLimit[operation] ?? .infinity, least.nanoseconds)
                }
            }
        }
        for (operation, time) in best { samples.keep(operation, time / Double(parallelPages)) }
        for (operation, time) in bestLimit { samples.keep(operation, time / Double(parallelPages), isLimit: true) }
    }
}

/// Times by operation, in nanoseconds for each fault or entry.
struct X86Samples {
    private var values: [(operation: X86Operation, isLimit: Bool, nanoseconds: Double)] = []

    mutating func keep(_ operation: X86Operation, _ nanoseconds: Double, isLimit: Bool = false) {
        values.append((operation, isLimit, nanoseconds))
    }

    private func median(_ operation: X86Operation, isLimit: Bool) -> Double? {
        let found = values.filter { $0.operation == operation && $0.isLimit == isLimit }.map(\.nanoseconds)
        return found.isEmpty ? nil : middle(of: found)
    }

    /// Medians; nil: not measured.
    func row(_ operation: X86Operation) -> X86Row? {
        median(operation, isLimit: false).map {
            X86Row(operation: operation, nanoseconds: $0, limit: median(operation, isLimit: true))
        }
    }
}
