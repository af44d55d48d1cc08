import ArgumentParser
import Foundation
import HostConformance

struct Conform: ParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "Play the same calls on the model and on this machine's kernel, and show where they differ.",
        subcommands: [ConformKVM.self, ConformHost.self], defaultSubcommand: ConformKVM.self)
}

struct ConformHost: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "host",
        abstract: "Random memory calls in a few processes: answers, bytes, signals, and what /proc says of each page.",
        discussion: """
            A difference is shrunk to the fewest calls and printed with both answers. Exit status: 0 no difference, 1 a \
            difference, 3 this machine can't be compared with.
            """)

    @Option(help: "How many calls.")
    var steps = 20_000
    @Option(help: "Seed of the random calls.")
    var seed: UInt64 = 1
    @Flag(help: "Print how often each call gave each answer.")
    var histogram = false

    func validate() throws {
        guard steps > 0 else { throw ValidationError("--steps must be 1 or more.") }
    }

    func run() throws {
        let report: HostConformance.Report
        let showsProgress = isatty(STDERR_FILENO) == 1
        do {
            let conformance = try HostConformance()
            var shown = 0
            report = try conformance.run(steps: steps, seed: seed) { done in
                if showsProgress, done - shown >= 5_000 {
                    shown = done
                    FileHandle.standardError.write(Data("\r\(done) of \(steps) calls".utf8))
                }
                return true
            }
        } catch {
            throw Failure(.impossibleHere, "error: \(error.reason)")
        }
        if showsProgress { FileHandle.standardError.write(Data("\r\u{1b}[K".utf8)) }
        var lines: [String] = []
        if histogram {
            for (name, count) in report.histogram.sorted(by: { $0.key < $1.key }) {
                lines.append("  \(count)  \(name)")
            }
        }
        if let difference = report.difference {
            lines += [
                "difference after \(report.steps) calls, seed \(seed); the fewest calls that show one:",
                "\(difference)",
            ]
            output(lines.joined(separator: "\n") + "\n")
            throw Failure(.findings)
        }
        lines.append(
            "ok: \(report.steps) calls in \(report.sequences) sequences, seed \(seed), Linux \(HostConformance.kernelRelease):"
                + " no difference")
        output(lines.joined(separator: "\n") + "\n")
    }
}
