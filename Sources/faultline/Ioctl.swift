import ArgumentParser
import Audit
import Conformance
import Foundation
import Interface
import IoctlScript
import LinuxKVM
import Report
import TextInput

struct Ioctl: ParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "Make KVM's memory calls as a script says, and print what came of each.",
        discussion: """
            A line of the script is a call; a line of the output is its number in the script and its answer. \
            Documentation/Faultline.docc/IoctlScripts.md describes both.

            With --diff the model and this machine's /dev/kvm both answer, and the lines whose answers differ are printed; \
            the model has what this kernel says that it has. \
            The kernel's side runs in processes of its own, with limits; a kernel that does not return from a call, or \
            ends its process, is told with the call. With --random no script is read: random ones are made and run, and \
            the rules of the model are checked after each.

            Exit status: 0 nothing found, 1 a rule broken, an answer that differs, a call that did not return, 2 the \
            script is wrong, 3 /dev/kvm can't be used. The answers of one side alone are not judged.
            """)

    enum Side: String, ExpressibleByArgument, CaseIterable { case model, kvm }

    @Argument(help: "The script; - is standard input.")
    var script: String?
    @Option(help: "Who answers.")
    var on = Side.model
    @Flag(help: "Compare both sides' answers.")
    var diff = false
    @OptionGroup var kernel: DeviceOptions
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
        if random != nil, diff || on == .kvm { throw ValidationError("--random runs on the model alone.") }
    }

    func run() throws {
        if let random { return try runRandom(random) }
        let read = try readScript(script ?? "-")
        if diff { return try compare(read) }
        if on == .kvm {
            let (answers, finding, _) = try onKVM(read, describing: false)
            output(json ? read.json(of: answers) : read.text(of: answers))
            if let finding { throw Failure(.findings, finding) }
            return
        }
        let (answers, findings) = try onModel(read)
        output(json ? read.json(of: answers) : read.text(of: answers))
        if !findings.isEmpty { throw Failure(.findings, Self.text(findings)) }
    }

    private func compare(_ script: Script) throws {
        // The child first: it has the memory that this process has then.
        let (real, finding, features) = try onKVM(script, describing: true)
        let (model, findings) = try onModel(script, features ?? KernelFeatures(), beside: real)
        let comparison = Comparison(script, ("model", model), ("kvm", real))
        output(json ? comparison.json : comparison.text)
        let texts = [finding ?? "", Self.text(findings)].filter { !$0.isEmpty }
        if !texts.isEmpty || !comparison.differences.isEmpty {
            throw Failure(.findings, texts.joined(separator: "\n"))
        }
    }

    private func onModel(
        _ script: Script, _ features: KernelFeatures = KernelFeatures(), beside other: [Answer]? = nil
    ) throws -> ([Answer], [Finding]) {
        guard var executor = ModelExecutor(features: features) else { throw Failure(.impossibleHere, Self.noRoom) }
        let answers = other.map { script.run(on: &executor, beside: $0) } ?? script.run(on: &executor)
        executor.finish()
        return (answers, executor.findings)
    }

    /// The answers, what ended the script early, and what the kernel has, if that is asked.
    private func onKVM(_ script: Script, describing: Bool) throws -> ([Answer], String?, KernelFeatures?) {
        do throws(RealRun.Unavailable) {
            let run = try RealRun(kernel.applied(to: RealRun.Options()))
            let features = describing ? try KernelDescription(run).features : nil
            let (answers, end) = try run.answersAndEnd(of: script)
            let finding = end.map { end in
                let line = script.lines[end.index]
                return "\(line.number): \(script.source(of: line)): \(end.reason)"
            }
            return (answers, finding, features)
        } catch {
            throw Failure(.impossibleHere, "error: \(error.reason)")
        }
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

/// Reads the script of a path; `-` is standard input.
func readScript(_ path: String) throws(Failure) -> Script {
    do throws(InputErrors) { return try Script(path: path) } catch { throw Failure(.unusable, error.description) }
}
