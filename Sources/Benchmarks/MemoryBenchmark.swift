import CBenchmarkLimits
import Frames
import GuestMemory

/// What is measured.
public enum Operation: String, Sendable, CaseIterable, Codable {
    case coldFaults = "cold faults"
    case zap = "zap all"
    case clearDirty = "clear dirty"
    case writeProtect = "write-protect"
    case collapse = "collapse to 2 MiB"

    /// The instruction that the limit row repeats.
    var instruction: String {
        switch self {
        case .coldFaults: "lock cmpxchg"
        case .zap, .collapse: "xchg"
        case .clearDirty, .writeProtect: "lock and"
        }
    }
}

/// One line of the table: medians over the rounds, in nanoseconds for each 4 KiB entry.
public struct BenchmarkRow: Sendable, Codable {
    public var operation: Operation
    public var policy: String
    public var nanoseconds: Double
    /// The same number of the same atomic instruction on a flat array, in the same run.
    public var limit: Double
    public var ratioToLimit: Double
    public var ratioToPrecise: Double
}

public struct BenchmarkReport: Sendable, Codable {
    public var guestBytes: UInt64
    public var rounds: Int
    public var seed: UInt64
    public var rows: [BenchmarkRow]
}

/// The memory operations of KVM under each policy.
public struct MemoryBenchmark: Sendable {
    public var pages: Int
    public var rounds: Int
    public var seed: UInt64
    public init(guestBytes: UInt64, rounds: Int, seed: UInt64) {
        pages = Int(guestBytes >> 12)
        self.rounds = rounds
        self.seed = seed
    }

    private static let policies: [(String, PolicyKind)] = [
        ("precise", .precise), ("tracked", .tracked), ("guess", .guess),
    ]

    /// - Parameter progress: told the policy before each of its rounds.
    public func run(progress: (String) -> Void) throws(BenchmarkError) -> BenchmarkReport {
        var samples = Samples()
        for (name, policy) in Self.policies {
            progress(name)
            try measure(name, policy, &samples)
        }
        return report(samples, Self.policies.map(\.0))
    }

    /// The same for `precise` alone, and for 4 KiB entries alone.
    func run4KPrecise() throws(BenchmarkError) -> BenchmarkReport {
        var samples = Samples()
        try measure4K("precise", .precise, &samples)
        return report(samples, ["precise"])
    }

    private func report(_ samples: Samples, _ policies: [String]) -> BenchmarkReport {
        var rows: [BenchmarkRow] = []
        for operation in Operation.allCases {
            let limit = samples.median(operation, "limit")
            let precise = samples.median(operation, "precise")
            for name in policies {
                let time = samples.median(operation, name)
                rows.append(
                    BenchmarkRow(
                        operation: operation, policy: name, nanoseconds: time, limit: limit,
                        ratioToLimit: time / limit, ratioToPrecise: time / precise))
            }
        }
        return BenchmarkReport(guestBytes: UInt64(pages) << 12, rounds: rounds, seed: seed, rows: rows)
    }

    private func measure4K(_ name: String, _ policy: PolicyKind, _ samples: inout Samples) throws(BenchmarkError) {
        guard let machine = BenchmarkMachine(pages: pages, policy: policy, blockOrder: 0, seed: seed) else {
            throw .noMemory("a guest of \(pages >> 8) MiB; try --guest 1")
        }
        for round in 0..<rounds + 1 { try round4K(machine, round == 0 ? nil : name, &samples) }
    }

    private func measure(_ name: String, _ policy: PolicyKind, _ samples: inout Samples) throws(BenchmarkError) {
        try measure4K(name, policy, &samples)
        guard let machine = BenchmarkMachine(pages: pages, policy: policy, blockOrder: 9, seed: seed) else {
            throw .noMemory("a guest of \(pages >> 8) MiB; try --guest 1")
        }
        for round in 0..<rounds + 1 { try roundCollapse(machine, round == 0 ? nil : name, &samples) }
    }

