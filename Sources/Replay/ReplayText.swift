/// The report as text.
public enum ReplayText {
    public static func render(_ report: ReplayReport, show: Int) -> String {
        var text = "\(report.file)  replayed on the model's shadow MMU, Linux 6.18\n\n"
        for step in report.steps {
            let name =
                step.name.count < 44 ? step.name + String(repeating: " ", count: 44 - step.name.count) : step.name
            let counts = step.differences.isEmpty ? "" : "  \(step.differences.count) differ"
            text += "  \(name) \(step.compared) compared\(counts)\n"
            for difference in step.differences.prefix(show) {
                let detail = difference.detail.isEmpty ? "" : ": \(difference.detail)"
                text += "      \(difference.kind.rawValue): \(difference.text)\(detail)\n"
            }
            if step.differences.count > show { text += "      and \(step.differences.count - show) more\n" }
        }
        for finding in report.findings { text += "  finding: \(finding)\n" }
        text += "\n\(report.compared) comparisons, \(report.differences) differ"
        return text + (report.compared > 0 ? String(percent: report) : "") + "\n"
    }
}

extension String {
    fileprivate init(percent report: ReplayReport) {
        let thousandths = (report.differences * 100_000 + report.compared / 2) / report.compared
        let fraction = thousandths % 1000
        let padded = String(repeating: "0", count: 3 - "\(fraction)".count) + "\(fraction)"
        self = " (\(thousandths / 1000).\(padded) %)"
    }
}
