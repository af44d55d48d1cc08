import ArgumentParser
import Conformance
import Explanations
import Foundation
import LinuxKVM
import Scenario
import Synchronization
import TextInput

struct ConformKVM: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "kvm",
        abstract: "Random scripts on the model and on this machine's /dev/kvm.",
        discussion: """
            Half of the steps and more are accesses of the guest and changes to memory that a slot shows; the rest are KVM's \
            calls, with edge values and in every wrong order. A difference is shrunk to the fewest lines and printed with \
            both answers. Documentation/Faultline.docc/RealKernel.md says what is compared.

            With --resume the campaign is kept in FILE and goes on from there the next time; Ctrl-C stops it where it can go on.

            Exit status: 0 no difference, 1 a difference, a broken rule of the model, or a call that the kernel did not return \
            from, 2 wrong usage, 3 this machine can't be compared with.
            """)

    @Argument(help: "Scenarios to play on both sides, instead of random scripts.")
    var scenarios: [String] = []
    @Option(help: "Seed of the random scripts; 1 if it is not given.")
    var seed: UInt64?
    @Option(help: "How many steps in all; 100,000 if neither this nor --seconds is given.")
    var steps: Int?
    @Option(help: "For how long.")
    var seconds: Double?
    @Option(help: ArgumentHelp("Keep the campaign in this file, and go on with it.", valueName: "file"))
    var resume: String?
    @Option(
        help: ArgumentHelp(
            "A file of more rules that explain differences; with --trace, of rules as replay has them.",
            valueName: "file"))
    var explanations: String?
    @Flag(help: "Try what is said of KVM since 6.13, a table, instead of random scripts.")
    var claims = false
    @Flag(
        help: """
            Record what KVM does for scenarios, scripts (*.ioctl) or random scripts, and compare that with what the model does. \
            Needs root.
            """)
    var trace = false
    @Option(help: ArgumentHelp("With --trace, keep the recording in this file.", valueName: "file"))
    var keep: String?
    @Option(help: "How many scripts run at the same time.")
    var jobs = 1
    @OptionGroup var kernel: DeviceOptions
    @Flag(help: "Print the report as JSON.")
    var json = false

    func validate() throws {
        if let steps, steps < 1 { throw ValidationError("--steps must be 1 or more.") }
        if let seconds, !(seconds > 0) { throw ValidationError("--seconds must be more than 0.") }
        if !scenarios.isEmpty, json || claims || seed != nil || steps != nil || seconds != nil || resume != nil {
            throw ValidationError("scenarios take no --json, --claims, --seed, --steps, --seconds or --resume.")
        }
        if claims, seed != nil || steps != nil || seconds != nil || resume != nil {
            throw ValidationError("--claims takes no --seed, --steps, --seconds or --resume.")
        }
        if trace, claims || json || seconds != nil || resume != nil || jobs != 1 {
            throw ValidationError("--trace takes no --claims, --json, --seconds, --resume or --jobs.")
        }
        if keep != nil, !trace || scenarios.count != 1 {
            throw ValidationError("--keep goes with --trace and one scenario.")
        }
        if jobs < 1 || jobs > 64 { throw ValidationError("--jobs is 1 to 64.") }
    }

    /// `--claims`.
    private func tryClaims() throws {
        let claims: [Claim]
        do throws(InputErrors) { claims = try Claim.known() } catch { throw Failure(.unusable, error.description) }
        var options = kernel.applied(to: RealRun.Options())
        options.hugePages = true
        let table: ClaimTable
        do throws(RealRun.Unavailable) { table = try ClaimTable(claims, on: try RealRun(options)) } catch {
            throw Failure(.impossibleHere, "error: \(error.reason)")
        }
        output(json ? table.json : table.text)
        if !table.isClean { throw Failure(.findings) }
    }

    /// Each on both sides: a line, and what is wrong with it. Status 3 if none could be played.
    private func playAll() throws {
        var (isClean, played) = (true, 0)
        var text = ""
        for path in scenarios {
            let plan = try load(path).plan
            do throws(Failure) {
                let scenario = try play(plan, kernel, comparing: true)
                played += 1
                isClean = isClean && scenario.isClean
                text +=
                    scenario.isClean ? "ok         \(scenario.name), \(scenario.steps.count) steps\n" : scenario.text
            } catch {
                guard error.status == .impossibleHere else { throw error }
                text += "not played \(error.message.dropFirst("error: ".count))\n"
            }
        }
        output(text)
        if !isClean { throw Failure(.findings) }
        if played == 0 { throw Failure(.impossibleHere) }
    }

    func run() async throws {
        if trace { return try scenarios.isEmpty ? traceRandom() : traceAll() }
        if !scenarios.isEmpty { return try playAll() }
        if claims { return try tryClaims() }
        let file = resume.map { CampaignFile(path: $0) }
        var tally = try file?.read(seed: seed) ?? Tally(seed: seed ?? 1, kernel: kernelRelease)
        var options = Campaign.Options()
        options.rules = try rules()
        options.jobs = jobs
        options.real = kernel.applied(to: options.real)
        do {
            let campaign = try Campaign(options)
            if tally.kernel != campaign.kernel.release {
                throw RealRun.Unavailable(
                    reason: "the campaign was begun on Linux \(tally.kernel), and this is \(campaign.kernel.release)")
            }
            let found = try await run(campaign, &tally, file)
            let report = CampaignReport(campaign, tally, found)
            output(json ? report.json : report.text)
            if !report.isClean { throw Failure(.findings) }
        } catch let error as RealRun.Unavailable {
            throw Failure(.impossibleHere, "error: \(error.reason)")
        }
    }

    private func run(
        _ campaign: Campaign, _ tally: inout Tally, _ file: CampaignFile?
    ) async throws -> Campaign.Found? {
        stopAtInterrupt()
        let before = tally
        let steps = steps ?? (seconds == nil ? 100_000 : .max)
        let progress = Progress(steps: steps, seconds: seconds, before)
        var saved = before.duration
        defer { progress.end() }
        let end = try await campaign.run(&tally) { tally in
            progress.show(tally)
            if tally.duration - saved > 5 {
                saved = tally.duration
                file?.write(tally)
            }
            return tally.steps >= steps || tally.duration - before.duration >= seconds ?? .infinity
                || isInterrupted.load(ordering: .relaxed)
        }
        // What was found stands in front of whoever goes on.
        try file?.writeAtEnd(end?.before ?? tally)
        return end?.found
    }

    private func rules() throws -> [AnswerRule] {
        let known: [AnswerRule]
        do throws(ExplanationError) { known = try AnswerRule.known() } catch {
            throw Failure(.unusable, "error: \(error)")
        }
        guard let explanations else { return known }
        let text: String
        do { text = try String(contentsOfFile: explanations, encoding: .utf8) } catch {
            throw Failure(.unusable, "error: \(explanations): it can't be read as text; name a file of explanations")
        }
        do throws(ExplanationError) { return known + (try AnswerRule.list(text, file: explanations)) } catch {
            throw Failure(.unusable, "error: \(error)")
        }
    }
}

