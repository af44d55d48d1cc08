import Testing

/// The harness itself must be able to fail: a test that accepts any refusal proves nothing.
@Suite struct HarnessTests {
    @Test func `a marker is the text behind the comment, with its line`() {
        let source = "let a = 1\nlet b = c  // error: cannot find 'c'\nd  // error: one // error: two\n"
        #expect(
            Snippet.markers(in: source) == [
                Marker(line: 2, text: "cannot find 'c'"), Marker(line: 3, text: "one"), Marker(line: 3, text: "two"),
            ])
    }

    @Test func `errors are read with their lines, warnings and notes are not`() {
        let output = """
            /a/b:c.swift:3:5: error: cannot find 'x' in scope
            /a/b:c.swift:4:5: warning: never used
            /a/b:c.swift:5:5: note: consumed here
            <unknown>:0: error: no such module
            """
        #expect(
            Diagnostic.errors(in: output) == [
                Diagnostic(line: 3, message: "cannot find 'x' in scope"),
                Diagnostic(line: 0, message: "no such module"),
            ])
    }

    @Test func `the right error on the right line is a match`() {
        #expect(mismatches(expected: [marker(3, "consumed")], found: [diagnostic(3, "'a' consumed twice")]) == [])
    }

    @Test func `a missing error, another line, another text and a further error are mismatches`() {
        #expect(mismatches(expected: [marker(3, "consumed")], found: []).count == 1)
        #expect(mismatches(expected: [marker(3, "consumed")], found: [diagnostic(4, "'a' consumed twice")]).count == 2)
        #expect(mismatches(expected: [marker(3, "consumed")], found: [diagnostic(3, "cannot find 'a'")]).count == 2)
        let twice = [diagnostic(3, "'a' consumed twice"), diagnostic(3, "'b' consumed twice")]
        #expect(mismatches(expected: [marker(3, "consumed")], found: twice).count == 1)
        #expect(mismatches(expected: [marker(3, "consumed"), marker(3, "consumed")], found: twice) == [])
    }

    private func marker(_ line: Int, _ text: String) -> Marker { Marker(line: line, text: text) }
    private func diagnostic(_ line: Int, _ text: String) -> Diagnostic { Diagnostic(line: line, message: text) }
}
