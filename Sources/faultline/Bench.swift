import ArgumentParser
import Benchmarks
import Foundation
import Report

struct Bench: ParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "Measure KVM's memory operations under each policy, beside this machine's limit.",
        discussion: "Documentation/Faultline.docc/Benchmark.md says what is measured and how to read it.")

    @Flag(help: "A small guest and one round: checks that the benchmark runs; its times mean nothing.")
    var quick = false
    @Option(help: "The guest's memory in GiB.")
    var guest = 8
    @Option(help: "Rounds; medians are shown.")
    var rounds = 5
    @Option(help: "Seed of the shuffle.")
    var seed: UInt64 = 1
    @Flag(help: "Print the table as JSON.")
    var json = false

    func validate() throws {
        guard (1...64).contains(guest) else { throw ValidationError("--guest must be 1 to 64 (GiB)") }
        guard (1...101).contains(rounds) else { throw ValidationError("--rounds must be 1 to 101") }
    }

    func run() throws {
        let bytes: UInt64 = quick ? 64 << 20 : UInt64(guest) << 30
        let benchmark = MemoryBenchmark(guestBytes: bytes, rounds: quick ? 1 : rounds, seed: seed)
        let report: BenchmarkReport
        do throws(BenchmarkError) {
            report = try benchmark.run { policy in
                if isatty(STDERR_FILENO) == 1 { FileHandle.standardError.write(Data("measuring \(policy)\n".utf8)) }
            }
        } catch {
            switch error {
            case .noMemory(let bytes):
                throw Failure(.impossibleHere, "error: no room for a guest of \(bytes >> 20) MiB; try --guest 1")
            case .wrongResult(let operation, let expected, let found):
                throw Failure(
                    .findings, "error: \(operation.rawValue) left \(found) where \(expected) was right; no times")
            }
        }
        output(json ? BenchmarkText.json(report) : BenchmarkText.render(report, .standardOutput))
    }
}
