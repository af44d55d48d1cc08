import Foundation
import Testing

/// A row of the design's table "Rules as types"; the raw value is its folder in `Snippets`.
enum Row: String, CaseIterable, Sendable {
    case droppedOnce = "1-dropped-exactly-once"
    case putOrUnpinned = "2-references-and-pins"
    case snapshot = "3-snapshot-before-translate"
    case permit = "4-no-frame-without-the-check"
    case update = "5-an-update-spells-no-frame"
    case underLock = "6-marked-under-mmu-lock"
    case noPage = "7-no-page-from-an-entry"
    case errors = "8-errors-are-not-frames"
    case cachedBytes = "9-cached-bytes-under-the-lock"
    case takenAway = "the-series-took-away"

    private static var snippets: URL { Repository.root.appending(path: "Tests/TypeRuleTests/Snippets") }
    var folder: URL { Self.snippets.appending(path: rawValue) }

    static func foldersOnDisk() throws -> [String] {
        try FileManager.default.contentsOfDirectory(atPath: snippets.path).filter { !$0.hasPrefix(".") }.sorted()
    }

    /// The names behind `wrong-` and `right-`, sorted.
    func snippetNames() throws -> (wrong: [String], right: [String]) {
        let files = try FileManager.default.contentsOfDirectory(atPath: folder.path).sorted()
        func names(_ kind: String) -> [String] {
            files.filter { $0.hasPrefix(kind) && $0.hasSuffix(".swift") }
                .map { String($0.dropFirst(kind.count).dropLast(".swift".count)) }
        }
        return (names("wrong-"), names("right-"))
    }
}

/// A diagnostic that a wrong snippet demands of the compiler.
struct Marker: Equatable, Sendable {
    let line: Int
    let text: String
}

/// One program, in a file of its own.
struct Snippet: Sendable {
    let file: URL
    let markers: [Marker]

    init(_ file: URL) throws {
        self.file = file
        markers = Self.markers(in: try String(contentsOf: file, encoding: .utf8))
    }

    /// Every `// error: <text>` at the end of a line; a line may have several.
    static func markers(in source: String) -> [Marker] {
        let lines = source.split(separator: "\n", omittingEmptySubsequences: false)
        return lines.enumerated().flatMap { index, line in
            String(line).components(separatedBy: "// error: ").dropFirst().map {
                Marker(line: index + 1, text: $0.trimmingCharacters(in: .whitespaces))
            }
        }
    }
}

/// A program that breaks a rule, and the one that does the same without breaking it.
struct SnippetPair: Sendable, CustomTestStringConvertible {
    let name: String
    let wrong: Snippet
    let right: Snippet

    var testDescription: String { name }

    static func all(in row: Row) throws -> [SnippetPair] {
        try row.snippetNames().wrong.map { name in
            SnippetPair(
                name: name,
                wrong: try Snippet(row.folder.appending(path: "wrong-\(name).swift")),
                right: try Snippet(row.folder.appending(path: "right-\(name).swift")))
        }
    }

    /// The wrong program is refused where it says, for the reason it says and for no other; its correction compiles
    /// without as much as a warning.
    func check() throws {
        let compiler = try SnippetCompiler.shared.get()
        let refused = try compiler.compile(wrong.file, warningsAreErrors: false)
        #expect(refused.status != 0, "\(wrong.file.lastPathComponent) compiles")
        #expect(
            mismatches(expected: wrong.markers, found: refused.errors) == [],
            "\(wrong.file.lastPathComponent): \(refused.text)")

        let accepted = try compiler.compile(right.file, warningsAreErrors: true)
        #expect(accepted.status == 0, "\(right.file.lastPathComponent): \(accepted.text)")
    }
}

/// What stands between the demanded diagnostics and those found: nothing, if each demand is met by one of its own on its
/// line, and no error is left.
func mismatches(expected: [Marker], found: [Diagnostic]) -> [String] {
    var rest = found
    var problems: [String] = []
    for marker in expected {
        guard let hit = rest.firstIndex(where: { $0.line == marker.line && $0.message.contains(marker.text) }) else {
            problems.append("line \(marker.line): no error says \"\(marker.text)\"")
            continue
        }
        rest.remove(at: hit)
    }
    return problems + rest.map { "line \($0.line): unexpected error \"\($0.message)\"" }
}
