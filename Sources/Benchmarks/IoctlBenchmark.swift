import CBenchmarkLimits
import Interface
import IoctlScript

/// What is measured of scripts.
public enum IoctlOperation: String, Sendable, CaseIterable, Codable {
    case random = "random scripts, model made and ended"
    case guestWrite = "a guest write, mapped"
    case guestFault = "a guest write, then dontneed"
    case region = "a slot made, and deleted"
    case dirtyLog = "a guest write, then the log of 64 pages"
}

/// One line of the table: medians over the rounds, in nanoseconds for each step.
public struct IoctlRow: Sendable, Codable {
    public var operation: IoctlOperation
    public var steps: Int
    public var nanoseconds: Double
    /// As many system calls that do nothing, in C, in the same run.
    public var limit: Double
    public var stepsPerSecond: Double { 1e9 / nanoseconds }
}

public struct IoctlReport: Sendable, Codable {
    public var rounds: Int
    public var seed: UInt64
    public var rows: [IoctlRow]
}

/// Steps of scripts on the model, read beforehand.
public struct IoctlBenchmark: Sendable {
    /// Of each operation.
    public var steps: Int
    public var rounds: Int
    public var seed: UInt64
    public init(steps: Int, rounds: Int, seed: UInt64) {
        precondition(steps >= 1000)
        self.steps = steps
        self.rounds = rounds
        self.seed = seed
    }

    /// - Parameter progress: told what comes next.
    public func run(progress: (String) -> Void) throws(BenchmarkError) -> IoctlReport {
        guard let storage = ModelStorage() else { throw .noMemory("the model's memory") }
        var rows: [IoctlRow] = []
        for operation in IoctlOperation.allCases {
            progress(operation.rawValue)
            rows.append(try row(operation, storage))
        }
        return IoctlReport(rounds: rounds, seed: seed, rows: rows)
    }

    private func row(_ operation: IoctlOperation, _ storage: ModelStorage) throws(BenchmarkError) -> IoctlRow {
        let scripts = operation == .random ? randomScripts() : [try read(operation)]
        let count = scripts.reduce(0) { $0 + $1.lines.count }
        var times: [Double] = []
        var limits: [Double] = []
        // The first round warms up.
        for round in 0..<rounds + 1 {
            let measured = try time { () throws(BenchmarkError) in
                for script in scripts { try perform(script, storage, mayFail: operation == .random) }
            }
            let limit = time { limit_system_calls(count) }
            if round > 0 {
                times.append(measured.nanoseconds / Double(count))
                limits.append(limit.nanoseconds / Double(count))
            }
        }
        return IoctlRow(
            operation: operation, steps: count, nanoseconds: times.sorted()[rounds / 2],
            limit: limits.sorted()[rounds / 2])
    }

    private func perform(
        _ script: Script, _ storage: ModelStorage, mayFail: Bool
    ) throws(BenchmarkError) {
        let executor = ModelExecutor(storage)
        for line in script.lines {
            let answer = executor.perform(line.step, process: line.process)
            guard mayFail || answer.outcome == .returned(0) else {
                throw .wrongResult("line \(line.number) gave \(answer)")
            }
        }
        executor.finish()
        guard executor.findings.isEmpty else { throw .wrongResult("a rule was broken") }
    }

    private func randomScripts() -> [Script] {
        var scripts: [Script] = []
        var count = 0
        while count < steps {
            var source = RandomScripts(seed: seed &+ UInt64(scripts.count))
            scripts.append(source.script())
            count += scripts[scripts.count - 1].lines.count
        }
        return scripts
    }

    /// A script whose last two lines are what is measured, again and again.
    private func read(_ operation: IoctlOperation) throws(BenchmarkError) -> Script {
        let write = "guest write cpu=0 gpa=0x10000 value=1"
        let pair: [String] =
            switch operation {
            case .random: []
            case .guestWrite: [write, "guest write cpu=0 gpa=0x11000 value=2"]
            case .guestFault: [write, "madvise host=ram length=4k advice=dontneed"]
            case .region:
                ["region slot=1 gpa=0x1000000 size=256k hva=ram", "region slot=1 gpa=0x1000000 size=0 hva=ram"]
            case .dirtyLog: [write, "get_dirty_log slot=0"]
            }
        let text = """
            host name=ram kind=anonymous size=1M
            vm
            vcpu
            region slot=0 flags=log_dirty gpa=0x10000 size=256k hva=ram
            \(pair.joined(separator: "\n"))
            """
        do {
            var script = try Script(text: text, file: "benchmark")
            let repeated = script.lines.suffix(2)
            while script.lines.count < steps { script.lines += repeated }
            return script
        } catch {
            throw .wrongResult("\(error)")
        }
    }
}
