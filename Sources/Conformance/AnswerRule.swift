import Explanations
import IoctlScript

/// Why two answers to a line of a script differ, and neither is wrong: a rule of a file.
public struct AnswerRule: Sendable, Equatable {
    public var name: String
    /// What the kernel does there, and where that is known from.
    public var kernelRule: String
    var pattern: Pattern

    /// Patterns in which `*` stands for anything.
    struct Pattern: Sendable, Equatable {
        /// The line of the script.
        var line: String
        /// Each fits a line before it.
        var after: [String]
        /// The answers.
        var model: String
        var kvm: String
    }

    /// The line's source, those of the lines before, and the two answers.
    struct Difference: Sendable, Equatable {
        var line: String
        var before: [String]
        var model: String
        var kvm: String
    }

    func matches(_ difference: Difference) -> Bool {
        fits(pattern.line, difference.line) && fits(pattern.model, difference.model)
            && fits(pattern.kvm, difference.kvm)
            && pattern.after.allSatisfy { wanted in difference.before.contains { fits(wanted, $0) } }
    }

    // MARK: Reading

    /// Rules/known.yaml, which is part of the program.
    public static func known() throws(ExplanationError) -> [AnswerRule] {
        try list(String(decoding: PackageResources.known_yaml, as: UTF8.self), file: "known.yaml")
    }

    private static let caseKeys = ["line", "after", "model", "kvm"]
    private static let keys = ["name", "kernel_rule"] + caseKeys + ["must_not_match"]

    /// The rules of a file in YAML: a list with `name`, `kernel_rule`, `line`, `after` (may be left out), `model`, `kvm`, and
    /// in `must_not_match` at least one difference that the rule must leave alone, with `line`, `after`, `model`, `kvm`.
    public static func list(_ text: String, file: String) throws(ExplanationError) -> [AnswerRule] {
        var rules: [AnswerRule] = []
        for node in try RuleNode.list(text, file: file, keys: keys) { rules.append(try AnswerRule(node)) }
        return rules
    }

    private init(_ node: RuleNode) throws(ExplanationError) {
        name = try node.text("name")
        kernelRule = try node.text("kernel_rule")
        pattern = Pattern(
            line: try node.text("line"), after: node.texts("after"), model: try node.text("model"),
            kvm: try node.text("kvm"))
        for other in try node.mustNotMatch(keys: Self.caseKeys) {
            let difference = Difference(
                line: try other.text("line"), before: other.texts("after"), model: try other.text("model"),
                kvm: try other.text("kvm"))
            guard !matches(difference) else {
                throw other.error(
                    "rule `\(name)` matches \"\(difference.line)\", which it must not", "make its patterns narrower")
            }
        }
    }
}

extension [AnswerRule] {
    /// The first that says why the answers to a script's line differ.
    func first(explaining script: Script, _ index: Int, model: String, kvm: String) -> AnswerRule? {
        let difference = AnswerRule.Difference(
            line: script.source(of: script.lines[index]),
            before: script.lines[..<index].map { script.source(of: $0) }, model: model, kvm: kvm)
        return first { $0.matches(difference) }
    }
}
