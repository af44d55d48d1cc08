import Audit
import Explorer
import Foundation
import Frames
import JSONOutput
import Laboratory
import Machine

/// The report of a check, for a terminal and for programs.
public struct CheckText {
    let plan: Plan
    let file: String
    let policy: PolicyName
    let architecture: Architecture
    let defect: Exhibit?
    /// The command that makes the same again, up to the schedule.
    let command: String

    public init(
        plan: Plan, file: String, policy: PolicyName, architecture: Architecture, defect: Exhibit?, command: String
    ) {
        self.plan = plan
        self.file = file
        self.policy = policy
        self.architecture = architecture
        self.defect = defect
        self.command = command
    }

    // MARK: For people

    public func render(
        _ report: CheckReport, _ subject: WorldSubject, _ explorer: Explorer, _ terminal: Terminal
    ) -> String {
        var lines = [
            terminal.bold(String(name: plan.name))
                + terminal.dim("  every order on \(architecture.name), policy \(policy.name)")
        ]
        if let defect { lines.append("defect \(terminal.warn(defect.name)): \(defect.mechanism)") }
        lines.append("")
        for stage in report.stages { lines.append("  " + sentence(stage)) }
        if let run = report.finding {
            lines += finding(run, report, Story(run, subject, explorer), terminal)
        } else {
            lines += ["", terminal.good("ok") + ": " + verdict(report)]
        }
        return lines.joined(separator: "\n") + "\n"
    }

    private func sentence(_ stage: CheckReport.Stage) -> String {
        let coverage = stage.coverage
        let name =
            switch stage.kind {
            case .everyOrder: "every order"
            case .preemptions(let bound): "at most \(counted(bound, "preemption"))"
            case .random: "at random"
            case .schedule: "the schedule asked for"
            }
        var text = "\(name.padded(24)) \(counted(coverage.runs, "run")), \(counted(Int(coverage.points), "point"))"
        if stage.kind == .everyOrder, coverage.isComplete { text += ", complete" }
        if case .preemptions = stage.kind, coverage.isCompleteWithinBound { text += ", complete within the bound" }
        if coverage.wasTooDeep { text += ", some cut at the depth limit" }
        return text
    }

    private func verdict(_ report: CheckReport) -> String {
        if report.isComplete { return "no order goes wrong" }
        if report.stages.contains(where: { $0.kind == .schedule }) { return "this order does not go wrong" }
        if let bound = report.completeBound {
            return
                "no order with at most \(counted(bound, "preemption")) goes wrong; with more, not every order was run"
        }
        return "nothing found, but not every order was run; see --runs"
    }

    private func finding(
        _ run: Explorer.Run, _ report: CheckReport, _ story: Story, _ terminal: Terminal
    ) -> [String] {
        var lines = [
            "",
            terminal.bold("what happens")
                + terminal.dim("  in phase \"\(String(name: plan.phases[story.phase].name))\""),
        ]
        var table = Table()
        let page = story.page.map { "refs of \(hex($0.number))" }
        table.add(
            ["point"] + story.tasks.enumerated().map { "\(Schedule.letter(UInt8($0.offset))) \($0.element)" }
                + (page.map { [$0] } ?? []))
        for row in story.rows {
            for cells in rows(row, story, page != nil) { table.add(cells) }
        }
        lines += table.lines(indent: 2)
        lines.append("")
        for waiter in story.stuck { lines.append("  can't go on  \(waiter)") }
        lines += broken(run, story, terminal)
        let fewest =
            report.stages.contains { $0.kind == .schedule }
            ? "" : report.isFewest ? " (no order with fewer shows it)" : ""
        lines.append(
            "  \(counted(run.preemptions, "preemption"))\(fewest), \(counted(run.schedule.choices.count, "point"))")
        lines.append("")
        lines.append("reproduce: \(reproduce(run))")
        return lines
    }

    /// A row of the table for each event of a transition; the page's count in the last.
    private func rows(_ row: Story.Row, _ story: Story, _ withCount: Bool) -> [[String]] {
        row.events.enumerated().map { i, event in
            var cells = [i == 0 ? "\(row.point)" : ""]
            for task in story.tasks.indices { cells.append(task == row.task ? EventPhrase.text(event) : "") }
            if withCount { cells.append(i == row.events.count - 1 ? row.references.map { "\($0)" } ?? "-" : "") }
            return cells
        }
    }

