import Testing

/// Files of private memory, attributes and pre-fault through their calls.
@Suite struct G2_15_PrivateMemoryCalls {
    private static let begin = """
        host name=ram kind=anonymous size=1M
        vm type=sw_protected
        memfd name=m0 size=64k
        region2 slot=0 flags=guest_memfd gpa=0x10000 size=64k hva=ram memfd=m0
        vcpu
        attributes gpa=0x10000 size=32k attributes=private

        """

    private func after(_ calls: String) throws -> [String] { Array(try outcomes(Self.begin + calls).dropFirst(6)) }

    @Test func `private memory is the file's, shared memory the process's`() throws {
        #expect(
            try after(
                """
                guest write cpu=0 gpa=0x10000 value=1
                load host=ram
                attributes gpa=0x10000 size=4k attributes=none
                guest read cpu=0 gpa=0x10000
                attributes gpa=0x10000 size=4k attributes=private
                guest read cpu=0 gpa=0x10000
                punch memfd=m0 offset=0 length=4k
                guest read cpu=0 gpa=0x10000
                """) == [
                    "0 exit=io done=1", "0 values=0x0", "0", "0 exit=io done=1 values=0x0", "0",
                    "0 exit=io done=1 values=0x1", "0", "0 exit=io done=1 values=0x0",
                ])
    }

    @Test func `a closed file is a memory fault`() throws {
        #expect(
            try after("close memfd=m0\nguest read cpu=0 gpa=0x11008\nguest read cpu=0 gpa=0x18000\nclose memfd=m0") == [
                "0", "-1 EFAULT exit=memory_fault flags=0x8 gpa=0x11000 size=0x1000 done=0",
                "0 exit=io done=1 values=0x0", "-1 EBADF",
            ])
    }

    @Test func `a VM lives as long as its file`() throws {
        #expect(
            try after("close vm=vm\nclose cpu=0\npunch memfd=m0 offset=0 length=4k\nclose memfd=m0") == [
                "0", "0", "0", "0",
            ])
    }

    @Test(arguments: [
        ("memfd name=a size=0", "-1 EINVAL"), ("memfd name=a size=1", "-1 EINVAL"),
        ("memfd name=a size=0x8000000000000000", "-1 EINVAL"), ("memfd name=a size=4k flags=1", "-1 EINVAL"),
        ("allocate memfd=m0 offset=0 length=64k", "0"), ("allocate memfd=m0 offset=0 length=68k", "-1 EINVAL"),
        ("allocate memfd=m0 offset=0 length=0", "-1 EINVAL"), ("allocate memfd=m0 offset=1 length=4k", "-1 EINVAL"),
        ("allocate memfd=m0 mode=0 offset=0 length=4k", "-1 EOPNOTSUPP"),
        ("allocate memfd=m0 mode=2 offset=0 length=4k", "-1 EOPNOTSUPP"),
        ("punch memfd=m0 offset=0 length=0x7ffffffffffff000", "0"),
        ("punch memfd=m0 offset=4k length=0x7ffffffffffff000", "-1 EFBIG"),
        ("punch memfd=m0 offset=0 length=0x8000000000000000", "-1 EINVAL"),
        ("attributes gpa=0x10000 size=0 attributes=private", "-1 EINVAL"),
        ("attributes gpa=0x10000 size=1 attributes=private", "-1 EINVAL"),
        ("attributes gpa=0x10000 size=4k attributes=0x1", "-1 EINVAL"),
        ("attributes gpa=0x10000 size=4k attributes=private flags=1", "-1 EINVAL"),
        ("attributes gpa=0xfffffffffffff000 size=8k attributes=private", "-1 EINVAL"),
        ("prefault cpu=0 gpa=0x10000 size=64k", "0 gpa=0x20000 size=0x0"),
        ("prefault cpu=0 gpa=0x1f000 size=8k", "0 gpa=0x20000 size=0x1000"),
        ("prefault cpu=0 gpa=0x20000 size=4k", "-1 ENOENT"), ("prefault cpu=0 gpa=0x10000 size=0", "-1 EINVAL"),
        ("prefault cpu=0 gpa=0x10001 size=4k", "-1 EINVAL"),
        ("prefault cpu=0 gpa=0x10000 size=4k flags=1", "-1 EINVAL"),
        ("prefault cpu=0 gpa=0xfffffffffffff000 size=4k", "-1 EINVAL"),
    ])
    func `one call`(call: String, answer: String) throws { #expect(try after(call) == [answer]) }
}

