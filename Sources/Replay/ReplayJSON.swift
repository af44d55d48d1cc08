import JSONOutput

extension ReplayText {
    private struct Document: Encodable {
        struct Step: Encodable {
            var name: String
            var compared: Int
            var differences: [Difference]
        }
        struct Difference: Encodable {
            var kind: String
            var text: String
            var detail: String
        }
        struct Explained: Encodable {
            var rule: String
            var kernelRule: String
            var count: Int
        }
        var file: String
        var compared: Int
        var differences: Int
        var explained: [Explained]
        var findings: [String]
        var leftOut: [String]
        var steps: [Step]
    }

    /// The report as JSON, keys sorted, the same bytes in every run.
    public static func json(_ report: ReplayReport) -> String {
        let document = Document(
            file: report.file, compared: report.compared, differences: report.differences,
            explained: report.absorbed.map {
                .init(rule: $0.rule.name, kernelRule: $0.rule.kernelRule, count: $0.count)
            },
            findings: report.findings, leftOut: report.leftOut,
            steps: report.steps.map { step in
                .init(
                    name: step.name, compared: step.compared,
                    differences: step.differences.map {
                        .init(kind: $0.kind.rawValue, text: $0.text, detail: $0.detail)
                    })
            })
        return jsonText(document)
    }
}