    private func broken(_ run: Explorer.Run, _ story: Story, _ terminal: Terminal) -> [String] {
        var lines: [String] = []
        switch run.ending {
        case .finished: break
        case .stuck(.deadlock): lines.append("  \(terminal.bad("deadlock"))  tasks wait for each other's locks")
        case .stuck(.lostWakeUp):
            lines.append("  \(terminal.bad("lost wake-up"))  a task sleeps and nobody is left to wake it")
        case .stuck(.livelock): lines.append("  \(terminal.bad("livelock"))  a task tries again for ever")
        case .endless:
            lines.append("  \(terminal.bad("livelock"))  the run does not end, though every task gets its turn")
        }
        for finding in story.findings.prefix(3) {
            var text = "  \(terminal.bad(finding.invariant.code))  \(finding.sentence)"
            if finding.frame != Event.none { text += ", pfn \(hex(finding.frame))" }
            if finding.guest != Event.none { text += ", gfn \(hex(finding.guest))" }
            if let place = finding.place { text += ", \(place.text)" }
            lines.append(text)
            lines.append(terminal.dim("       the rule: \(finding.invariant.statement)"))
        }
        let action = ActionText(plan: plan)
        for result in story.unexpected.prefix(3) {
            let step = plan.phases[result.phase].tasks[result.task].steps[result.step]
            lines.append(
                "  \(terminal.bad("expect"))  \(action.describe(step.action)): \(result.outcome.text), expected "
                    + step.expectation(on: architecture).text(repetition: result.repetition))
        }
        return lines
    }

    private func reproduce(_ run: Explorer.Run) -> String { "\(command) --schedule \(run.asked ?? run.schedule)" }

    // MARK: For programs

    private struct JSONReport: Codable {
        struct Stage: Codable {
            var search: String
            var preemptions: Int?
            var runs: Int
            var points: UInt64
            var complete: Bool
        }
        struct Row: Codable {
            var point: Int
            var task: String
            var events: [String]
            var references: Int?
        }
        struct Found: Codable {
            var rules: [String]
            var reasons: [String]
            var unexpected: [String]
            var ending: String
            var preemptions: Int
            var fewest: Bool
            var schedule: String
            var tasks: [String]
            var page: String?
            var story: [Row]
            var reproduce: String
        }
        var scenario: String
        var architecture: String
        var policy: String
        var defect: String?
        var verdict: String
        var complete: Bool
        var completeWithinPreemptions: Int?
        var searches: [Stage]
        var finding: Found?
    }

    public func json(_ report: CheckReport, _ subject: WorldSubject, _ explorer: Explorer) -> String {
        var result = JSONReport(
            scenario: String(name: plan.name), architecture: architecture.name, policy: policy.name,
            defect: defect?.name, verdict: report.finding == nil ? "ok" : "found", complete: report.isComplete,
            completeWithinPreemptions: report.completeBound, searches: report.stages.map(stage))
        if let run = report.finding { result.finding = found(run, report, Story(run, subject, explorer)) }
        return jsonText(result)
    }

    private func stage(_ stage: CheckReport.Stage) -> JSONReport.Stage {
        var entry = JSONReport.Stage(
            search: "", runs: stage.coverage.runs, points: stage.coverage.points, complete: stage.coverage.isComplete)
        switch stage.kind {
        case .everyOrder: entry.search = "every order"
        case .preemptions(let bound):
            entry.search = "preemptions"
            entry.preemptions = bound
            entry.complete = stage.coverage.isCompleteWithinBound
        case .random: entry.search = "random"
        case .schedule: entry.search = "schedule"
        }
        return entry
    }

    private func found(_ run: Explorer.Run, _ report: CheckReport, _ story: Story) -> JSONReport.Found {
        JSONReport.Found(
            rules: story.findings.map(\.invariant.code), reasons: story.findings.map(\.sentence),
            unexpected: story.unexpected.map(\.outcome.text), ending: "\(run.ending)", preemptions: run.preemptions,
            fewest: report.isFewest, schedule: "\(run.asked ?? run.schedule)", tasks: story.tasks,
            page: story.page.map { hex($0.number) },
            story: story.rows.map {
                JSONReport.Row(
                    point: $0.point, task: Schedule.letter(UInt8($0.task)), events: $0.events.map(EventPhrase.text),
                    references: $0.references)
            },
            reproduce: reproduce(run))
    }
}

/// The museum as a table, and as JSON.
public enum MuseumText {
    public static func render(_ terminal: Terminal) -> String {
        var lines: [String] = []
        for exhibit in Exhibit.all {
            lines.append(
                terminal.bold(exhibit.name) + (exhibit.policy.map { terminal.dim("  policy \($0.name)") } ?? "")
                    + (exhibit.architecture.map { terminal.dim("  on \($0.name)") } ?? ""))
            lines.append("  \(exhibit.mechanism)")
            lines.append(terminal.dim("  \(exhibit.reference)"))
            let places = zip(exhibit.scenarios, exhibit.fewest).map { "\($0) (\(counted($1, "preemption")))" }
            lines.append("  shows in \(places.joined(separator: " and "))")
        }
        return lines.joined(separator: "\n") + "\n"
    }

    private struct Entry: Codable {
        var name: String
        var mechanism: String
        var reference: String
        var policy: String?
        var architecture: String?
        var scenarios: [String]
        var fewestPreemptions: [Int]
    }

    public static func json() -> String {
        let entries = Exhibit.all.map {
            Entry(
                name: $0.name, mechanism: $0.mechanism, reference: $0.reference, policy: $0.policy?.name,
                architecture: $0.architecture?.name, scenarios: $0.scenarios, fewestPreemptions: $0.fewest)
        }
        return jsonText(entries)
    }
}
