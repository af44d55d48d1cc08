import Testing

/// The dirty log's calls, with slots of 65 pages and every wrong argument.
@Suite struct G5_LogCalls {
    private static let begin = """
        host name=ram kind=anonymous size=1M
        vm
        vcpu
        region slot=0 flags=log_dirty gpa=0x10000 size=260k hva=ram
        region slot=1 gpa=0x100000 size=64k hva=ram
        guest write cpu=0 gpa=0x10000 value=1
        guest write cpu=0 gpa=0x50000 value=1

        """

    private func after(_ calls: String) throws -> [String] { Array(try outcomes(Self.begin + calls).dropFirst(7)) }

    @Test func `what is got is taken; a new write is seen again`() throws {
        #expect(
            try after(
                """
                get_dirty_log slot=0
                get_dirty_log slot=0
                guest write cpu=0 gpa=0x50000 value=2
                get_dirty_log slot=0
                """) == ["0 bits=0x1*2", "0 bits=0x0*2", "0 exit=io done=1", "0 bits=0x0,0x1"])
    }

    @Test func `a report that can't be copied is lost`() throws {
        #expect(
            try after("get_dirty_log slot=0 bitmap=null\nget_dirty_log slot=0") == ["-1 EFAULT", "0 bits=0x0*2"])
    }

    @Test func `in manual mode bits stay until they are cleared`() throws {
        #expect(
            try after(
                """
                enable_cap cap=manual_dirty_log_protect2 args=1
                get_dirty_log slot=0
                get_dirty_log slot=0
                clear_dirty_log slot=0 first=64 count=1 bits=all
                get_dirty_log slot=0
                clear_dirty_log slot=0 first=0 count=64 bits=0x2
                clear_dirty_log slot=0 first=0 count=64 bits=0x1
                get_dirty_log slot=0
                """) == [
                    "0", "0 bits=0x1*2", "0 bits=0x1*2", "0", "0 bits=0x1,0x0", "0", "0", "0 bits=0x0*2",
                ])
    }

    @Test(arguments: [
        ("get_dirty_log slot=32764", "-1 EINVAL"), ("get_dirty_log slot=2:0", "-1 EINVAL"),
        ("get_dirty_log slot=1:0", "-1 ENOENT"), ("get_dirty_log slot=1", "-1 ENOENT"),
        ("get_dirty_log slot=5", "-1 ENOENT"),
        ("clear_dirty_log slot=32764 first=1 count=1 bits=all", "-1 EINVAL"),
        ("clear_dirty_log slot=5 first=1 count=1 bits=all", "-1 EINVAL"),
        ("clear_dirty_log slot=5 first=0 count=1 bits=all", "-1 ENOENT"),
        ("clear_dirty_log slot=0 first=128 count=0 bits=all", "-1 EINVAL"),
        ("clear_dirty_log slot=0 first=0 count=66 bits=all", "-1 EINVAL"),
        ("clear_dirty_log slot=0 first=0 count=63 bits=all", "-1 EINVAL"),
        ("clear_dirty_log slot=0 first=0 count=0xffffffff bits=null", "-1 EINVAL"),
        ("clear_dirty_log slot=0 first=0 count=65 bits=null", "-1 EFAULT"),
        ("clear_dirty_log slot=0 first=0 count=0 bits=null", "0"),
        ("clear_dirty_log slot=0 first=0 count=65 bits=all", "0"),
        ("enable_cap cap=manual_dirty_log_protect2 args=2", "-1 EINVAL"),
        ("enable_cap cap=manual_dirty_log_protect2 args=4", "-1 EINVAL"),
        ("enable_cap cap=manual_dirty_log_protect2 args=1 flags=1", "-1 EINVAL"),
        ("enable_cap cap=user_memory", "-1 EINVAL"), ("enable_cap cap=0xffffffff", "-1 EINVAL"),
        ("enable_cap cap=dirty_log_ring args=64k", "-1 EINVAL"), ("ring_reset", "-1 EINVAL"),
        ("ring_collect cpu=0", "signal SIGBUS"),
    ])
    func `one call`(call: String, answer: String) throws { #expect(try after(call) == [answer]) }

    @Test(arguments: [
        ("0", "-1 EINVAL"), ("2048", "-1 EINVAL"), ("4096", "0"), ("8k", "0"), ("65537", "-1 EINVAL"), ("1M", "0"),
        ("2M", "-1 E2BIG"),
        ("0x100010000", "0"),
    ])
    func `sizes of rings`(bytes: String, answer: String) throws {
        #expect(try outcomes("vm\nenable_cap cap=dirty_log_ring args=\(bytes)").last == answer)
    }

    @Test func `a ring fills, stops the guest, and is reset`() throws {
        let all = try outcomes(
            """
            host name=ram kind=anonymous size=2M
            vm
            enable_cap cap=dirty_log_ring args=8k
            enable_cap cap=dirty_log_ring args=8k
            vcpu
            region slot=0 flags=log_dirty gpa=0 size=2M hva=ram
            guest write cpu=0 gpa=0 count=512 value=1
            get_dirty_log slot=0
            ring_collect cpu=0 max=2
            ring_reset
            guest write cpu=0 gpa=0x1ff000 value=1
            ring_collect cpu=0
            ring_reset
            ring_reset
            guest write cpu=0 gpa=0x1ff000 value=1
            """)
        #expect(all[3] == "-1 EINVAL")
        #expect(all[6].hasPrefix("0 exit=dirty_ring_full done="))
        #expect(all[7] == "-1 ENXIO")
        #expect(all[8] == "0 count=2 entries=0:0+0x0-0x1")
        #expect(all[9] == "2")
        #expect(all[13] == "0")
        #expect(all[14] == "0 exit=io done=1")
    }
}