    /// Faults everything in and out, with each operation once. The first round (no name) warms up and is not counted.
    private func round4K(
        _ machine: BenchmarkMachine, _ name: String?, _ samples: inout Samples
    ) throws(BenchmarkError) {
        machine.cleanPageFrames()
        var fixed = 0
        samples.time(.coldFaults, name, pages) { fixed = machine.faultAll() }
        if fixed != pages { throw .left(.coldFaults, fixed, insteadOf: pages) }

        machine.cleanPageFrames()
        samples.time(.clearDirty, name, pages) { machine.mmu.clearDirty(machine.slot) }
        machine.cleanPageFrames()
        samples.time(.writeProtect, name, pages) { machine.mmu.writeProtect(machine.slot) }
        machine.zapAll()

        // Fresh entries, accessed and dirty, for the zap.
        fixed = machine.faultAll()
        machine.cleanPageFrames()
        samples.time(.zap, name, pages) { machine.zapAll() }
        if machine.leaves4K != 0 { throw .left(.zap, machine.leaves4K, insteadOf: 0) }
        if let name, name == "precise" { limits(machine, &samples) }
    }

    private func roundCollapse(
        _ machine: BenchmarkMachine, _ name: String?, _ samples: inout Samples
    ) throws(BenchmarkError) {
        do throws(Errno) {
            // Logging keeps the entries at 4 KiB; collapsing is what turning it off does.
            try machine.setLogging(true)
            let fixed = machine.faultAll()
            if fixed != pages { throw .EIO }
        } catch {
            throw .left(.collapse, machine.leaves4K, insteadOf: pages)
        }
        machine.cleanPageFrames()
        var failure: Errno?
        samples.time(.collapse, name, pages) {
            do throws(Errno) { try machine.setLogging(false) } catch { failure = error }
        }
        if failure != nil { throw .left(.collapse, 1, insteadOf: 0) }
        if machine.leaves2M != pages / 512 {
            throw .left(.collapse, machine.leaves2M, insteadOf: pages / 512)
        }
        machine.zapAll()
    }

    /// The limit rows: flat arrays of as many words. As before the operations, the page frames are touched before each, so
    /// that the words are no more at hand than the entries were.
    private func limits(_ machine: BenchmarkMachine, _ samples: inout Samples) {
        let words = UnsafeMutablePointer<UInt64>.allocate(capacity: pages)
        words.initialize(repeating: 0x8600_0000_0000_0b77, count: pages)
        defer { words.deallocate() }
        var order = [UInt32](0..<UInt32(pages))
        machine.cleanPageFrames()
        samples.time(.zap, "limit", pages) { limit_exchange(words, pages, 0x8000_0000_0000_0000) }
        machine.cleanPageFrames()
        samples.time(.collapse, "limit", pages) { limit_exchange(words, pages, 0x8000_0000_0000_05a0) }
        words.update(repeating: 0x8600_0000_0000_0b77, count: pages)
        machine.cleanPageFrames()
        samples.time(.clearDirty, "limit", pages) { limit_and(words, pages, ~0x200) }
        machine.cleanPageFrames()
        samples.time(.writeProtect, "limit", pages) { limit_and(words, pages, ~0x2) }
        words.update(repeating: 0, count: pages)
        machine.cleanPageFrames()
        order.withUnsafeMutableBufferPointer { order in
            samples.time(.coldFaults, "limit", pages) {
                limit_compare_exchange(words, order.baseAddress!, pages, 0, 0x8600_0000_0000_0b77)
            }
        }
    }
}

/// Times by operation and row, in nanoseconds an entry.
struct Samples {
    private var values: [(operation: Operation, row: String, nanoseconds: Double)] = []

    /// Runs `body` and keeps its time under `row`; nil: not counted.
    mutating func time(_ operation: Operation, _ row: String?, _ entries: Int, _ body: () -> Void) {
        let elapsed = ContinuousClock().measure(body)
        guard let row else { return }
        let (seconds, attoseconds) = elapsed.components
        let nanoseconds = Double(seconds) * 1e9 + Double(attoseconds) / 1e9
        values.append((operation, row, nanoseconds / Double(entries)))
    }

    func median(_ operation: Operation, _ row: String) -> Double {
        middle(of: values.filter { $0.operation == operation && $0.row == row }.map(\.nanoseconds))
    }
}
