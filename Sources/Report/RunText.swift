import Audit
import Frames
import HostMemory
import Machine

/// The report of one run, for a terminal.
public struct RunText {
    let outcome: RunOutcome
    let terminal: Terminal
    let verbose: Bool
    private var lines: [String] = []

    /// - Parameters:
    ///   - story: the scenario's opening comment; its first line is shown.
    public static func render(
        _ outcome: RunOutcome, story: String, terminal: Terminal, verbose: Bool
    ) -> String {
        var text = RunText(outcome: outcome, terminal: terminal, verbose: verbose)
        text.head(story)
        text.phases()
        text.ledger()
        text.statistics()
        text.regions()
        text.findings()
        text.verdict()
        return text.lines.joined(separator: "\n") + "\n"
    }

    private init(outcome: RunOutcome, terminal: Terminal, verbose: Bool) {
        self.outcome = outcome
        self.terminal = terminal
        self.verbose = verbose
    }

    private mutating func head(_ story: String) {
        lines.append(
            terminal.bold(String(name: outcome.plan.name))
                + terminal.dim("  on \(outcome.architecture.name), policy \(outcome.policy.name)"))
        if let first = story.split(separator: "\n").first { lines.append(String(first)) }
    }

    private mutating func phases() {
        let text = ActionText(plan: outcome.plan)
        var phase = -1
        for result in outcome.steps {
            if result.phase != phase {
                phase = result.phase
                lines.append("")
                lines.append(terminal.bold(String(name: outcome.plan.phases[phase].name)))
            }
            let task = outcome.plan.phases[result.phase].tasks[result.task]
            let step = task.steps[result.step]
            var line = "  \(terminal.name(task.actor.text.padded(5)))  \(text.describe(step.action).padded(52))  "
            line += result.expected ? result.outcome.text : terminal.bad(result.outcome.text)
            if !result.expected {
                let wanted = step.expectation(on: outcome.architecture).text(repetition: result.repetition)
                line += terminal.bad("  expected \(wanted)")
                if result.repetition > 0 { line += terminal.bad(", repetition \(result.repetition)") }
                if step.line > 0 { line += terminal.dim("  (line \(step.line))") }
            }
            lines.append(line)
            detail(result)
        }
    }

    /// What happened in a step: the faults that are alike in one line, then what else moved.
    private mutating func detail(_ result: StepResult) {
        let events = outcome.events[result.events]
        if verbose {
            for event in events { lines.append(terminal.dim("           " + EventText.line(event))) }
            return
        }
        for line in faultLines(FaultStory.all(in: events)) { lines.append("           " + line) }
        let totals = EventTotals(Array(events))
        var parts: [String] = []
        if totals.notifierRanges > 0 { parts.append(counted(totals.notifierRanges, "notifier range")) }
        if totals.entriesZapped > 0 { parts.append(counted(totals.entriesZapped, "entry zapped", "entries zapped")) }
        let copies = events.count { $0.kind == .copyOnWrite }
        if copies > 0 { parts.append(counted(copies, "page copied on write", "pages copied on write")) }
        if totals.pinsTaken > 0 { parts.append("\(counted(totals.pinsTaken, "pin")) taken and dropped") }
        let logged = events.count { $0.kind == .dirtyLogged }
        if logged > 0 { parts.append("\(counted(logged, "page")) logged dirty") }
        if totals.flushes > 0 { parts.append(counted(totals.flushes, "TLB flush", "TLB flushes")) }
        if !parts.isEmpty { lines.append("           " + terminal.dim(parts.joined(separator: " · "))) }
    }

    private func faultLines(_ stories: [FaultStory]) -> [String] {
        var groups: [(first: FaultStory, last: FaultStory, count: Int)] = []
        for story in stories {
            if let group = groups.last, group.first.sentence == story.sentence, group.first.access == story.access {
                groups[groups.count - 1] = (group.first, story, group.count + 1)
            } else {
                groups.append((story, story, 1))
            }
        }
        var result = groups.prefix(4).map { group in
            let frames =
                group.count == 1 ? hex(group.first.guest) : "\(hex(group.first.guest))..\(hex(group.last.guest))"
            var line = "\(counted(group.count, "fault")) gfn \(frames)"
            if let first = group.first.frame, let last = group.last.frame {
                line += " → pfn " + (first == last ? hex(first) : "\(hex(first))..\(hex(last))")
            }
            return line + " · " + group.first.sentence
        }
        if groups.count > 4 { result.append("… \(groups.count - 4) more kinds of faults; --verbose shows all") }
        return result
    }