/// What processes do to memory under a slot, as the guest sees it.
@Suite struct HostStepsOfScripts {
    @Test(arguments: [
        ("anonymous", "0 exit=io done=1 values=0x0"), ("memfd", "0 exit=io done=1 values=0x0"),
        ("file_private", "0 exit=io done=1 values=0x0"), ("secret", "-1 EFAULT done=0"),
        ("packet_ring", "0 exit=io done=1 values=0x0"), ("perf_ring", "0 exit=io done=1 values=0x0"),
        ("device_bar", "0 exit=io done=1 values=0x0"), ("none", "-1 EFAULT done=0"),
    ])
    func `what the guest reads first from each kind`(kind: String, answer: String) throws {
        let all = try outcomes(
            """
            host name=ram kind=\(kind) size=20k
            vm
            vcpu
            region slot=0 gpa=0 size=20k hva=ram
            guest read cpu=0 gpa=0
            """)
        #expect(all.last == answer)
    }

    @Test func `the guest's second access to a ring page is emulated for ever`() throws {
        let all = try outcomes(
            """
            host name=ring kind=perf_ring size=8k
            vm
            vcpu
            region slot=0 gpa=0 size=8k hva=ring
            guest read cpu=0 gpa=0
            guest write cpu=0 gpa=0 value=5 count=2 stride=8
            load host=ring count=2 stride=8
            guest write cpu=0 gpa=0x1000 value=1
            """)
        #expect(
            all.suffix(3) == [
                "0 exit=io done=2", "0 values=0x5*2", all[7],
            ])
        #expect(all[7] != "0 exit=io done=1")
    }

    @Test func `the emulator's accesses make no entry`() throws {
        let all = try outcomes(
            """
            host name=ram kind=anonymous size=64k
            vm
            vcpu
            region slot=0 flags=log_dirty gpa=0 size=64k hva=ram
            guest write cpu=0 gpa=0 value=5 by=emulator
            guest read cpu=0 gpa=0 by=emulator
            stats names=pages_4k
            get_dirty_log slot=0
            guest read cpu=0 gpa=0x100000 by=emulator
            """)
        #expect(
            all.suffix(5) == [
                "0 exit=io done=1", "0 exit=io done=1 values=0x5", "0 pages_4k=0", "0 bits=0x1",
                "0 exit=mmio phys_addr=0x100000 len=8 is_write=0 done=0",
            ])
    }

    @Test(arguments: ["native", "emulator"])
    func `accesses narrower than a word touch their bytes alone`(by: String) throws {
        let all = try outcomes(
            """
            host name=ram kind=anonymous size=4k
            vm
            vcpu
            region slot=0 gpa=0 size=4k hva=ram
            store host=ram value=0x1122334455667788
            guest write cpu=0 gpa=2 size=2 value=0xabcdef by=\(by)
            guest write cpu=0 gpa=7 size=1 value=0xff by=\(by)
            load host=ram
            guest read cpu=0 gpa=4 size=4 by=\(by)
            guest write cpu=0 gpa=0x9001 size=1 value=0x1ff by=\(by)
            """)
        #expect(
            all.suffix(3) == [
                "0 values=0xff223344cdef7788", "0 exit=io done=1 values=0xff223344",
                "0 exit=mmio phys_addr=0x9001 len=1 is_write=1 data=0xff done=0",
            ])
    }

    @Test func `a child has copies of private memory and shares the rest; an ended process is gone`() throws {
        #expect(
            try outcomes(
                """
                host name=a kind=anonymous size=4k
                host name=s kind=memfd size=4k
                store host=a value=1
                store host=s value=1
                process name=p
                store host=a value=2
                store host=s value=2
                load host=a as=p
                load host=s as=p
                exit as=p
                """) == ["0", "0", "0", "0", "0", "0", "0", "0 values=0x1", "0 values=0x2", "0"])
    }
}
