import Foundation
import IoctlScript
import Testing
import TextInput

@testable import Interface

/// What a script prints on the model, which must break no rule.
func answers(_ text: String, sourceLocation: SourceLocation = #_sourceLocation) throws -> String {
    let script = try Script(text: text, file: "script")
    var executor = try #require(ModelExecutor(), sourceLocation: sourceLocation)
    let answers = script.run(on: &executor)
    executor.finish()
    #expect(executor.findings.isEmpty, sourceLocation: sourceLocation)
    return script.text(of: answers)
}

/// The same without the numbers of lines: one answer after another.
func outcomes(_ text: String, sourceLocation: SourceLocation = #_sourceLocation) throws -> [String] {
    try answers(text, sourceLocation: sourceLocation).split(separator: "\n").map {
        String($0.split(separator: " ", maxSplits: 1)[1])
    }
}

@Suite struct IoctlScriptPage {
    /// The page's fenced blocks, in order.
    private func blocks() throws -> [String] {
        let root = #filePath.split(separator: "/", omittingEmptySubsequences: false).dropLast(3).joined(separator: "/")
        let page = try String(contentsOfFile: "\(root)/Documentation/Faultline.docc/IoctlScripts.md", encoding: .utf8)
        let parts = page.components(separatedBy: "```\n")
        return stride(from: 1, to: parts.count, by: 2).map { parts[$0] }
    }

    @Test func `the page's example prints what the page says`() throws {
        let blocks = try blocks()
        #expect(blocks.count >= 2)
        #expect(try answers(blocks[0]) == blocks[1])
    }

    @Test func `a second run in another process's order gives the same bytes`() throws {
        let blocks = try blocks()
        #expect(try answers(blocks[0]) == answers(blocks[0]))
    }

    @Test func `JSON holds the same`() throws {
        let script = try Script(
            text: "vm\nguest read cpu=0 gpa=0 vm=vm".replacing("guest", with: "vcpu\nguest"), file: "x")
        var executor = try #require(ModelExecutor())
        let text = script.json(of: script.run(on: &executor))
        executor.finish()
        #expect(
            text == """
                [
                  {"line": 1, "result": 0},
                  {"line": 2, "result": 0},
                  {"line": 3, "result": 0, "exit": "mmio", "phys_addr": "0x0", "len": 8, "is_write": 0, "done": 0}
                ]

                """)
        #expect(throws: Never.self) { try JSONSerialization.jsonObject(with: Data(text.utf8)) }
    }
}
