import Foundation
import JSONOutput
import Report

extension SlotReport {
    /// What the project wants to reach.
    public var goals: [(text: String, reached: Bool)] {
        rows.compactMap { row in
            row.operation.goal.map { goal in
                let wanted = goal < 1000 ? "\(Int(goal)) ns" : "\(Int(goal / 1000)) us"
                return ("\(row.operation.rawValue): at most \(wanted)", row.nanoseconds <= goal)
            }
        }
    }
}

/// The report of the slots' benchmark.
public enum SlotBenchmarkText {
    public static func render(_ report: SlotReport) -> String {
        let rounds = "\(report.rounds) \(report.rounds == 1 ? "round" : "rounds")"
        var lines = [
            "a VM with \(report.slots) slots (seed \(report.seed)), median of \(rounds), ns", "",
            row(["", "time", "limit", "to limit", "the limit, for each"]),
        ]
        for entry in report.rows {
            lines.append(
                row([
                    entry.operation.rawValue, HostBenchmarkText.number(entry.nanoseconds),
                    HostBenchmarkText.number(entry.limit),
                    HostBenchmarkText.number(entry.ratioToLimit), entry.operation.limit,
                ]))
        }
        lines.append("")
        for goal in report.goals { lines.append((goal.reached ? "reached  " : "missed   ") + goal.text) }
        return lines.joined(separator: "\n") + "\n"
    }

    private static func row(_ cells: [String]) -> String {
        var line = cells[0].padding(toLength: 48, withPad: " ", startingAt: 0)
        for cell in cells[1..<4] { line += String(repeating: " ", count: max(1, 10 - cell.count)) + cell }
        return line + "   " + cells[4]
    }

    public static func json(_ report: SlotReport) -> String { jsonText(report) }
}
