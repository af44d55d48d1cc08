import ArgumentParser
import Benchmarks
import Foundation
import Laboratory
import Machine
import Report
import Scenario

struct Bench: ParsableCommand {
    static let configuration = CommandConfiguration(
        abstract:
            "Measure: KVM's memory operations (the default), slots, the host's operations, x86's MMUs, or the explorer.",
        subcommands: [
            MemoryBench.self, SlotBench.self, HostBench.self, X86Bench.self, ExplorerBench.self, IoctlBench.self,
        ],
        defaultSubcommand: MemoryBench.self)
}

/// What every measurement in rounds takes.
struct RoundOptions: ParsableArguments {
    @Option(name: .customLong("rounds"), help: "Rounds; medians are shown.")
    var count = 5
    @Option(help: "Seed of the shuffle.")
    var seed: UInt64 = 1
    @Flag(help: "Print the table as JSON.")
    var json = false

    func validate() throws {
        guard (1...101).contains(count) else { throw ValidationError("--rounds must be 1 to 101") }
    }

    /// What is being measured, for who watches a terminal.
    static func show(_ part: some CustomStringConvertible) {
        if isatty(STDERR_FILENO) == 1 { FileHandle.standardError.write(Data("measuring \(part)\n".utf8)) }
    }

    /// What `benchmark` measures, or why there are no times.
    static func report<Report>(
        _ benchmark: (_ progress: (String) -> Void) throws(BenchmarkError) -> Report
    ) throws -> Report {
        do throws(BenchmarkError) {
            return try benchmark { part in show(part) }
        } catch {
            switch error {
            case .noMemory(let what): throw Failure(.impossibleHere, "error: no room for \(what)")
            case .wrongResult(let what): throw Failure(.findings, "error: \(what); no times")
            }
        }
    }
}

struct MemoryBench: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "memory",
        abstract: "Measure KVM's memory operations under each policy, beside this machine's limit.",
        discussion: "Documentation/Faultline.docc/Benchmark.md says what is measured and how to read it.")

    @Flag(help: "A small guest and one round: checks that the benchmark runs; its times mean nothing.")
    var quick = false
    @Option(help: "The guest's memory in GiB.")
    var guest = 8
    @OptionGroup var rounds: RoundOptions

    func validate() throws {
        guard (1...64).contains(guest) else { throw ValidationError("--guest must be 1 to 64 (GiB)") }
    }

    func run() throws {
        let bytes: UInt64 = quick ? 64 << 20 : UInt64(guest) << 30
        let benchmark = MemoryBenchmark(guestBytes: bytes, rounds: quick ? 1 : rounds.count, seed: rounds.seed)
        let report = try RoundOptions.report(benchmark.run)
        output(rounds.json ? BenchmarkText.json(report) : BenchmarkText.render(report, .standardOutput))
    }
}

struct SlotBench: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "slots",
        abstract: "Measure lookups and changes in a VM with 32,000 slots.",
        discussion: "Documentation/Faultline.docc/Benchmark.md says what is measured and how to read it.")

    @Flag(help: "Few slots and one round: checks that the benchmark runs; its times mean nothing.")
    var quick = false
    @OptionGroup var rounds: RoundOptions

    func run() throws {
        let benchmark =
            quick
            ? SlotBenchmark(slots: 1000, lookups: 1 << 12, changes: 50, rounds: 1, seed: rounds.seed)
            : SlotBenchmark(rounds: rounds.count, seed: rounds.seed)
        let report = try RoundOptions.report(benchmark.run)
        output(rounds.json ? SlotBenchmarkText.json(report) : SlotBenchmarkText.render(report))
    }
}

struct HostBench: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "host",
        abstract: "Measure the host's memory: lookups, faults, fork, the start of a large host, what it all holds.",
        discussion: "Documentation/Faultline.docc/Benchmark.md says what is measured and how to read it.")

    @Flag(help: "A small process and one round: checks that the benchmark runs; its times mean nothing.")
    var quick = false
    @OptionGroup var rounds: RoundOptions

    func run() throws {
        let benchmark = HostBenchmark(
            bytes: quick ? 16 << 20 : 1 << 30, rounds: quick ? 1 : rounds.count, seed: rounds.seed)
        let report = try RoundOptions.report(benchmark.run)
        output(rounds.json ? HostBenchmarkText.json(report) : HostBenchmarkText.render(report))
    }
}

struct X86Bench: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "x86",
        abstract: "Measure x86's MMUs: faults with warm and cold tables, splits, the log, two vCPUs.",
        discussion: "Documentation/Faultline.docc/Benchmark.md says what is measured and how to read it.")

    @Flag(help: "Small guests and one round: checks that the benchmark runs; its times mean nothing.")
    var quick = false
    @Option(help: "GiB of the guest whose tables are cold; its tables take 1/512 of that.")
    var cold = 32
    @OptionGroup var rounds: RoundOptions

    func validate() throws {
        guard (1...256).contains(cold) else { throw ValidationError("--cold must be 1 to 256 (GiB)") }
    }

    func run() throws {
        let benchmark = X86Benchmark(quick: quick, coldGiB: cold, rounds: rounds.count, seed: rounds.seed)
        let report = try RoundOptions.report(benchmark.run)
        output(rounds.json ? X86BenchmarkText.json(report) : X86BenchmarkText.render(report))
    }
}

struct ExplorerBench: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "explorer",
        abstract: "Measure the explorer: runs and points a second, the start of a world, the time to each defect.",
        discussion: "Documentation/Faultline.docc/Explorer.md says what is measured and how to read it.")

    @Flag(help: "A few runs: checks that the benchmark runs; its times mean nothing.")
    var quick = false
    @Option(help: "Where the scenarios are that show the defects.")
    var scenarios = "Scenarios"
    @Flag(help: "Print the table as JSON.")
    var json = false

    func run() throws {
        guard var result = ExplorerBenchmark.run(quick: quick) else {
            throw Failure(.impossibleHere, "error: this machine has no room for the world of the basic race")
        }
        for exhibit in quick ? Array(Exhibit.all.prefix(1)) : Exhibit.all {
            for name in exhibit.scenarios {
                let file = try load("\(scenarios)/\(name).yaml")
                var known = KnownDeviations()
                let architecture = exhibit.architecture ?? file.plan.architecture
                if let entry = file.known(exhibit.policy ?? .precise, on: architecture) {
                    known.rules = entry.invariants
                    known.unexpectedSteps = entry.unmetExpectation
                }
                guard let found = ExplorerBenchmark.find(exhibit, name, file.plan, known) else {
                    throw Failure(.findings, "error: \(exhibit.name) was not found in \(name); no times")
                }
                result.defects.append(found)
            }
        }
        var usage = rusage()
        getrusage(__rusage_who_t(RUSAGE_SELF.rawValue), &usage)
        result.peakMemory = Int(usage.ru_maxrss) << 10
        output(json ? ExplorerBenchmarkText.json(result) : ExplorerBenchmarkText.render(result, .standardOutput))
    }
}
