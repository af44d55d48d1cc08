import IoctlScript
import Testing
import TextInput

/// A mistake is told with its place and what would be right, and nothing runs.
@Suite struct IoctlScriptErrors {
    private func complaints(_ text: String) -> [String] {
        do throws(InputErrors) {
            _ = try Script(text: text, file: "s")
            return []
        } catch {
            return error.errors.map { "\($0.line):\($0.column): \($0.message); \($0.hint)" }
        }
    }

    private let host = "host name=ram kind=anonymous size=1M\nvm\n"

    @Test(arguments: [
        ("vmm", "1:1: there is no call \"vmm\"; did you mean vm?"),
        ("vm nam=x", "1:4: vm has no key \"nam\"; did you mean name?"),
        (
            "vm name=1x",
            "1:9: \"1x\" is no name; a letter, then letters, digits, - or _, 64 at most; not null, kernel, anonymous, shared_anonymous"
        ),
        ("vm\nvm", "2:1: there is a VM vm already; give it another name"),
        ("vm name=a name=b", "1:11: name is given twice; give it once"),
        ("vm a", "1:4: \"a\" means nothing here; after the call come keys: type, name, as"),
        ("  vm\ttype=defalt", "1:11: type has no \"defalt\"; did you mean default?"),
        ("ring_reset", "1:1: there is no VM yet; an earlier line must make it: vm"),
        ("vm\nno_argument call=regin", "2:18: call can't be \"regin\"; did you mean region?"),
        ("vm\nno_argument", "2:1: no_argument needs call; for example call=region"),
        ("vm name=a\nvm name=b\nring_reset", "3:1: which VM?; say vm=a"),
        ("vm\nring_reset vm=vmx", "2:15: there is no VM \"vmx\" yet; did you mean vm?"),
        ("vm\nring_reset as=p", "2:15: there is no process \"p\" yet; an earlier line must make it: process name=p"),
        ("process name=p\nexit as=p\nvm as=p", "3:7: the process p has ended; take one that still runs"),
        ("exit", "1:1: the script's own process can't end; say which: exit as=NAME, of a process line"),
        ("# faultline ioctl 2\nvm", "1:19: version 2 of the language; this program reads version 1"),
        ("vm\nvcpu\nguest", "3:1: the guest does what?; one of: read, write, exec"),
        ("vm\nvcpu\nguest wipe cpu=0 gpa=0", "3:7: the guest can't \"wipe\"; one of: read, write, exec"),
        ("vm\nguest read cpu=0 gpa=0", "2:16: there is no vCPU 0 yet; an earlier line must make it: vcpu id=0"),
        (
            "vm\nvcpu\nguest read cpu=0 gpa=4",
            "3:22: an access that is not aligned; gpa and stride are multiples of the size"
        ),
        ("close", "1:1: close what?; vm=NAME, cpu=NUMBER or memfd=NAME"),
        (
            "host name=a kind=anonymous size=1",
            "1:33: a region of kind anonymous can't have this size; a multiple of 4k, at most 1G"
        ),
        (
            "host name=a kind=hugetlb size=4k",
            "1:31: a region of kind hugetlb can't have this size; a multiple of 2M, at most 1G"
        ),
        (
            "host name=a kind=anonymous size=4k\nload host=a offset=-1",
            "2:20: \"-1\" is no number; write 4096, 0x1000, 1_000_000, 64k, 2M or 1G, below 2^64"
        ),
        ("vm\nget_dirty_log", "2:1: get_dirty_log needs slot; for example slot=0"),
        ("vm\nget_dirty_log slot=1:0x10000", "2:22: 0x10000 is too large; at most 0xffff"),
    ])
    func `one mistake`(text: String, complaint: String) { #expect(complaints(text) == [complaint]) }

    @Test(arguments: [
        ("gpa=12q", 15, "\"12q\" is no number"), ("gpa=-1", 15, "\"-1\" is no number"),
        ("gpa=0x", 15, "\"0x\" is no number"), ("gpa=1__0", 15, "\"1__0\" is no number"),
        ("gpa=99999999999G", 15, "\"99999999999G\" is no number"), ("gpa=٣", 15, "\"٣\" is no number"),
    ])
    func `numbers that are none`(key: String, column: Int, message: String) {
        let found = complaints(host + "region slot=0 \(key) size=0 hva=ram")
        #expect(found.count == 1)
        #expect(found.first?.hasPrefix("3:\(column + 4): \(message)") == true, "\(found)")
    }

    @Test func `every mistake of a script is told, in order`() {
        let text = host + "region slot=0 flags=log_dirt gpa=0 size=0 hva=rom\nfoo\nload host=ram offset=4"
        #expect(
            complaints(text).map { String($0.prefix { $0 != ";" }) } == [
                "3:21: flags has no \"log_dirt\"", "3:47: there is no host region \"rom\" yet",
                "4:1: there is no call \"foo\"", "5:1: an access that is not aligned",
            ])
    }

    @Test func `bytes that are no text`() {
        do throws(InputErrors) {
            _ = try Script(bytes: [0x76, 0x6d, 0x0a, 0x00], file: "s")
            Issue.record("read")
        } catch {
            #expect(
                error.description
                    == "s:2:1: error: a control character (0x0)\n  an ioctl script is plain text; is this the right file?"
            )
        }
    }

    @Test func `comments and blank lines make no line, and the numbers are the file's`() throws {
        let script = try Script(text: "\n# a\n  vm # b\n\nvcpu id=3#4\n".replacing("3#4", with: "3 #4"), file: "s")
        #expect(script.lines.map(\.number) == [3, 5])
    }
}
