import Foundation
import JSONOutput
import Report

extension IoctlReport {
    /// What the project wants to reach.
    public var goal: (text: String, reached: Bool) {
        let random = rows.first { $0.operation == .random }
        return ("at least 200,000 steps of random scripts a second", (random?.stepsPerSecond ?? 0) >= 200_000)
    }
}

/// The report of the benchmark of scripts.
public enum IoctlBenchmarkText {
    public static func render(_ report: IoctlReport) -> String {
        let rounds = "\(report.rounds) \(report.rounds == 1 ? "round" : "rounds")"
        var lines = [
            "steps of ioctl scripts on the model, seed \(report.seed), median of \(rounds);"
                + " the limit: a system call that does nothing, for each step",
            "", row(["", "ns/step", "limit", "to limit", "steps/s"]),
        ]
        for entry in report.rows {
            lines.append(
                row([
                    entry.operation.rawValue, number(entry.nanoseconds), number(entry.limit),
                    number(entry.nanoseconds / entry.limit), String(format: "%.0f", entry.stepsPerSecond),
                ]))
        }
        lines += ["", (report.goal.reached ? "reached  " : "missed   ") + report.goal.text]
        return lines.joined(separator: "\n") + "\n"
    }

    private static func row(_ cells: [String]) -> String {
        var line = cells[0].padding(toLength: 42, withPad: " ", startingAt: 0)
        for cell in cells.dropFirst() { line += String(repeating: " ", count: max(1, 10 - cell.count)) + cell }
        return line
    }

    private static func number(_ value: Double) -> String {
        String(format: value < 10 ? "%.2f" : value < 100 ? "%.1f" : "%.0f", value)
    }

    public static func json(_ report: IoctlReport) -> String { jsonText(report) }
}
