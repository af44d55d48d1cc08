import Explanations

/// Why a difference between a recorded kernel and the model is none: a rule of a file.
public struct Explanation: Sendable, Equatable {
    public var name: String
    /// What the kernel does there that the model leaves out, and where that is known from.
    public var kernelRule: String
    public var kind: ReplayDifference.Kind
    /// Patterns, in which `*` stands for anything.
    public var step: String
    public var text: String
    /// Texts of differences in such a step that the rule must not match. Checked when the file is read.
    public var mustNotMatch: [String]

    func matches(_ difference: ReplayDifference, in stepName: String) -> Bool {
        difference.kind == kind && fits(step, stepName) && fits(text, difference.text)
    }
}

/// A file of explanations, in YAML: a list of rules with `name`, `kernel_rule`, `kind`, `step`, `text`, `must_not_match`.
public struct ExplanationFile: Sendable {
    public var rules: [Explanation]

    public init(text: String, file: String) throws(ExplanationError) {
        var rules: [Explanation] = []
        for node in try RuleNode.list(text, file: file, keys: Self.keys) { rules.append(try Self.rule(node)) }
        self.rules = rules
    }

    private static let keys = ["name", "kernel_rule", "kind", "step", "text", "must_not_match"]

    private static func rule(_ node: RuleNode) throws(ExplanationError) -> Explanation {
        guard let kind = ReplayDifference.Kind(rawValue: try node.text("kind")) else {
            throw node.error(at: "kind", "unknown kind", "one of missing, extra, frame, result")
        }
        let rule = Explanation(
            name: try node.text("name"), kernelRule: try node.text("kernel_rule"), kind: kind,
            step: try node.text("step"), text: try node.text("text"), mustNotMatch: try node.mustNotMatch())
        for each in rule.mustNotMatch where fits(rule.text, each) {
            throw node.error("rule `\(rule.name)` matches \"\(each)\", which it must not", "make `text` narrower")
        }
        return rule
    }
}

/// What one rule explained in one replay.
public struct Absorption: Sendable {
    public var rule: Explanation
    public var count: Int
}

extension ReplayReport {
    /// Takes out of the steps what `rules` explain, each difference by the first rule that matches.
    public mutating func explain(_ rules: [Explanation]) {
        var counts = [Int](repeating: 0, count: rules.count)
        for i in steps.indices {
            let name = steps[i].name
            steps[i].differences.removeAll { difference in
                guard let rule = rules.firstIndex(where: { $0.matches(difference, in: name) }) else {
                    return false
                }
                counts[rule] += 1
                return true
            }
        }
        absorbed = zip(rules, counts).filter { $0.1 > 0 }.map { Absorption(rule: $0.0, count: $0.1) }
    }

    public var explained: Int { absorbed.reduce(0) { $0 + $1.count } }
    /// Whether so much was explained that the explanations are the findings.
    public var explainsTooMuch: Bool { Explanations.explainsTooMuch(explained, of: compared) }
    /// Whether the model did what the kernel did.
    public var isFaithful: Bool { differences == 0 && findings.isEmpty && !explainsTooMuch }
}
