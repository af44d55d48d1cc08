// The part of YAML that a scenario uses, checked before the YAML parser sees the text: mappings, lists, one-line
// scalars, comments. Anchors, aliases, tags, directives, block scalars and explicit keys are refused, and nesting is
// bounded. So the parser can't be made to expand an alias a billion times or to recurse without end, and what a
// scenario says is what stands in its lines.

import TextInput

/// Looks at the characters at which a YAML token begins. It needs no more of the grammar than that: quotes, comments,
/// brackets, and where a plain scalar ends.
struct PlainYAML {
    /// A token that begins a line further right than this is refused; it bounds the nesting of blocks.
    static let deepestColumn = 120
    /// The deepest nesting of a scenario; its language needs eight.
    static let deepest = 16

    private let complaints: Complaints
    private var position = Position.start
    private var flowDepth = 0
    /// Nothing but indentation, `-` and spaces stands before this place in its line.
    private var inIndentation = true
    private var atTokenStart = true
    private var previous: Unicode.Scalar = "\n"

    private enum Within { case plain, comment, singleQuoted, doubleQuoted }
    private var within = Within.plain
    private var escaped = false

    static func check(_ text: SourceText, _ complaints: Complaints) throws(ScenarioErrors) {
        var scan = PlainYAML(complaints)
        var scalars = text.text.unicodeScalars.makeIterator()
        var next = scalars.next()
        while let scalar = next, complaints.isEmpty {
            next = scalars.next()
            scan.step(scalar, next: next ?? "\n")
        }
        try complaints.throwIfAny()
    }

    private init(_ complaints: Complaints) { self.complaints = complaints }

    private mutating func step(_ scalar: Unicode.Scalar, next: Unicode.Scalar) {
        if scalar == "\t" && within != .comment {
            complaints.add(position, "a tab", "indent with spaces")
        }
        switch within {
        case .comment: break
        case .singleQuoted: if scalar == "'" { within = .plain }
        case .doubleQuoted:
            if escaped {
                escaped = false
            } else if scalar == "\\" {
                escaped = true
            } else if scalar == "\"" {
                within = .plain
            }
        case .plain: plain(scalar, next: next)
        }
        previous = scalar
        if scalar == "\n" {
            if within == .comment { within = .plain }
            atTokenStart = true
            inIndentation = true
            position = Position(line: position.line + 1, column: 1)
        } else {
            position.column += 1
        }
    }

    private mutating func plain(_ scalar: Unicode.Scalar, next: Unicode.Scalar) {
        let nextEnds = next == " " || next == "\n"
        switch scalar {
        case " ", "\n": return
        case "#" where previous == " " || previous == "\n": within = .comment
        // In brackets the parser takes some colons without a space after them for separators; taking all of them for
        // such refuses no scenario.
        case ":" where nextEnds || flowDepth > 0:
            atTokenStart = true
            inIndentation = false
        case ",", "[", "]", "{", "}": if flowDepth > 0 || atTokenStart { flow(scalar) }
        case "-" where nextEnds && atTokenStart && flowDepth == 0: boundColumn()
        // Perhaps `---`, after which a token may begin; a word that begins with a dash is no worse for it.
        case "-" where atTokenStart && position.column <= 3 && flowDepth == 0: return
        default: if atTokenStart { token(scalar, nextEnds: nextEnds) }
        }
    }

    private mutating func flow(_ scalar: Unicode.Scalar) {
        if scalar == "[" || scalar == "{" {
            boundColumn()
            flowDepth += 1
            if flowDepth > PlainYAML.deepest { refuseDepth() }
        } else if scalar != "," {
            flowDepth = max(0, flowDepth - 1)
        }
        atTokenStart = true
        inIndentation = false
    }

    private mutating func token(_ scalar: Unicode.Scalar, nextEnds: Bool) {
        boundColumn()
        atTokenStart = false
        inIndentation = false
        switch scalar {
        case "'": within = .singleQuoted
        case "\"": within = .doubleQuoted
        case "&": complaints.add(position, "a YAML anchor", "write the value out at each place that needs it")
        case "*": complaints.add(position, "a YAML alias", "write the value out here")
        case "!": complaints.add(position, "a YAML tag", "write the value without it")
        case "|", ">": complaints.add(position, "a YAML block scalar", "write the text in one line")
        case "%" where position.column == 1:
            complaints.add(position, "a YAML directive", "leave it out; scenarios need none")
        case "?" where nextEnds || flowDepth > 0: complaints.add(position, "a YAML explicit key", "write `key: value`")
        default: break
        }
    }

    private func boundColumn() {
        if flowDepth == 0 && inIndentation && position.column > PlainYAML.deepestColumn { refuseDepth() }
    }

    private func refuseDepth() {
        complaints.add(
            position, "nested too deep", "a scenario is at most \(PlainYAML.deepest) levels deep")
    }
}
