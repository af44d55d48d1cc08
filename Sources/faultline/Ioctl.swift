import ArgumentParser
import Audit
import Foundation
import Interface
import IoctlScript
import Report
import TextInput

struct Ioctl: ParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "Make KVM's memory calls as a script says, and print what came of each.",
        discussion: """
            A line of the script is a call; a line of the output is its number in the script and its answer. \
            Documentation/Faultline.docc/IoctlScripts.md describes both.

            With --random no script is read: random ones are made and run, and the rules of the model are checked after \
            each. Exit status: 0 nothing found, 1 a rule broken, 2 the script is wrong; answers are not judged.
            """)

    enum Side: String, ExpressibleByArgument, CaseIterable { case model }

    @Argument(help: "The script; - is standard input.")
    var script: String?
    @Option(help: "Who answers.")
    var on = Side.model
    @Flag(help: "Print the answers as JSON.")
    var json = false
    @Option(help: ArgumentHelp("Make and run random scripts of so many steps in all.", valueName: "steps"))
    var random: Int?
    @Option(help: "Seed of the random scripts.")
    var seed: UInt64 = 1
    @Flag(help: "With --random: print the script of this seed instead of running any.")
    var print = false

    func validate() throws {
        if (script == nil) == (random == nil) {
            throw ValidationError("give a script, or --random STEPS.")
        }
        if let random, random < 1 { throw ValidationError("--random must be 1 or more.") }
        if print, random == nil { throw ValidationError("--print goes with --random.") }
    }

    func run() throws {
        if let random { return try runRandom(random) }
        let read: Script
        do throws(InputErrors) {
            read = try Script(path: script ?? "-")
        } catch {
            throw Failure(.unusable, error.description)
        }
        guard var executor = ModelExecutor() else { throw Failure(.impossibleHere, Self.noRoom) }
        let answers = read.run(on: &executor)
        output(json ? read.json(of: answers) : read.text(of: answers))
        executor.finish()
        let findings = executor.findings
        if !findings.isEmpty { throw Failure(.findings, Self.text(findings)) }
    }

    private static func text(_ findings: [Finding]) -> String {
        findings.map { "\($0.invariant.code) \($0.reason.text.description)" }.joined(separator: "; ")
    }

    private static let noRoom = "error: no room for the model's memory"

    private func runRandom(_ steps: Int) throws {
        if print {
            var scripts = RandomScripts(seed: seed)
            return output(scripts.script().source)
        }
        guard let storage = ModelStorage() else { throw Failure(.impossibleHere, Self.noRoom) }
        var runner = RandomRun(seed: seed, storage: storage)
        let showsProgress = isatty(STDERR_FILENO) == 1
        let found = runner.run(steps: steps) { done in
            if showsProgress { FileHandle.standardError.write(Data("\r\(done) of \(steps) steps".utf8)) }
        }
        if showsProgress { FileHandle.standardError.write(Data("\r\u{1b}[K".utf8)) }
        if let found {
            output(
                "# found after \(runner.steps) steps, seed \(found.seed): \(Self.text(found.findings))\n"
                    + found.script.source)
            throw Failure(.findings)
        }
        output("ok: \(runner.steps) steps in \(runner.scripts) scripts, seed \(seed): no rule broken\n")
    }
}
