// TextInput: texts that people write for this program (scenarios, ioctl scripts): their bytes checked, and what is wrong
// with them said with its place. It knows no language.

/// Something in a text that can't be, and where.
public struct InputError: Error, Sendable, Equatable, CustomStringConvertible {
    /// The path as it was given.
    public var file: String
    /// From 1; columns count characters.
    public var line: Int
    public var column: Int
    /// What is wrong.
    public var message: String
    /// What would be right.
    public var hint: String
    /// The line of the file, for the excerpt; empty if it can't be shown.
    public var excerpt: String

    /// `file:line:column: error: what is wrong`, the line with a caret, what would be right.
    public var description: String {
        var lines = ["\(file):\(line):\(column): error: \(message)"]
        if !excerpt.isEmpty {
            let (shown, caret) = clippedExcerpt
            lines.append("    \(shown)")
            lines.append("    \(String(repeating: " ", count: caret))^")
        }
        if !hint.isEmpty { lines.append("  \(hint)") }
        return lines.joined(separator: "\n")
    }

    /// The part of the line around the column that fits a terminal, and the caret's place in it.
    private var clippedExcerpt: (String, Int) {
        let width = 100
        let characters = Array(excerpt.unicodeScalars)
        let target = min(column - 1, characters.count)
        let start = target < width ? 0 : target - width / 2
        let end = min(characters.count, start + width)
        var shown = String.UnicodeScalarView()
        for scalar in characters[start..<end] { shown.append(scalar == "\t" ? " " : scalar) }
        return (String(shown), target - start)
    }
}

/// Everything that was found wrong, in the order of the file. Never empty.
public struct InputErrors: Error, Sendable, Equatable, CustomStringConvertible {
    public var errors: [InputError]
    public var description: String { errors.map(\.description).joined(separator: "\n") }
}

/// A place in the file, both from 1.
package struct Position: Comparable, Hashable {
    package var line: Int
    package var column: Int
    package init(line: Int, column: Int) {
        self.line = line
        self.column = column
    }
    package static let start = Position(line: 1, column: 1)
    package static func < (a: Position, b: Position) -> Bool { (a.line, a.column) < (b.line, b.column) }
}

/// Collects what is wrong with one file.
package final class Complaints {
    /// More than these help nobody; the rest is counted.
    package static let shown = 20

    package let file: String
    private let lines: [String]
    private var errors: [InputError] = []

    package init(file: String, lines: [String]) {
        self.file = file
        self.lines = lines
    }

    package var isEmpty: Bool { errors.isEmpty }
    package var count: Int { errors.count }

    package func add(_ position: Position, _ message: String, _ hint: String) {
        // The YAML parser puts what is missing at the end of a file one line behind it.
        let isInside = lines.indices.contains(position.line - 1)
        let last = Position(line: max(lines.count, 1), column: (lines.last?.unicodeScalars.count ?? 0) + 1)
        let place = isInside ? position : last
        // What several readers look at is said once.
        let isSaid = errors.contains { $0.line == place.line && $0.column == place.column && $0.message == message }
        guard !isSaid else { return }
        errors.append(
            InputError(
                file: file, line: place.line, column: place.column, message: message, hint: hint,
                excerpt: lines.isEmpty ? "" : lines[place.line - 1]))
    }

    /// Throws if anything was added. Each stage of reading ends with this, so that a mistake in one stage isn't
    /// reported again as its consequences in the next.
    package func throwIfAny() throws(InputErrors) {
        guard !errors.isEmpty else { return }
        var sorted = errors.enumerated().sorted { a, b in
            (a.element.line, a.element.column, a.offset) < (b.element.line, b.element.column, b.offset)
        }.map(\.element)
        let left = sorted.count - Complaints.shown
        if left > 0 {
            sorted.removeLast(left)
            sorted[sorted.count - 1].hint += "\n  (\(left) more errors follow)"
        }
        throw InputErrors(errors: sorted)
    }
}
