import Foundation
import JSONOutput
import Report

extension BenchmarkReport {
    /// What the project wants to reach: a name, the number, the bound, and whether it holds.
    public var goals: [(text: String, value: Double, bound: String, reached: Bool)] {
        func ratio(_ operation: Operation, _ policy: String, _ path: KeyPath<BenchmarkRow, Double>) -> Double {
            rows.first { $0.operation == operation && $0.policy == policy }?[keyPath: path] ?? .nan
        }
        let zap = ratio(.zap, "precise", \.ratioToLimit)
        let clear = ratio(.clearDirty, "precise", \.ratioToLimit)
        let trackedZap = ratio(.zap, "tracked", \.ratioToPrecise)
        let trackedClear = ratio(.clearDirty, "tracked", \.ratioToPrecise)
        return [
            ("precise, zap all, to the limit", zap, "at most 1.3", zap <= 1.3),
            ("precise, clear dirty, to the limit", clear, "at most 1.3", clear <= 1.3),
            ("tracked, zap all, to precise", trackedZap, "at least 1.8", trackedZap >= 1.8),
            ("tracked, clear dirty, to precise", trackedClear, "at least 1.8", trackedClear >= 1.8),
        ]
    }
}

/// The report of a benchmark.
public enum BenchmarkText {
    public static func render(_ report: BenchmarkReport, _ terminal: Terminal) -> String {
        var lines = [
            "guest \(size(report.guestBytes)), 4 KiB entries, frames shuffled (seed \(report.seed)),"
                + " median of \(report.rounds) \(report.rounds == 1 ? "round" : "rounds")",
            "",
            row(["", "policy", "ns/entry", "limit", "to limit", "to precise", "instruction"]),
        ]
        for entry in report.rows {
            lines.append(
                row([
                    entry.policy == "precise" ? entry.operation.rawValue : "", entry.policy, number(entry.nanoseconds),
                    number(entry.limit), number(entry.ratioToLimit), number(entry.ratioToPrecise),
                    entry.policy == "precise" ? entry.operation.instruction : "",
                ]))
        }
        lines.append("")
        for goal in report.goals {
            let state = goal.reached ? "reached" : "missed"
            lines.append(
                "\(state.padding(toLength: 8, withPad: " ", startingAt: 0)) \(goal.text): \(number(goal.value)) (\(goal.bound))"
            )
        }
        return lines.joined(separator: "\n") + "\n"
    }

    private static func row(_ cells: [String]) -> String {
        let widths = [18, 8, 9, 7, 9, 11, 0]
        var line = ""
        for (cell, width) in zip(cells, widths) {
            let padding = String(repeating: " ", count: max(0, width - cell.count))
            line += width >= 18 || width == 8 ? cell + padding : width == 0 ? "   " + cell : padding + cell
        }
        while line.last == " " { line.removeLast() }
        return line
    }

    private static func size(_ bytes: UInt64) -> String {
        bytes >= 1 << 30 ? "\(bytes >> 30) GiB" : "\(bytes >> 20) MiB"
    }

    private static func number(_ value: Double) -> String {
        value.isNaN ? "-" : String(format: value < 100 ? "%.2f" : "%.0f", value)
    }

    public static func json(_ report: BenchmarkReport) -> String { jsonText(report) }
}
