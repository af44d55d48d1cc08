import TextInput
import Yams

/// A YAML value with its place in the file.
struct Element {
    indirect enum Content {
        /// A scalar's text; nothing is resolved. `quoted` tells `"1"` from `1`.
        case scalar(String, quoted: Bool)
        case list([Element])
        case mapping([Entry])
        /// Nothing, `~` or `null`.
        case nothing
    }
    struct Entry {
        var key: String
        var keyPosition: Position
        var value: Element
    }
    var position: Position
    var content: Content

    /// What the value is, for messages.
    var kind: String {
        switch content {
        case .scalar(let text, _): "`\(text.count > 40 ? text.prefix(40) + "…" : text[...])`"
        case .list: "a list"
        case .mapping: "a mapping"
        case .nothing: "nothing"
        }
    }
}

/// Makes elements of the YAML parser's nodes, within bounds.
struct ElementReader {
    /// More than a scenario of 1 MiB needs in earnest.
    static let mostElements = 100_000

    let complaints: Complaints
    let source: SourceText
    private var elements = 0

    /// The one document of `source`.
    static func read(_ source: SourceText, _ complaints: Complaints) throws(ScenarioErrors) -> Element {
        try PlainYAML.check(source, complaints)
        var reader = ElementReader(complaints: complaints, source: source)
        guard let node = reader.parse() else {
            if complaints.isEmpty {
                complaints.add(.start, "the file is empty", "a scenario begins with `name:`; see the reference page")
            }
            try complaints.throwIfAny()
            preconditionFailure("a complaint was thrown")
        }
        let root = reader.element(node, depth: 1, at: .start)
        try complaints.throwIfAny()
        return root
    }

    private init(complaints: Complaints, source: SourceText) {
        self.complaints = complaints
        self.source = source
    }

    private func parse() -> Node? {
        do {
            // The encoding is given, because Yams otherwise asks the environment for it.
            return try Parser(yaml: source.text, encoding: .utf8).singleRoot()
        } catch let error as YamlError {
            explain(error)
        } catch {
            complaints.add(.start, "the file is not YAML: \(error)", "")
        }
        return nil
    }

    private func explain(_ error: YamlError) {
        let hint = "check indentation, quotes and brackets here and in the line above"
        switch error {
        case .scanner(let context, let problem, let mark, _), .parser(let context, let problem, let mark, _):
            let during = context.map { " (\($0.text))" } ?? ""
            complaints.add(Position(mark), "not valid YAML: \(problem)\(during)", hint)
        case .composer(_, let problem, let mark, _):
            let several = problem.contains("another document")
            complaints.add(
                Position(mark), several ? "a second YAML document" : "not valid YAML: \(problem)",
                several ? "one file holds one scenario" : hint)
        case .duplicatedKeysInMapping(let keys, let context):
            explainDuplicate(keys.first ?? "", first: Position(context.mark))
        default:
            complaints.add(.start, "not valid YAML: \(error)", hint)
        }
    }

    /// Yams tells only where the key stands first. In a block its second place is the next line that has it at the same
    /// column; in brackets the first place has to do.
    private func explainDuplicate(_ key: String, first: Position) {
        var place = first
        for (index, line) in source.lines.enumerated().dropFirst(first.line) {
            let scalars = line.unicodeScalars
            guard scalars.count >= first.column else { continue }
            let before = scalars.prefix(first.column - 1)
            let rest = String(scalars.dropFirst(first.column - 1))
            guard before.allSatisfy({ $0 == " " }), rest.hasPrefix(key + ":") else { continue }
            place = Position(line: index + 1, column: first.column)
            break
        }
        let also = place == first ? "" : "; the first is in line \(first.line)"
        complaints.add(place, "`\(key)` is given twice", "keep one of them\(also)")
    }

    private mutating func element(_ node: Node, depth: Int, at fallback: Position) -> Element {
        let position = node.mark.map(Position.init) ?? fallback
        elements += 1
        guard elements <= ElementReader.mostElements else {
            if elements == ElementReader.mostElements + 1 {
                complaints.add(position, "more than \(ElementReader.mostElements) values", "split the scenario")
            }
            return Element(position: position, content: .nothing)
        }
        guard depth <= PlainYAML.deepest else {
            complaints.add(
                position, "nested too deep", "a scenario is at most \(PlainYAML.deepest) levels deep")
            return Element(position: position, content: .nothing)
        }
        switch node {
        case .scalar(let scalar):
            return Element(position: position, content: content(of: scalar))
        case .sequence(let sequence):
            var list: [Element] = []
            for each in sequence { list.append(element(each, depth: depth + 1, at: position)) }
            return Element(position: position, content: .list(list))
        case .mapping(let mapping):
            return Element(position: position, content: .mapping(entries(mapping, depth: depth, at: position)))
        case .alias:
            complaints.add(position, "a YAML alias", "write the value out here")
            return Element(position: position, content: .nothing)
        }
    }

    private func content(of scalar: Node.Scalar) -> Element.Content {
        let quoted = scalar.style == .singleQuoted || scalar.style == .doubleQuoted
        if !quoted && ["", "~", "null", "Null", "NULL"].contains(scalar.string) { return .nothing }
        return .scalar(scalar.string, quoted: quoted)
    }

    private mutating func entries(_ mapping: Node.Mapping, depth: Int, at fallback: Position) -> [Element.Entry] {
        var entries: [Element.Entry] = []
        for (key, value) in mapping {
            let position = key.mark.map(Position.init) ?? fallback
            guard case .scalar(let scalar) = key else {
                complaints.add(position, "a key that is not a word", "write `key: value`")
                continue
            }
            if scalar.string == "<<" {
                complaints.add(position, "a YAML merge key", "write the values out here")
            }
            var element = element(value, depth: depth + 1, at: position)
            // An absent value's mark is at the next token, lines away from its key.
            if case .nothing = element.content { element.position = position }
            entries.append(Element.Entry(key: scalar.string, keyPosition: position, value: element))
        }
        return entries
    }
}

extension Position {
    init(_ mark: Mark) { self.init(line: mark.line, column: mark.column) }
}
