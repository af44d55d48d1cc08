import Audit
import Foundation
import JSONOutput
import Machine

/// One scenario under every policy and MMU: what each broke. `expect` stands for a step or statistic that differs.
public struct Comparison: Sendable {
    public struct Cell: Sendable, Equatable {
        public var policy: PolicyName
        public var architecture: Architecture
        /// Rule codes and `expect`, sorted, each once. Empty: all is well.
        public var deviations: [String]
        /// What the scenario's file says is known.
        public var known: [String]
        /// The first unexpected step, in words.
        public var detail: String?
        public var isAsKnown: Bool { deviations == known }
    }

    public var scenario: String
    public var cells: [Cell] = []

    public init(scenario: String) { self.scenario = scenario }

    /// Whether every cell is as the file says.
    public var isAsKnown: Bool { cells.allSatisfy(\.isAsKnown) }

    public mutating func add(_ outcome: RunOutcome, known: [String]) {
        cells.append(
            Cell(
                policy: outcome.policy, architecture: outcome.architecture,
                deviations: Self.deviations(of: outcome), known: known.sorted(), detail: Self.detail(of: outcome)))
    }

    public static func deviations(of outcome: RunOutcome) -> [String] {
        var codes = Set(outcome.findings.map(\.invariant.code))
        if !outcome.unexpected.isEmpty || !outcome.statisticMismatches.isEmpty { codes.insert("expect") }
        return codes.sorted()
    }

    private static func detail(of outcome: RunOutcome) -> String? {
        guard let step = outcome.unexpected.first else { return nil }
        let plan = outcome.plan.phases[step.phase].tasks[step.task].steps[step.step]
        let wanted = plan.expectation(on: outcome.architecture).text(repetition: step.repetition)
        return "\(ActionText(plan: outcome.plan).describe(plan.action)): \(step.outcome.text), expected \(wanted)"
    }

    public func render(_ terminal: Terminal) -> String {
        let policies = PolicyName.allCases
        var table = Table()
        table.add([""] + policies.map(\.name))
        for architecture in Architecture.allCases {
            guard cells.contains(where: { $0.architecture == architecture }) else { continue }
            table.add(
                [architecture.name]
                    + policies.map { policy in
                        guard let cell = cell(policy, architecture) else { return "-" }
                        let text = cell.deviations.isEmpty ? "ok" : cell.deviations.joined(separator: " ")
                        return cell.isAsKnown ? text : text + " !"
                    })
        }
        var lines = [terminal.bold(scenario), ""]
        lines += table.lines(indent: 2)
        lines.append("")
        for cell in cells {
            guard let detail = cell.detail else { continue }
            lines.append("  \(cell.policy.name) on \(cell.architecture.name): \(detail)")
        }
        if cells.contains(where: { $0.detail != nil }) { lines.append("") }
        for cell in cells where !cell.isAsKnown {
            let known = cell.known.isEmpty ? "none" : cell.known.joined(separator: " ")
            lines.append(
                terminal.bad("not as known") + ": \(cell.policy.name) on \(cell.architecture.name), known: \(known)")
        }
        lines.append(
            isAsKnown
                ? terminal.good("ok") + ": every cell is what the scenario says"
                : terminal.bad("not ok") + ": marked cells (!) differ from the scenario's `known:`")
        return lines.joined(separator: "\n") + "\n"
    }

    private func cell(_ policy: PolicyName, _ architecture: Architecture) -> Cell? {
        cells.first { $0.policy == policy && $0.architecture == architecture }
    }

    private struct JSON: Encodable {
        struct Entry: Encodable {
            var policy: String
            var architecture: String
            var deviations: [String]
            var known: [String]
            var detail: String?
        }
        var scenario: String
        var verdict: String
        var cells: [Entry]
    }

    public func json() -> String {
        jsonText(
            JSON(
                scenario: scenario, verdict: isAsKnown ? "ok" : "not ok",
                cells: cells.map {
                    JSON.Entry(
                        policy: $0.policy.name, architecture: $0.architecture.name, deviations: $0.deviations,
                        known: $0.known, detail: $0.detail)
                }))
    }
}
