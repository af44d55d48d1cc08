import Testing

@testable import Scenario

/// What isn't a plain text, or isn't the plain part of YAML, is refused with its place.
@Suite struct PlainText {
    let good = Array(Sketch().text.utf8)

    @Test func `the sketch itself is a scenario`() { #expect(errors(good).isEmpty) }

    @Test func `an empty file`() { expectOne([], 1, 1, "the file is empty") }
    @Test func `only comments`() { expectOne(Array("# hello\n".utf8), 1, 1, "the file is empty") }

    @Test func `a byte order mark`() {
        expectOne([0xef, 0xbb, 0xbf] + good, 1, 1, "the file starts with a byte order mark")
    }
    @Test func `CR LF line ends`() { expectOne(Array("name: a\r\nvm:\r\n".utf8), 1, 8, "a carriage return") }
    @Test func `binary`() { expectOne(Array("na\u{0}me".utf8), 1, 3, "a control character (0x0)") }
    @Test func `an ELF file`() { expectOne([0x7f, 0x45, 0x4c, 0x46], 1, 1, "a control character (0x7f)") }
    @Test func `invalid UTF-8, columns count characters`() {
        expectOne(Array("name: é".utf8) + [0xff, 0x0a], 1, 8, "bytes that are not UTF-8")
    }
    @Test func `a truncated character`() { expectOne([0x6e, 0xc3], 1, 2, "bytes that are not UTF-8") }
    @Test func `a line end that editors don't show`() {
        expectOne(Array("name: a\u{2028}b".utf8), 1, 8, "an unusual line end (U+0085, U+2028 or U+2029)")
    }
    @Test func `a file above 1 MiB`() {
        let long = [UInt8](repeating: 0x23, count: 1 << 20)
        expectOne(long + [0x0a], 1, 1, "the file is larger than 1 MiB")
        expectOne(long, 1, 1, "the file is empty")
    }
    @Test func `a tab`() { expectOne(Array("name: a\n\tvm: b\n".utf8), 2, 1, "a tab") }
    @Test func `a tab in a comment does no harm`() {
        #expect(errors(Array("#\tcolumns\n".utf8) + good).isEmpty)
    }

    @Test func `a file that isn't there`() {
        do throws(ScenarioErrors) {
            _ = try loadScenario(path: "/nowhere/at/all.yaml")
            Issue.record("loaded")
        } catch {
            #expect(
                error.description
                    == "/nowhere/at/all.yaml:1:1: error: the file can't be read: No such file or directory\n"
                    + "  give the path of a scenario (a .yaml file)")
        }
    }
    @Test func `a directory`() {
        do throws(ScenarioErrors) {
            _ = try loadScenario(path: "/")
            Issue.record("loaded")
        } catch {
            #expect(error.errors.map(\.message) == ["the file can't be read: Is a directory"])
        }
    }
    @Test func `an endless file is cut off`() {
        do throws(ScenarioErrors) {
            _ = try loadScenario(path: "/dev/zero")
            Issue.record("loaded")
        } catch {
            #expect(error.errors.map(\.message) == ["the file is larger than 1 MiB"])
        }
    }
}

@Suite struct PlainYAMLOnly {
    private func expectOne(
        _ text: String, _ line: Int, _ column: Int, _ message: String, _ location: SourceLocation = #_sourceLocation
    ) {
        ScenarioTests.expectOne(Array(text.utf8), line, column, message, sourceLocation: location)
    }

    @Test func `an anchor`() { expectOne("name: &a x\n", 1, 7, "a YAML anchor") }
    @Test func `an anchor on the document`() { expectOne("--- &a\nname: x\n", 1, 5, "a YAML anchor") }
    @Test func `an alias`() { expectOne("name: a\nvm: *a\n", 2, 5, "a YAML alias") }
    @Test func `an alias in brackets, without a space`() { expectOne("vm: {\"a\":*b}\n", 1, 10, "a YAML alias") }
    @Test func `a merge key`() {
        let found = errors(Sketch(vm: "  <<: {vcpus: 2}").text)
        #expect(found.map(\.message) == ["a YAML merge key"])
        #expect(found.map(\.line) == [6])
    }
    @Test func `a tag`() { expectOne("name: !!str x\n", 1, 7, "a YAML tag") }
    @Test func `a directive`() { expectOne("%YAML 1.2\n---\nname: x\n", 1, 1, "a YAML directive") }
    @Test func `a block scalar`() { expectOne("name: |\n  x\n", 1, 7, "a YAML block scalar") }
    @Test func `an explicit key`() { expectOne("? name\n: x\n", 1, 1, "a YAML explicit key") }
    @Test func `a key that is a list`() { expectOne("[a]: b\n", 1, 1, "a key that is not a word") }
    @Test func `two documents`() {
        expectOne(Sketch().text + "---\nname: b\n", 11, 1, "a second YAML document")
    }
    @Test func `a duplicate key, at its second place`() {
        expectOne("name: a\nhost:\n  memory: 1 MiB\n  memory: 2 MiB\n", 4, 3, "`memory` is given twice")
    }
    @Test func `a duplicate key in brackets`() {
        expectOne("host: {memory: 1, memory: 2}\n", 1, 8, "`memory` is given twice")
    }
    @Test func `brackets that don't end`() {
        let found = errors("name: [a\n")
        #expect(found.count == 1)
        #expect(found.first?.message.hasPrefix("not valid YAML: ") == true)
    }
    @Test func `deep brackets`() { expectOne(String(repeating: "[", count: 200_000), 1, 17, "nested too deep") }
    @Test func `deep blocks in a line`() {
        expectOne(String(repeating: "- ", count: 300_000) + "a", 1, 121, "nested too deep")
    }
    @Test func `seventeen levels`() {
        expectOne(String(repeating: "- ", count: 16) + "a\n", 1, 33, "nested too deep")
    }
    @Test func `too many values`() {
        let found = errors("a: [" + String(repeating: "1,", count: 200_000) + "]\n")
        #expect(found.map(\.message) == ["more than 100000 values"])
    }
    @Test func `quotes and comments may contain anything`() {
        let text = Sketch(phases: "  - name: \"& * ! ? | [[[[[[[[[[[[[[[[[[[[\" # &a *b\n    vcpu0: [read: ram]").text
        #expect(errors(text).isEmpty)
    }
    @Test func `an ampersand inside a text is no anchor`() {
        #expect(errors(Sketch(phases: "  - name: read & write *all*\n    vcpu0: [read: ram]").text).isEmpty)
    }
}
