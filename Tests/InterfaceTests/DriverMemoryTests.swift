import Interface
import IoctlScript
import Testing

/// Memory of drivers as Linux 6.18 lets a process use it: measured with `faultline ioctl --diff`.
@Suite struct DriverMemory {
    private func answers(_ lines: [String]) throws -> [String] {
        let script = try Script(text: lines.joined(separator: "\n"), file: "test")
        var model = try #require(ModelExecutor())
        let answers = script.run(on: &model).map(\.description)
        model.finish()
        #expect(model.findings.isEmpty)
        return answers
    }

    @Test(arguments: [
        ("munmap host=r length=4k", "-1 EINVAL"), ("mprotect host=r length=4k prot=r", "-1 EINVAL"),
        ("mremap host=r length=4k new_length=4k to=room", "-1 EINVAL"),
        ("mremap host=r length=4k new_length=8k to=room", "-1 EFAULT"),
        ("mremap host=r length=4k new_length=8k", "-1 EFAULT"),
        ("mremap host=r length=20k new_length=24k to=room", "-1 EFAULT"),
        ("mremap host=r length=20k new_length=20k to=room", "0"),
        ("madvise host=r length=20k advice=remove", "-1 ENODEV"),
        ("madvise host=r length=4k advice=hugepage", "-1 EINVAL"),
        ("host name=x kind=perf_ring size=20k prot=rwx", "-1 EPERM"),
        ("host name=x kind=perf_ring size=16k", "-1 EINVAL"),
    ])
    func `a ring of events is mapped as a whole`(call: String, answer: String) throws {
        let found = try answers(["host name=r kind=perf_ring size=20k", "host name=room kind=none size=1M", call])
        #expect(found == ["0", "0", answer])
    }

    @Test func `a ring of events is filled at mmap, and its data pages are read-only to a guest at once`() throws {
        let found = try answers([
            "host name=r kind=perf_ring size=20k", "vm", "vcpu", "region slot=0 gpa=0 size=20k hva=r",
            "guest write cpu=0 gpa=0x1000 value=1",
        ])
        #expect(found[4] == "0 exit=mmio phys_addr=0x1000 len=8 is_write=1 data=0x1 done=0")
    }

    @Test func `a ring of events is not inherited, a ring of packets is`() throws {
        let found = try answers([
            "host name=r kind=perf_ring size=20k", "host name=p kind=packet_ring size=16k", "process name=c",
            "load host=r as=c", "load host=p as=c", "load host=r",
        ])
        #expect(found[3...] == ["signal SIGSEGV done=0", "0 values=0x0", "0 values=0x0"])
    }

    @Test func `a ring of packets has its pages once`() throws {
        let found = try answers([
            "host name=p kind=packet_ring size=16k", "madvise host=p length=4k advice=dontneed", "load host=p",
            "load host=p offset=4k", "madvise host=p length=4k advice=populate_read",
            "madvise host=p length=4k advice=remove",
        ])
        #expect(found == ["0", "0", "signal SIGBUS done=0", "0 values=0x0", "-1 EFAULT", "-1 ENODEV"])
    }

    @Test func `a ring of packets moves, and grows where it moves to`() throws {
        let found = try answers([
            "host name=p kind=packet_ring size=16k", "host name=room kind=none size=1M",
            "store host=p offset=8k value=7",
            "mremap host=p offset=8k length=4k new_length=4k to=room", "load host=room", "load host=p offset=8k",
            "mremap host=p offset=12k length=4k new_length=8k to=room+64k", "load host=room offset=64k count=2",
            "mremap host=room offset=64k length=8k new_length=12k",
        ])
        #expect(
            found[3...] == [
                "0", "0 values=0x7", "signal SIGSEGV done=0", "0", "signal SIGBUS done=1 values=0x0", "-1 ENOMEM",
            ])
    }

    @Test func `a guest sees what was moved`() throws {
        let found = try answers([
            "host name=p kind=packet_ring size=16k", "host name=room kind=none size=1M", "vm", "vcpu",
            "region slot=0 gpa=0 size=16k hva=p", "region slot=1 gpa=0x100000 size=16k hva=room",
            "guest write cpu=0 gpa=0x1000 value=9", "mremap host=p length=16k new_length=16k to=room",
            "guest read cpu=0 gpa=0x1000", "guest read cpu=0 gpa=0x101000",
        ])
        #expect(found[7...] == ["0", "-1 EFAULT done=0", "0 exit=io done=1 values=0x9"])
    }

    @Test func `private memory larger than the machine is refused before what is there goes`() throws {
        let found = try answers([
            "host name=r kind=anonymous size=64k", "store host=r value=5", "mmap host=r length=0x400000000000",
            "load host=r",
            "mmap host=r length=0x400000000000 source=shared_anonymous", "load host=r",
        ])
        #expect(found[2...] == ["-1 ENOMEM", "0 values=0x5", "-1 ENOMEM", "signal SIGSEGV done=0"])
    }
}
