import Foundation
import JSONOutput
import Laboratory

/// The explorer's benchmark, for a terminal and for programs.
public enum ExplorerBenchmarkText {
    public static func render(_ result: ExplorerBenchmark.Result, _ terminal: Terminal) -> String {
        var table = Table(alignment: ["<", ">", "<"])
        table.add([
            "basic race, every order", "\(result.schedules)", result.isComplete ? "runs, complete" : "runs, not all",
        ])
        table.add([
            "", String(format: "%.2f", result.seconds),
            String(format: "seconds, median; shortest %.2f (to reach: 10)", result.shortest),
        ])
        let run = result.seconds / Double(result.schedules)
        table.add([
            "a run", String(format: "%.1f", run * 1e6),
            String(format: "us; without an explorer %.1f", result.plainRun / 1000),
        ])
        table.add(["runs a second", grouped(result.schedulesPerSecond), "(to reach: 50 000)"])
        table.add(["points a second", grouped(result.pointsPerSecond), "(to reach: 2 000 000)"])
        table.add(["points a run", String(format: "%.1f", Double(result.points) / Double(result.schedules)), ""])
        table.add(["start of a world", String(format: "%.1f", result.worldStart / 1000), "us (to reach: 10)"])
        table.add(["end of a world", String(format: "%.1f", result.worldEnd / 1000), "us, checks included"])
        table.add([
            "memory", String(format: "%.1f", Double(result.bytes) / 1e6),
            String(format: "MB; of the whole process %.1f (to reach: 300)", Double(result.peakMemory) / 1e6),
        ])
        var lines = [terminal.bold("explorer")] + table.lines(indent: 2) + [""]
        var found = Table(alignment: ["<", "<", ">", ">", ">"])
        found.add(["defect", "scenario", "preemptions", "runs", "seconds"])
        for defect in result.defects {
            found.add([
                defect.defect, defect.scenario, "\(defect.preemptions)", "\(defect.runs)",
                String(format: "%.2f", defect.seconds),
            ])
        }
        lines += found.lines(indent: 2)
        return lines.joined(separator: "\n") + "\n"
    }

    private static func grouped(_ number: Double) -> String {
        var digits = Array(String(Int(number)))
        var place = digits.count - 3
        while place > 0 {
            digits.insert(" ", at: place)
            place -= 3
        }
        return String(digits)
    }

    public static func json(_ result: ExplorerBenchmark.Result) -> String { jsonText(result) }
}
