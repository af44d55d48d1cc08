import Foundation
import JSONOutput

extension X86Report {
    /// What the project wants to reach.
    public var goals: [(text: String, reached: Bool)] {
        func time(_ operation: X86Operation) -> Double { row(operation)?.nanoseconds ?? .nan }
        func ratio(_ operation: X86Operation) -> Double { row(operation)?.ratioToLimit ?? .nan }
        var goals: [(String, Bool)] = [
            ("a fault, warm tables: at most 150 ns", time(.warmFault) <= 150),
            ("a fault, cold tables: at most 400 ns", time(.coldFault) <= 400),
            ("eager split: at least 200 million entries a second", time(.split) <= 5),
            ("eager split, to the limit: at most 2", ratio(.split) <= 2),
            ("write-protect, to the limit: at most 1.3", ratio(.writeProtect) <= 1.3),
            ("clear dirty, to the limit: at most 1.3", ratio(.clearDirty) <= 1.3),
        ]
        if let parallelSpeedup { goals.append(("two vCPUs: at least 1.7 times one", parallelSpeedup >= 1.7)) }
        if let anatomy { goals.append(("at most one line that all faults lock", anatomy.sharedLines <= 1)) }
        return goals
    }
}

/// The report of the benchmark of x86's MMUs.
public enum X86BenchmarkText {
    /// What was published about the kernel's own; sources in the documentation.
    static let published = [
        "eager split, x86 TDP, 96 vCPUs with 1 GiB each: 62 ns for each 4 KiB entry, 16 million a second and thread",
        "write-protecting for the log, arm64, 128 GiB: 19 ns for each entry",
        "the series itself: \"very measurable\" for clearing dirty bits and zapping; no figure",
        "faults of the TDP MMU (416 vCPUs): no figure was found",
    ]

    public static func render(_ report: X86Report) -> String {
        let rounds = "\(report.rounds) \(report.rounds == 1 ? "round" : "rounds")"
        var lines = [
            "faults in random order on \(size(report.warmPages)) (warm) and \(size(report.coldPages)) (cold),"
                + " frames shuffled (seed \(report.seed)), median of \(rounds), ns", "",
            row(["", "time", "limit", "to limit", "the limit, for each"]),
        ]
        for entry in report.rows {
            lines.append(
                row([
                    entry.operation.rawValue, number(entry.nanoseconds), number(entry.limit),
                    number(entry.ratioToLimit), entry.operation.limit,
                ]))
        }
        lines.append("")
        if let split = report.row(.split) {
            lines.append(String(format: "eager split: %.0f million entries a second", 1000 / split.nanoseconds))
        }
        if let speedup = report.parallelSpeedup, let limit = report.limitSpeedup {
            lines.append(
                String(
                    format: "two vCPUs: %.2f times the throughput of one; two threads of the limit: %.2f times; best of"
                        + " all rounds", speedup, limit))
        }
        if let anatomy = report.anatomy {
            lines.append(
                "one fault, warm: \(anatomy.instructions) instructions, \(anatomy.atomics) of them atomic"
                    + " read-modify-writes; lines that the faults of two vCPUs both lock: \(anatomy.sharedLines)")
        }
        lines += ["", "published:"] + published.map { "  " + $0 } + [""]
        for goal in report.goals { lines.append((goal.reached ? "reached  " : "missed   ") + goal.text) }
        return lines.joined(separator: "\n") + "\n"
    }

    private static func size(_ pages: Int) -> String {
        pages >= 1 << 18 ? "\(pages >> 18) GiB" : "\(pages >> 8) MiB"
    }

    private static func number(_ value: Double?) -> String { value.map { HostBenchmarkText.number($0) } ?? "-" }

    private static func row(_ cells: [String]) -> String {
        var line = cells[0].padding(toLength: 34, withPad: " ", startingAt: 0)
        for cell in cells[1..<4] { line += String(repeating: " ", count: max(1, 10 - cell.count)) + cell }
        return line + "   " + cells[4]
    }

    public static func json(_ report: X86Report) -> String { jsonText(report) }
}
