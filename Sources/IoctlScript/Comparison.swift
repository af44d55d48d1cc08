/// The answers of two sides to one script, line by line.
public struct Comparison: Sendable {
    public struct Line: Sendable, Equatable {
        /// Of the script.
        public var line: Script.Line
        /// In the order of the sides.
        public var answers: [Answer]
        /// A side could not do it, so that the two say nothing about each other.
        public var isCompared: Bool { !answers.contains { $0.isNotHere } }
    }
    private let script: Script
    /// Names of the two.
    private let sides: [String]
    /// Lines whose answers are not the same, or which a side could not do.
    public let lines: [Line]
    private let count: Int

    /// Of a side that stopped early the answers that it gave; what the other said after that is left out.
    public init(
        _ script: Script, _ first: (name: String, answers: [Answer]), _ second: (name: String, answers: [Answer])
    ) {
        self.script = script
        sides = [first.name, second.name]
        let answers = zip(first.answers, second.answers)
        lines = zip(script.lines, answers).filter { $0.1.0 != $0.1.1 || $0.1.0.isNotHere }.map {
            Line(line: $0.0, answers: [$0.1.0, $0.1.1])
        }
        count = min(first.answers.count, second.answers.count)
    }

    public var differences: [Line] { lines.filter(\.isCompared) }

    /// Each difference with both answers, then what was left out, then how many there are.
    public var text: String {
        var text = ""
        for line in lines {
            text += "\(line.line.number): \(script.source(of: line.line))\n"
            if !line.isCompared { text += "    not compared\n" }
            let width = sides.map(\.count).max() ?? 0
            for (side, answer) in zip(sides, line.answers) {
                text += "    \(side):" + String(repeating: " ", count: width - side.count + 1) + "\(answer)\n"
            }
        }
        let skipped = lines.count - differences.count
        return text + "\(differences.count) of \(count) answers differ"
            + (skipped == 0 ? "" : ", \(skipped) not compared") + "\n"
    }

    /// An array with an object for each line that is not the same on both sides.
    public var json: String {
        let objects = lines.map { line in
            "  {\"line\": \(line.line.number), \"compared\": \(line.isCompared), "
                + zip(sides, line.answers).map { "\"\($0)\": {\($1.jsonPairs)}" }.joined(separator: ", ") + "}"
        }
        return objects.isEmpty ? "[]\n" : "[\n" + objects.joined(separator: ",\n") + "\n]\n"
    }
}

extension Answer {
    /// Whether the executor could not do it.
    public var isNotHere: Bool { if case .notHere = outcome { true } else { false } }
}
