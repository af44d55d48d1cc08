import Foundation
import JSONOutput
import Report

extension HostReport {
    /// What the project wants to reach.
    public var goals: [(text: String, reached: Bool)] {
        let resident = start.residentBytes
        return [
            (
                "a host of \(HostBenchmarkText.size(start.bytes)) starts in under 50 ms", start.milliseconds < 50
            ),
            (
                resident == nil
                    ? "its memory can't be told here" : "it takes under 100 MB of this machine's memory",
                resident.map { $0 < 100_000_000 } ?? false
            ),
            ("what it holds besides page frames is at most 1 % of its memory", footprint.percentBesides <= 1),
        ]
    }
}

/// The report of the host's benchmark.
public enum HostBenchmarkText {
    public static func render(_ report: HostReport) -> String {
        let rounds = "\(report.rounds) \(report.rounds == 1 ? "round" : "rounds")"
        var lines = [
            "a process of \(size(report.bytes)), 4 KiB pages, frames shuffled (seed \(report.seed)), median of \(rounds)",
            "",
            row(["", "time", "limit", "to limit", "the limit, for each page"]),
        ]
        for entry in report.rows {
            lines.append(
                row([
                    entry.operation.rawValue + (entry.operation.isWhole ? ", all pages" : ""),
                    duration(entry.nanoseconds, entry.operation, report),
                    duration(entry.limit, entry.operation, report),
                    number(entry.ratioToLimit), entry.operation.limit,
                ]))
        }
        let start = report.start
        lines.append(
            row([
                "start of a host of \(size(start.bytes))", "\(number(start.milliseconds)) ms",
                "\(number(start.limit)) ms", number(start.milliseconds / start.limit), "two mappings, a store to each",
            ]))
        lines += [""] + memory(report) + [""]
        for goal in report.goals {
            lines.append((goal.reached ? "reached  " : "missed   ") + goal.text)
        }
        return lines.joined(separator: "\n") + "\n"
    }

    private static func memory(_ report: HostReport) -> [String] {
        let held = report.footprint
        func share(_ bytes: Int) -> String {
            String(format: "%.3f %%", Double(bytes) * 100 / Double(held.modelled))
        }
        let resident = report.start.residentBytes.map { String(format: "%.1f MB", Double($0) / 1e6) }
        return [
            "held for \(size(held.modelled)) of pages:",
            "  page frames  \(share(held.pageFrames)), 64 bytes a page",
            "  page tables  \(share(held.pageTables)), those of the modelled process",
            "  all else     \(share(held.objects)), \(held.objects) bytes",
            "held by a host of \(size(report.start.bytes)) at its start: \(resident ?? "this machine doesn't tell")",
        ]
    }

    private static func row(_ cells: [String]) -> String {
        var line = cells[0].padding(toLength: 38, withPad: " ", startingAt: 0)
        for cell in cells[1..<4] { line += String(repeating: " ", count: max(1, 10 - cell.count)) + cell }
        return line + "   " + cells[4]
    }

    private static func duration(_ nanoseconds: Double, _ operation: HostOperation, _ report: HostReport) -> String {
        operation.isWhole
            ? "\(number(nanoseconds * Double(report.bytes >> 12) / 1e6)) ms" : "\(number(nanoseconds)) ns"
    }

    static func size(_ bytes: Int) -> String { bytes >= 1 << 30 ? "\(bytes >> 30) GiB" : "\(bytes >> 20) MiB" }

    static func number(_ value: Double) -> String {
        value.isNaN ? "-" : String(format: value < 10 ? "%.2f" : value < 100 ? "%.1f" : "%.0f", value)
    }

    public static func json(_ report: HostReport) -> String { jsonText(report) }
}
