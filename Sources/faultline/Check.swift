import ArgumentParser
import Explorer
import Foundation
import Laboratory
import Machine
import Report
import Scenario

struct Check: ParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "Run a scenario in every relevant order: is there any in which it goes wrong?",
        discussion: """
            The tasks of a phase run side by side, switched at every point where they touch what others touch, together
            with the processors' speculative walks. Orders that can't differ are run once. Where there are too many, \
            bounds on preemptions are set, and said.
            """)

    @Argument(help: "A scenario, a YAML file.")
    var scenario: String
    @Option(help: "The policy for page references: \(PolicyName.allValueStrings.joined(separator: ", ")).")
    var policy: PolicyName?
    @Option(
        help: "The MMU, instead of the scenario's: \(Architecture.allValueStrings.joined(separator: ", ")).")
    var architecture: Architecture?
    @Option(help: "Switch a defect of the museum on; `faultline defects` lists them.")
    var defect: String?
    @Option(help: "Run one order only: A12.B3 is task A for 12 points, B for 3, then the default order.")
    var schedule: String?
    @Option(help: "Only orders with at most N preemptions.")
    var preemptions: Int?
    @Option(help: "Runs before bounds are set, and of each bounded search.")
    var runs = CheckLimits().runs
    @Option(help: "Points after which a run is cut.")
    var depth = CheckLimits().depth
    @Option(help: "Random runs where the searches were not complete.")
    var random = CheckLimits().randomRuns
    @Option(help: "Seed of the random runs.")
    var seed: UInt64 = 1
    @Flag(help: "Without the processors' speculative walks.")
    var noSpeculation = false
    @Flag(help: "Print the report as JSON.")
    var json = false

    func validate() throws {
        guard (0...64).contains(preemptions ?? 0) else { throw ValidationError("--preemptions must be 0 to 64") }
        guard runs > 0 else { throw ValidationError("--runs must be at least 1") }
        guard (100...Explorer.greatestDepth).contains(depth) else {
            throw ValidationError("--depth must be 100 to \(Explorer.greatestDepth)")
        }
        guard random >= 0 else { throw ValidationError("--random must not be negative") }
        if schedule != nil, preemptions != nil {
            throw ValidationError("--schedule runs one order; --preemptions searches: give one of them")
        }
    }

    func run() throws {
        let file = try load(scenario)
        let exhibit = try wantedDefect()
        let chosen = architecture ?? exhibit?.architecture ?? file.plan.architecture
        guard file.architectures.contains(chosen) else {
            throw Failure(.unusable, "error: \(scenario) is not meant for \(chosen.name)")
        }
        let policy = policy ?? exhibit?.policy ?? .precise
        if let needed = exhibit?.policy, needed != policy {
            throw Failure(.unusable, "error: the defect `\(exhibit!.name)` is in code of --policy \(needed.name) only")
        }
        if let needed = exhibit?.architecture, needed != chosen {
            throw Failure(.unusable, "error: the defect `\(exhibit!.name)` shows on --architecture \(needed.name) only")
        }
        // What can't be set up is refused here, as `run` refuses it.
        _ = try execute(file, policy: policy, architecture: chosen)
        guard
            let subject = WorldSubject(file.plan, policy: policy, architecture: chosen, speculates: !noSpeculation)
        else { throw Failure(.impossibleHere, "error: this machine has no room for the scenario's memory") }
        if let known = file.known(policy, on: chosen) {
            subject.known.rules = known.invariants
            subject.known.unexpectedSteps = known.unmetExpectation
        }
        for phase in file.plan.phases.indices where subject.taskCount(phase) > Subject.mostTasks {
            throw Failure(
                .unusable,
                "error: a phase of \(scenario) has more than \(Subject.mostTasks) tasks, the processors' included")
        }
        let explorer = Explorer(subject, defects: exhibit.map { 1 << UInt64($0.defect.rawValue) } ?? 0)
        let command = self.command(policy, chosen, exhibit)
        let report = withTrapReport(explorer, command) { explore(explorer) }
        let result = try report.get()
        let text = CheckText(
            plan: file.plan, file: scenario, policy: policy, architecture: chosen, defect: exhibit, command: command)
        output(json ? text.json(result, subject, explorer) : text.render(result, subject, explorer, .standardOutput))
        if result.finding != nil { throw Failure(.findings) }
    }

    private func wantedDefect() throws(Failure) -> Exhibit? {
        guard let defect else { return nil }
        guard let exhibit = Exhibit.named(defect) else {
            throw Failure(
                .unusable,
                "error: there is no defect `\(defect)`; there are: "
                    + Exhibit.all.map(\.name).joined(separator: ", "))
        }
        return exhibit
    }

    /// The line that makes the same again, up to the schedule.
    private func command(_ policy: PolicyName, _ architecture: Architecture, _ exhibit: Exhibit?) -> String {
        var parts = ["faultline check", scenario.contains(" ") ? "'\(scenario)'" : scenario]
        if policy != (exhibit?.policy ?? .precise) { parts.append("--policy \(policy.name)") }
        if self.architecture != nil { parts.append("--architecture \(architecture.name)") }
        if let exhibit { parts.append("--defect \(exhibit.name)") }
        if noSpeculation { parts.append("--no-speculation") }
        return parts.joined(separator: " ")
    }

    private func withTrapReport<R>(_ explorer: Explorer, _ command: String, _ body: () -> R) -> R {
        var bytes = Array(command.utf8CString)
        if json { bytes = Array(command.replacing("\\", with: "\\\\").replacing("\"", with: "\\\"").utf8CString) }
        return bytes.withUnsafeBufferPointer { text in
            let trap = explorer.trapReport(command: text.baseAddress!, json: json)
            trap.install()
            defer { trap.remove() }
            return body()
        }
    }

    private func explore(_ explorer: Explorer) -> Result<CheckReport, Failure> {
        var limits = CheckLimits()
        limits.runs = runs
        limits.depth = depth
        limits.randomRuns = random
        limits.seed = seed
        if let preemptions {
            limits.preemptions = preemptions
            limits.onlyBounded = true
            limits.randomRuns = 0
        }
        let checker = Checker(explorer, limits: limits)
        guard let schedule else { return .success(checker.check()) }
        let wanted: Schedule
        do throws(ScheduleError) {
            wanted = try Schedule(parsing: schedule)
        } catch {
            return .failure(
                Failure(.unusable, "error: --schedule, character \(error.position + 1): \(error.reason): \(schedule)"))
        }
        let run = explorer.replay(wanted)
        if let misfit = run.misfit {
            return .failure(
                Failure(
                    .unusable,
                    "error: the schedule does not fit: at point \(misfit + 1) task "
                        + "\(Schedule.letter(wanted.choices[misfit])) can't go on (it has ended, waits, or does not exist)"
                ))
        }
        if run.unused > 0 {
            return .failure(
                Failure(
                    .unusable,
                    "error: the schedule does not fit: the run is over after \(run.schedule.choices.count) points, "
                        + "\(run.unused) before the schedule's end"))
        }
        var report = CheckReport()
        report.stages = [
            CheckReport.Stage(
                kind: .schedule, coverage: Explorer.Coverage(runs: 1, points: UInt64(run.schedule.choices.count)))
        ]
        if !run.isClean {
            var finding = run
            finding.asked = wanted
            report.finding = finding
        }
        return .success(report)
    }
}
