import Foundation

/// A source file of this package, as the source rules read it: code without comments and without the text of literals.
struct SwiftSource: Sendable {
    /// Relative to the package.
    let path: String
    /// One element for each line of the file.
    let lines: [String]

    init(path: String, text: String) {
        self.path = path
        lines = Self.code(of: text).split(separator: "\n", omittingEmptySubsequences: false).map(String.init)
    }

    /// Every Swift file below `folder`, by path.
    static func all(under folder: String) throws -> [SwiftSource] {
        let base = Repository.root.appending(path: folder)
        let names = try FileManager.default.subpathsOfDirectory(atPath: base.path)
        return try names.filter { $0.hasSuffix(".swift") }.sorted().map { name in
            SwiftSource(
                path: "\(folder)/\(name)",
                text: try String(contentsOf: base.appending(path: name), encoding: .utf8))
        }
    }

    /// `path:line: code` for each line that `pattern` occurs in.
    func hits(_ pattern: some RegexComponent) -> [String] {
        lines.enumerated().filter { $0.element.contains(pattern) }.map {
            "\(path):\($0.offset + 1): \($0.element.trimmingCharacters(in: .whitespaces))"
        }
    }

    /// The modules that the file imports.
    var imports: [String] {
        lines.compactMap { line in
            line.firstMatch(of: #/^\s*(?:@\w+(?:\([^)]*\))?\s+)*(?:\w+\s+)?import\s+(?:\w+\s+)?(\w+)/#)
                .map { String($0.1) }
        }
    }

    /// `text` with its comments, and what stands between quotes, replaced by nothing; line breaks stay.
    static func code(of text: String) -> String {
        var rest = Substring(text)
        var code = ""
        while let next = rest.first {
            if rest.hasPrefix("//") {
                rest = rest.drop { $0 != "\n" }
            } else if rest.hasPrefix("/*") {
                code += skip(&rest, past: "*/")
            } else if rest.hasPrefix("\"\"\"") {
                rest = rest.dropFirst(3)
                code += skip(&rest, past: "\"\"\"")
            } else if next == "\"" {
                rest = rest.dropFirst()
                skipLiteral(&rest)
                code += "\"\""
            } else {
                code.append(next)
                rest = rest.dropFirst()
            }
        }
        return code
    }

    /// Skips up to and with `end`; returns the line breaks on the way.
    private static func skip(_ rest: inout Substring, past end: String) -> String {
        let found = rest.range(of: end)
        let skipped = rest[..<(found?.upperBound ?? rest.endIndex)]
        rest = rest[skipped.endIndex...]
        return String(skipped.filter { $0 == "\n" })
    }

    /// Skips the rest of a one-line literal, which has begun.
    private static func skipLiteral(_ rest: inout Substring) {
        while let next = rest.popFirst(), next != "\"", next != "\n" {
            if next == "\\" { _ = rest.popFirst() }
        }
    }
}
