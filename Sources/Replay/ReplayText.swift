/// The report as text.
public enum ReplayText {
    public static func render(_ report: ReplayReport, show: Int) -> String {
        render(report, heading: "replayed on the model's shadow MMU, Linux 6.18", show: show)
    }

    package static func render(_ report: ReplayReport, heading: String, show: Int) -> String {
        var text = "\(report.file)  \(heading)\n\n"
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
        for note in report.leftOut { text += "  left out: \(note)\n" }
        for each in report.absorbed {
            text += "  explained: \(each.count) by \(each.rule.name) (\(each.rule.kernelRule))\n"
        }
        text += "\n\(report.compared) comparisons, \(report.differences) differ"
        if report.explained > 0 {
            text += ", \(report.explained) explained\(String(share: report.explained, of: report.compared))"
        }
        text += "\n"
        if report.explainsTooMuch { text += "too much is explained: more than 0.5 % of the comparisons\n" }
        return text
    }
}

extension String {
    /// ` (0.016 %)`.
    fileprivate init(share part: Int, of whole: Int) {
        let thousandths = whole > 0 ? (part * 100_000 + whole / 2) / whole : 0
        let fraction = "\(thousandths % 1000)"
        let padded = String(repeating: "0", count: 3 - fraction.count) + fraction
        self = " (\(thousandths / 1000).\(padded) %)"
    }
}
