import Yams

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
        difference.kind == kind && Self.fits(step, stepName) && Self.fits(text, difference.text)
    }

    /// Whether `text` fits a pattern as a whole.
    static func fits(_ pattern: String, _ text: String) -> Bool {
        let parts = pattern.split(separator: "*", omittingEmptySubsequences: false)
        guard let first = parts.first, let last = parts.last, parts.count > 1 else { return pattern == text }
        guard text.hasPrefix(first), text.count >= first.count + last.count, text.hasSuffix(last) else { return false }
        var rest = text.dropFirst(first.count).dropLast(last.count)
        for part in parts.dropFirst().dropLast() where !part.isEmpty {
            guard let range = rest.firstRange(of: part) else { return false }
            rest = rest[range.upperBound...]
        }
        return true
    }
}

/// What is wrong with a file of explanations.
public struct ExplanationError: Error, Sendable, Equatable, CustomStringConvertible {
    public var file: String
    public var line: Int
    public var problem: String
    public var advice: String
    public var description: String { "\(file):\(line): \(problem); \(advice)" }
}

/// A file of explanations, in YAML: a list of rules with `name`, `kernel_rule`, `kind`, `step`, `text`, `must_not_match`.
public struct ExplanationFile: Sendable {
    public var rules: [Explanation]

    public init(text: String, file: String) throws(ExplanationError) {
        let root: Node?
        do { root = try Yams.compose(yaml: text) } catch {
            throw ExplanationError(
                file: file, line: 1, problem: "no YAML (\(error))", advice: "a list of rules is wanted")
        }
        guard let root else {
            rules = []
            return
        }
        guard let list = root.sequence else {
            throw ExplanationError(file: file, line: 1, problem: "no list", advice: "each rule begins with `- name:`")
        }
        var rules: [Explanation] = []
        for node in list { rules.append(try Self.rule(node, file)) }
        self.rules = rules
    }

    private static let keys = ["name", "kernel_rule", "kind", "step", "text", "must_not_match"]

    private static func rule(_ node: Node, _ file: String) throws(ExplanationError) -> Explanation {
        func fail(_ node: Node, _ problem: String, _ advice: String) -> ExplanationError {
            ExplanationError(file: file, line: node.mark?.line ?? 1, problem: problem, advice: advice)
        }
        guard let mapping = node.mapping else { throw fail(node, "no rule", "a rule has the keys \(list(keys))") }
        for (key, _) in mapping {
            guard let name = key.string, keys.contains(name) else {
                throw fail(key, "unknown key `\(key.string ?? "?")`", "a rule has the keys \(list(keys))")
            }
        }
        func text(_ key: String) throws(ExplanationError) -> String {
            guard let value = mapping[key]?.string, !value.isEmpty else {
                throw fail(mapping[key] ?? node, "`\(key)` is missing", "give it a text")
            }
            return value
        }
        guard let kind = ReplayDifference.Kind(rawValue: try text("kind")) else {
            throw fail(mapping["kind"] ?? node, "unknown kind", "one of missing, extra, frame, result")
        }
        let refused = mapping["must_not_match"]?.sequence?.compactMap(\.string) ?? []
        guard !refused.isEmpty else {
            throw fail(
                node, "`must_not_match` is missing", "list at least one difference that the rule must leave alone")
        }
        let rule = Explanation(
            name: try text("name"), kernelRule: try text("kernel_rule"), kind: kind, step: try text("step"),
            text: try text("text"), mustNotMatch: refused)
        for each in refused where Explanation.fits(rule.text, each) {
            throw fail(node, "rule `\(rule.name)` matches \"\(each)\", which it must not", "make `text` narrower")
        }
        return rule
    }

    private static func list(_ words: [String]) -> String { words.map { "`\($0)`" }.joined(separator: ", ") }
}

/// What one rule explained in one replay.
public struct Absorption: Sendable {
    public var rule: Explanation
    public var count: Int
}

extension ReplayReport {
    /// Of all comparisons, in thousandths of a per cent: more may not be explained away.
    static let mostExplained = 500

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
    public var explainsTooMuch: Bool { explained * 100_000 > compared * Self.mostExplained }
    /// Whether the model did what the kernel did.
    public var isFaithful: Bool { differences == 0 && findings.isEmpty && !explainsTooMuch }
}
