import Foundation
import Testing

/// A row of the page `RulesOfX86`.
private struct RuleRow {
    let number: Int
    let statement: String
    let held: String
    let shown: String

    /// `| X1 | in short | held | shown by |`
    init?(_ line: Substring) {
        let cells = line.split(separator: "|", omittingEmptySubsequences: false)
            .map { $0.trimmingCharacters(in: .whitespaces) }
        guard cells.count == 6, let match = cells[1].wholeMatch(of: #/X(\d+)/#), let number = Int(match.1) else {
            return nil
        }
        (self.number, statement, held, shown) = (number, cells[2], cells[3], cells[4])
    }

    static func names(in cell: String) -> [String] {
        cell.matches(of: #/`([^`]+)`/#).map { String($0.1) }
    }
}

/// The page that tells of each x86 rule how it is held says what is so.
@Suite struct X86RulePage {
    private static func rows() throws -> [RuleRow] {
        let page = Repository.root.appending(path: "Documentation/Faultline.docc/RulesOfX86.md")
        return try String(contentsOf: page, encoding: .utf8).split(separator: "\n").compactMap { RuleRow($0) }
    }

    /// The Swift files below `folder`, one after another, with their comments.
    private static func text(under folder: String) throws -> String {
        let base = Repository.root.appending(path: folder)
        return try FileManager.default.subpathsOfDirectory(atPath: base.path).filter { $0.hasSuffix(".swift") }
            .map { try String(contentsOf: base.appending(path: $0), encoding: .utf8) }.joined(separator: "\n")
    }

    /// Whether one of `keywords` declares `name` in `text`.
    private static func declares(_ name: String, _ keywords: [String], in text: String) -> Bool {
        keywords.contains { keyword in
            ["(", "<", ":", " "].contains { text.range(of: "\(keyword) \(name)\($0)") != nil }
        }
    }

    @Test func `each of the 66 rules has one row, in order`() throws {
        #expect(try Self.rows().map(\.number) == Array(1...66))
    }

    @Test func `a rule is held in one of the ways that the page names, and in no more than eight cases in none`() throws
    {
        let ways = ["at rest", "at the event", "by type", "not applicable, because "]
        let rows = try Self.rows()
        for row in rows {
            #expect(!row.statement.isEmpty && ways.contains { row.held.hasPrefix($0) }, "X\(row.number)")
        }
        #expect(rows.filter { $0.held.hasPrefix("not applicable") }.count <= 8)
    }

    @Test func `every test that the page names is a suite, and every check is declared`() throws {
        let tests = try Self.text(under: "Tests")
        let sources = try Self.text(under: "Sources")
        for row in try Self.rows() {
            let suites = RuleRow.names(in: row.shown)
            #expect(!suites.isEmpty, "X\(row.number)")
            for name in suites {
                let isThere = Self.declares(name, ["@Suite struct", "@Suite(.serialized) struct"], in: tests)
                #expect(isThere, "X\(row.number): no suite \(name)")
            }
            for name in RuleRow.names(in: row.held) {
                let isThere = Self.declares(name, ["func", "var", "let", "struct", "class"], in: sources)
                #expect(isThere, "X\(row.number): nothing is called \(name)")
            }
        }
    }

    /// A rule that the auditor has a number for is checked somewhere, so its row must not say that it can't be.
    @Test func `a rule that findings can name is not called inapplicable`() throws {
        let source = Repository.root.appending(path: "Sources/Audit/Invariant.swift")
        let numbers = Set(
            try String(contentsOf: source, encoding: .utf8).split(separator: "\n").compactMap { line in
                line.firstMatch(of: #/^\s*case x(\d+) = /#).flatMap { Int($0.1) }
            })
        #expect(numbers.count > 40)
        for row in try Self.rows() where numbers.contains(row.number) {
            #expect(!row.held.hasPrefix("not applicable") && !row.held.hasPrefix("by type"), "X\(row.number)")
        }
    }
}
