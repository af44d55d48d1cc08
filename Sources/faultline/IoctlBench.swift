import ArgumentParser
import Benchmarks

struct IoctlBench: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "ioctl", abstract: "Measure ioctl scripts on the model: steps a second.",
        discussion: "Documentation/Faultline.docc/Benchmark.md says what is measured and how to read it.")

    @Flag(help: "A few steps and one round: checks that the benchmark runs; its times mean nothing.")
    var quick = false
    @OptionGroup var rounds: RoundOptions

    func run() throws {
        let benchmark = IoctlBenchmark(
            steps: quick ? 2000 : 200_000, rounds: quick ? 1 : rounds.count, seed: rounds.seed)
        let report = try RoundOptions.report(benchmark.run)
        output(rounds.json ? IoctlBenchmarkText.json(report) : IoctlBenchmarkText.render(report))
    }
}
