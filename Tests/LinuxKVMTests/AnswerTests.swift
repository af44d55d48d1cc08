import IoctlScript
import Testing

@testable import LinuxKVM

/// What the executor says of things that only it knows.
@Suite(.needsKVM) struct RealAnswers {
    private func answers(_ lines: String..., options: RealRun.Options = .init()) throws -> [String] {
        let script = try Script(text: lines.joined(separator: "\n"), file: "test")
        return try RealRun(options).answers(of: script).map(\.description)
    }

    @Test func `memory that only the model has is not here`() throws {
        let found = try answers("host name=r kind=graphics size=64k", "load host=r")
        #expect(found == ["not here: graphics is memory that only the model has", "signal SIGSEGV done=0"])
    }

    @Test func `the calling process's own memory can't be reached`() throws {
        let found = try answers(
            "host name=r kind=none size=4k", "munmap host=r offset=0x600000000000 length=4k",
            "load host=r offset=0x600000000000", "store host=r offset=0x600000000000 value=1",
            "mprotect host=r offset=0x600000000000 length=4k prot=none",
            "mremap host=r length=4k new_length=4k to=r+0x600000000000", "vm",
            "region slot=0 gpa=0 size=4k hva=r+0x600000000000", "madvise host=r length=0x7f0000000000 advice=dontneed")
        #expect(found.filter { $0 == "not here: the calling process has memory of its own there" }.count == 7)
        #expect(found[0] == "0" && found[6] == "0")
    }

    @Test func `a program one of whose addresses a guest can't name is not run`() throws {
        let found = try answers(
            "host name=r kind=anonymous size=64k", "vm", "vcpu", "region slot=0 gpa=0 size=64k hva=r",
            "guest write cpu=0 gpa=0x1000 count=3 stride=0xfffffffffffff000 value=1", "load host=r count=3")
        #expect(found[4].hasPrefix("not here: a guest's addresses have "))
        #expect(found[5] == "0 values=0x0*3")
    }

    @Test func `a slot whose tables would be large is not made`() throws {
        var options = RealRun.Options()
        options.slotPages = 16
        let found = try answers(
            "host name=r kind=anonymous size=128k", "vm", "region slot=0 gpa=0 size=128k hva=r",
            "region slot=0 gpa=0 size=64k hva=r", "region slot=1 gpa=0x100000 size=0x80000000000 hva=r",
            options: options)
        #expect(found[2] == "not here: the slot's tables would take too much of this machine's memory")
        #expect(found[3] == "0")
        // More pages than any slot may have.
        #expect(found[4] == "-1 EINVAL")
    }

    @Test func `a script has so much private memory in a process, and so much shared memory in all`() throws {
        var options = RealRun.Options()
        options.memory = 64 << 20
        let found = try answers(
            "host name=a kind=anonymous size=32M", "host name=b kind=anonymous size=64M",
            "host name=c kind=memfd size=32M",
            "host name=d kind=memfd size=64M", "mmap host=a length=48M source=shared_anonymous",
            "mmap host=a length=64k source=shared_anonymous",
            // More than any machine has: the kernel's own answer.
            "mmap host=a length=0x200000000000 source=shared_anonymous", options: options)
        let refused = "not here: a script may make less memory than that"
        #expect(found == ["0", "-1 ENOMEM", "0", refused, refused, "0", "-1 ENOMEM"])
    }

    @Test func `code is fetched whatever it is`() throws {
        // Nothing, an invalid instruction, a halt, a call of the system, an endless loop, a breakpoint.
        for value in ["0", "0x0b0f", "0xf4", "0x050f", "0xfeeb", "0xcc", "0x9090909090909090"] {
            let found = try answers(
                "host name=r kind=anonymous size=64k", "store host=r count=4 value=\(value)", "vm", "vcpu",
                "region slot=0 gpa=0 size=64k hva=r", "guest exec cpu=0 gpa=0 count=4",
                "guest exec cpu=0 gpa=0x10000", "guest read cpu=0 gpa=0")
            #expect(found[5] == "0 exit=io done=4", "\(value)")
            #expect(found[6] == "0 exit=internal_error suberror=1 done=0", "\(value)")
            #expect(found[7].hasPrefix("0 exit=io done=1 values="), "\(value)")
        }
    }