    private mutating func ledger() {
        let totals = outcome.totals
        lines.append("")
        lines.append(terminal.bold("ledger"))
        lines.append(
            "  references taken \(totals.referencesTaken), dropped \(totals.referencesDropped)"
                + " · pins taken \(totals.pinsTaken)"
                + " · released: \(totals.releasedUnused) unused, \(totals.releasedClean) accessed,"
                + " \(totals.releasedDirty) dirty")
        if outcome.holdings.isEmpty {
            lines.append("  held at the end: " + terminal.good("nothing"))
        }
        for holding in outcome.holdings {
            lines.append(
                terminal.bad(
                    "  held at the end: pfn \(hex(holding.frame)) by \(holding.holder):"
                        + " \(counted(holding.references, "reference")), \(counted(holding.pins, "pin"))"))
        }
    }

    private mutating func statistics() {
        lines.append("")
        lines.append(terminal.bold("statistics"))
        let shown = outcome.statistics.filter { verbose || $0.value != 0 && $0.statistic.isTelling }.map {
            "\($0.statistic) \($0.value)"
        }
        var line = " "
        for item in shown {
            if line.count + item.count + 2 > terminal.width {
                lines.append(line)
                line = " "
            }
            line += " " + item
        }
        lines.append(shown.isEmpty ? "  all zero" : line)
        for (name, expected, found) in outcome.statisticMismatches {
            lines.append(terminal.bad("  \(name) is \(found), expected \(expected)"))
        }
    }

    private mutating func regions() {
        lines.append("")
        lines.append(
            terminal.bold("regions") + terminal.dim("  pages; accessed and dirty by GUP / primary PTE / KVM / driver"))
        var table = Table(alignment: ["<", "<", ">", ">", ">", "<", "<", "<"])
        table.add(["", "kind", "host", "guest", "writable", "accessed", "dirty", "count"])
        for state in outcome.regions {
            let plan = outcome.plan.regions[state.region]
            let counts =
                state.pagesWithFrames == 0
                ? "no page frames"
                : state.lowestCount == state.highestCount
                    ? "\(state.lowestCount)" : "\(state.lowestCount)..\(state.highestCount)"
            table.add([
                String(name: plan.name), plan.kind.describing, "\(state.mapped)/\(plan.size >> pageShift)",
                "\(state.guestMapped)", "\(state.guestWritable)", by(state.accessedBy), by(state.dirtyBy), counts,
            ])
        }
        lines += table.lines(indent: 2)
    }

    private func by(_ counts: [Int]) -> String { counts.map(String.init).joined(separator: "/") }

    private mutating func findings() {
        guard !outcome.findings.isEmpty else { return }
        lines.append("")
        lines.append(terminal.bold("findings"))
        for group in FindingGroup.all(outcome.findings) {
            lines.append("  " + terminal.bad(group.code.padded(6)) + group.text)
        }
    }

    private mutating func verdict() {
        lines.append("")
        if outcome.isClean {
            lines.append(
                terminal.good("ok")
                    + ": \(counted(outcome.steps.count, "step")) as expected, every reference dropped, no rule broken")
            return
        }
        var parts: [String] = []
        if !outcome.unexpected.isEmpty { parts.append("\(counted(outcome.unexpected.count, "step")) not as expected") }
        if !outcome.findings.isEmpty { parts.append(counted(outcome.findings.count, "finding")) }
        if !outcome.holdings.isEmpty { parts.append("\(counted(outcome.holdings.count, "page")) still held") }
        if !outcome.statisticMismatches.isEmpty {
            parts.append("\(counted(outcome.statisticMismatches.count, "statistic")) off")
        }
        lines.append(terminal.bad("not ok") + ": " + parts.joined(separator: ", "))
    }
}

/// Findings of one rule with the same reason, told once.
struct FindingGroup {
    let code: String
    let text: String

    static func all(_ findings: [Finding]) -> [FindingGroup] {
        var groups: [(finding: Finding, count: Int)] = []
        for finding in findings {
            if let i = groups.firstIndex(where: {
                $0.finding.invariant == finding.invariant && $0.finding.reason == finding.reason
                    && $0.finding.driver == finding.driver
            }) {
                groups[i].count += 1
            } else {
                groups.append((finding, 1))
            }
        }
        return groups.map { group in
            var text = group.finding.sentence
            if group.finding.frame != Event.none { text += ", pfn \(hex(group.finding.frame))" }
            if group.finding.guest != Event.none { text += ", gfn \(hex(group.finding.guest))" }
            if let place = group.finding.place { text += ", \(place.text)" }
            if group.count > 1 { text += ", and \(group.count - 1) more" }
            return FindingGroup(code: group.finding.invariant.code, text: text)
        }
    }
}

extension Finding {
    /// What is wrong, and whose fault it is if a driver is to blame.
    var sentence: String {
        guard let driver else { return reason.text.description }
        return "driver \(driver.text.description): \(reason.text.description)"
    }
}

extension SlotPlace {
    var text: String { "slot \(slot) page \(page)" }
}

extension Invariant {
    /// `I-6`, `X19`, `RV-2`, `D-1`, `LOG-1`.
    public var code: String { "\(family)\(number)" }
}

extension StatisticName {
    /// Not of what every run has some.
    fileprivate var isTelling: Bool { self != .exits && self != .max_mmu_rmap_size }
}