/// A campaign on disk, as JSON.
private struct CampaignFile {
    let path: String

    /// Nil: there is no file yet.
    func read(seed: UInt64?) throws -> Tally? {
        guard FileManager.default.fileExists(atPath: path) else {
            try writeNothing()
            return nil
        }
        let tally: Tally
        do {
            let data = try Data(contentsOf: URL(fileURLWithPath: path))
            if data.isEmpty { return nil }
            tally = try JSONDecoder().decode(Tally.self, from: data)
        } catch {
            throw Failure(.unusable, "error: \(path) holds no campaign; name the file of one, or one that there is not")
        }
        if let seed, seed != tally.seed {
            throw Failure(.unusable, "error: the campaign in \(path) has seed \(tally.seed); leave --seed out")
        }
        return tally
    }

    /// Before any work: a file that can't be written ends the command.
    private func writeNothing() throws {
        do { try Data().write(to: URL(fileURLWithPath: path)) } catch { throw unwritable(error) }
    }

    private func save(_ tally: Tally) throws {
        let encoder = JSONEncoder()
        encoder.outputFormatting = [.prettyPrinted, .sortedKeys]
        try encoder.encode(tally).write(to: URL(fileURLWithPath: path), options: .atomic)
    }

    /// In between a failure may pass: the last write tells it.
    func write(_ tally: Tally) { _ = try? save(tally) }

    func writeAtEnd(_ tally: Tally) throws {
        do { try save(tally) } catch { throw unwritable(error) }
    }

    private func unwritable(_ error: any Error) -> Failure {
        Failure(.unusable, "error: \(path) can't be written: \((error as NSError).localizedDescription)")
    }
}

/// Ctrl-C, asked for between two rounds. The second one ends the process.
let isInterrupted = Atomic<Bool>(false)

func stopAtInterrupt() {
    signal(SIGINT) { _ in
        if isInterrupted.exchange(true, ordering: .relaxed) { _exit(130) }
    }
}

/// A line on a terminal, overwritten.
private final class Progress {
    private let isShown = isatty(STDERR_FILENO) == 1
    private let steps: Int
    private let seconds: Double?
    private let before: Tally
    private var shown = -1.0

    init(steps: Int, seconds: Double?, _ before: Tally) {
        (self.steps, self.seconds, self.before) = (steps, seconds, before)
    }

    func show(_ tally: Tally) {
        let passed = tally.duration - before.duration
        guard isShown, passed - shown > 0.5 else { return }
        shown = passed
        let rate = passed > 0 ? Double(tally.steps - before.steps) / passed : 0
        let left = seconds.map { $0 - passed } ?? (rate > 0 ? Double(steps - tally.steps) / rate : 0)
        let goal = seconds == nil ? " of \(steps)" : ""
        write("\r\u{1b}[K\(tally.steps)\(goal) steps, \(Int(rate)) a second, \(Int(left)) s left")
    }

    func end() { if isShown { write("\r\u{1b}[K") } }

    private func write(_ text: String) { FileHandle.standardError.write(Data(text.utf8)) }
}