    /// Each gigabyte takes a table of its own: there is room for some fifty.
    @Test func `more far addresses than there are tables for`() throws {
        let found = try answers(
            "host name=r kind=anonymous size=64k", "vm", "vcpu", "vm name=w",
            "region vm=vm slot=0 gpa=0 size=64k hva=r",
            "vcpu vm=w", "region vm=w slot=0 gpa=0 size=64k hva=r", "guest write vm=vm cpu=0 gpa=0 value=7",
            "guest read vm=w cpu=0 gpa=0", "region vm=vm slot=1 gpa=0x4000000000 size=64k hva=r",
            "guest read vm=vm cpu=0 gpa=0x3fc0000000 count=2 stride=1G",
            "guest read vm=vm cpu=0 gpa=0x4000000000", "guest read vm=w cpu=0 gpa=0")
        #expect(found[8] == "0 exit=io done=1 values=0x7")
        #expect(found[10] == "0 exit=mmio phys_addr=0x3fc0000000 len=8 is_write=0 done=0")
        #expect(found[11] == "0 exit=io done=1 values=0x7")
        var lines = ["host name=r kind=anonymous size=64k", "vm", "vcpu"]
        for slot in 0..<120 { lines.append("region slot=\(slot) gpa=\(slot << 30) size=64k hva=r") }
        lines += [
            "guest write cpu=0 gpa=0 count=60 stride=1G value=3", "guest read cpu=0 gpa=0x40000000 count=120 stride=1G",
        ]
        let script = try Script(text: lines.joined(separator: "\n"), file: "test")
        let last = try RealRun().answers(of: script).suffix(2).map(\.description)
        #expect(last[0] == "0 exit=io done=60")
        #expect(last[1] == "0 exit=mmio phys_addr=0x1e00000000 len=8 is_write=0 done=119 values=0x3*119")
    }

    @Test func `statistics come from the kernel`() throws {
        let found = try RealRun().answers(
            of: try Script(
                "host name=r kind=anonymous size=64k", "vm", "vcpu", "region slot=0 gpa=0 size=64k hva=r",
                "guest write cpu=0 gpa=0 count=16 value=1", "stats names=pages_4k,no_such_name",
                "stats cpu=0 names=exits"))
        let fields = found[5].fields
        #expect(fields.map(\.name) == ["pages_4k", "no_such_name"])
        #expect(fields[1].value == .word("none"))
        guard case .decimal(let exits)? = found[6].fields.first?.value else { throw Missing() }
        #expect(exits > 0)
    }
    private struct Missing: Error {}

    @Test func `one child answers many scripts`() throws {
        let run = try RealRun()
        let script = try Script.named("documentation")
        let first = try run.answers(of: script)
        for _ in 0..<20 { #expect(try run.answers(of: script) == first) }
        let large = try Script(
            text: (0..<3000).map { "check_extension of=device cap=\($0 % 3)" }.joined(separator: "\n"), file: "test")
        #expect(try run.answers(of: large).count == 3000)
    }

    @Test func `an answer that does not fit beside others begins a batch`() throws {
        // Each read brings 2^20 words back: eight fill the room.
        var lines = ["host name=r kind=anonymous size=8M"]
        for value in 0..<20 {
            lines += ["store host=r count=1048576 stride=8 value=\(value)", "load host=r count=1048576 stride=8"]
        }
        let answers = try RealRun().answers(of: try Script(text: lines.joined(separator: "\n"), file: "test"))
        for value in 0..<20 {
            #expect(answers[2 + 2 * value].description == "0 values=0x\(String(value, radix: 16))*1048576")
        }
    }
}
