// Explanations: files of rules that say why a difference between a kernel and the model is none.
//
// It guarantees that a rule says what it rests on, and what it must not match; a file in which a rule matches that, or a key
// is unknown, is refused as a whole. What a rule matches is its reader's affair: recordings have other differences than
// answers of calls.

import Yams

/// What is wrong with a file of explanations.
public struct ExplanationError: Error, Sendable, Equatable, CustomStringConvertible {
    public var file: String
    public var line: Int
    public var problem: String
    public var advice: String
    public var description: String { "\(file):\(line): \(problem); \(advice)" }
}

/// Of all comparisons, in thousandths of a per cent: more may not be explained away.
public let mostExplained = 500

/// Whether so much was explained that the explanations are the findings.
public func explainsTooMuch(_ explained: Int, of compared: Int) -> Bool {
    explained * 100_000 > compared * mostExplained
}

/// Whether `text` fits a pattern, in which `*` stands for anything, as a whole.
public func fits(_ pattern: String, _ text: String) -> Bool {
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

/// A mapping of a file: a rule, or a case that it must not match.
public struct RuleNode {
    private let mapping: Node.Mapping
    private let node: Node
    private let file: String

    /// The rules of a file in YAML, a list; each has no keys but `keys`.
    public static func list(
        _ text: String, file: String, keys: [String]
    ) throws(ExplanationError) -> [RuleNode] {
        let root: Node?
        do { root = try Yams.compose(yaml: text) } catch {
            throw ExplanationError(
                file: file, line: 1, problem: "no YAML (\(error))", advice: "a list of rules is wanted")
        }
        guard let root else { return [] }
        guard let list = root.sequence else {
            throw ExplanationError(file: file, line: 1, problem: "no list", advice: "each rule begins with `- name:`")
        }
        var rules: [RuleNode] = []
        for node in list { rules.append(try RuleNode(node, file, keys)) }
        return rules
    }

    private init(_ node: Node, _ file: String, _ keys: [String]) throws(ExplanationError) {
        self.node = node
        self.file = file
        let known = "a rule has the keys " + keys.map { "`\($0)`" }.joined(separator: ", ")
        func fail(_ node: Node, _ problem: String) -> ExplanationError {
            ExplanationError(file: file, line: node.mark?.line ?? 1, problem: problem, advice: known)
        }
        guard let mapping = node.mapping else { throw fail(node, "no rule") }
        for (key, _) in mapping {
            guard let name = key.string, keys.contains(name) else {
                throw fail(key, "unknown key `\(key.string ?? "?")`")
            }
        }
        self.mapping = mapping
    }

    /// An error at what `key` says, or at the rule.
    public func error(at key: String? = nil, _ problem: String, _ advice: String) -> ExplanationError {
        let place = key.flatMap { mapping[$0] } ?? node
        return ExplanationError(file: file, line: place.mark?.line ?? 1, problem: problem, advice: advice)
    }

    public func text(_ key: String) throws(ExplanationError) -> String {
        guard let value = mapping[key]?.string, !value.isEmpty else {
            throw error(at: key, "`\(key)` is missing", "give it a text")
        }
        return value
    }

    /// Texts of a list; none without the key.
    public func texts(_ key: String) -> [String] { mapping[key]?.sequence?.compactMap(\.string) ?? [] }

    /// What the rule must not match: texts, of which there is at least one.
    public func mustNotMatch() throws(ExplanationError) -> [String] {
        let texts = texts("must_not_match")
        guard !texts.isEmpty else { throw missingCases }
        return texts
    }

    /// What the rule must not match: mappings with `keys`, of which there is at least one.
    public func mustNotMatch(keys: [String]) throws(ExplanationError) -> [RuleNode] {
        guard let nodes = mapping["must_not_match"]?.sequence, !nodes.isEmpty else { throw missingCases }
        var cases: [RuleNode] = []
        for node in nodes { cases.append(try RuleNode(node, file, keys)) }
        return cases
    }

    private var missingCases: ExplanationError {
        error("`must_not_match` is missing", "list at least one difference that the rule must leave alone")
    }
}
