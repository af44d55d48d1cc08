import Interface
import IoctlScript
import Testing

/// The rows of the call's table through both ioctls. Each case is one call after the same beginning; what it leaves is
/// looked at by reading guest memory.
@Suite struct G4_4_Ioctl {
    private static let begin = """
        host name=ram kind=anonymous size=1M
        host name=file kind=memfd size=1M
        vm
        vm name=protected type=sw_protected
        memfd vm=protected name=m0 size=64k
        memfd vm=vm name=other size=64k
        process name=child
        region vm=vm slot=0 gpa=0x10000 size=64k hva=ram
        region2 vm=protected slot=0 flags=guest_memfd gpa=0x10000 size=32k hva=ram memfd=m0

        """

    private func outcome(_ call: String) throws -> String {
        let all = try outcomes(Self.begin + call)
        #expect(all.dropLast() == Array(repeating: "0", count: 9)[...])
        return try #require(all.last)
    }

    @Test(arguments: [
        // Row 0 comes before all others, also before the null pointer.
        ("region vm=vm as=child slot=40000 flags=0xff gpa=1 size=1 hva=ram+1", "-1 EIO"),
        // Row 2, and the same flag where it may be given.
        ("region vm=protected slot=1 flags=guest_memfd gpa=0x100000 size=4k hva=ram", "-1 EINVAL"),
        ("region vm=vm slot=1 flags=0x8 gpa=0x100000 size=4k hva=ram", "-1 EINVAL"),
        ("region2 vm=vm slot=1 flags=0x8 gpa=0x100000 size=4k hva=ram", "-1 EINVAL"),
        ("region2 vm=vm slot=1 flags=0x80000000 gpa=0x100000 size=4k hva=ram", "-1 EINVAL"),
        // Row 3.
        ("region vm=vm slot=32764 gpa=0x100000 size=4k hva=ram", "-1 EINVAL"),
        ("region vm=vm slot=32763 gpa=0x100000 size=4k hva=ram", "0"),
        ("region vm=vm slot=0xffff gpa=0x100000 size=4k hva=ram", "-1 EINVAL"),
        // Row 4.
        ("region2 vm=vm slot=1 flags=guest_memfd gpa=0x100000 size=4k hva=ram memfd=other", "-1 EINVAL"),
        (
            "region2 vm=protected slot=1 flags=guest_memfd|log_dirty gpa=0x100000 size=4k hva=ram memfd=m0 offset=32k",
            "-1 EINVAL"
        ),
        (
            "region2 vm=protected slot=1 flags=guest_memfd|readonly gpa=0x100000 size=4k hva=ram memfd=m0 offset=32k",
            "-1 EINVAL"
        ),
        // Rows 5 to 8.
        ("region vm=vm slot=1 gpa=0x100000 size=4097 hva=ram", "-1 EINVAL"),
        ("region vm=vm slot=1 gpa=0x100001 size=4k hva=ram", "-1 EINVAL"),
        ("region vm=vm slot=1 gpa=0x100000 size=4k hva=ram+1", "-1 EINVAL"),
        ("region vm=vm slot=1 gpa=0x100000 size=4k hva=kernel", "-1 EINVAL"),
        ("region vm=vm slot=1 gpa=0x100000 size=4k hva=ram+0x8000000000000000", "-1 EINVAL"),
        ("region vm=vm slot=1 gpa=0x100000 size=4k hva=null", "0"),
        ("region vm=vm slot=1 gpa=0x100000 size=4k hva=ram+16M", "0"),
        (
            "region2 vm=protected slot=1 flags=guest_memfd gpa=0x100000 size=4k hva=ram memfd=m0 offset=32769",
            "-1 EINVAL"
        ),
        (
            "region2 vm=protected slot=1 flags=guest_memfd gpa=0x100000 size=4k hva=ram memfd=m0 offset=0xfffffffffffff000",
            "-1 EINVAL"
        ),
        // Row 9: two address spaces, but one where memory can be private.
        ("region vm=vm slot=1:0 gpa=0x10000 size=4k hva=ram", "0"),
        ("region vm=vm slot=2:0 gpa=0x100000 size=4k hva=ram", "-1 EINVAL"),
        ("region vm=protected slot=1:0 gpa=0x100000 size=4k hva=ram", "-1 EINVAL"),
        // Rows 10 and 11.
        ("region vm=vm slot=1 gpa=0xfffffffffffff000 size=4k hva=ram", "-1 EINVAL"),
        ("region vm=vm slot=1 gpa=0x100000 size=0x80000000000 hva=null", "-1 EINVAL"),
        // Row 12: absent; rubbish fails a delete; then a delete.
        ("region vm=vm slot=1 gpa=0 size=0 hva=null", "-1 EINVAL"),
        ("region vm=vm slot=0 gpa=1 size=0 hva=null", "-1 EINVAL"),
        ("region vm=vm slot=0 flags=0x4 gpa=0 size=0 hva=null", "-1 EINVAL"),
        ("region vm=vm slot=0 gpa=0 size=0 hva=null", "0"),
        // Rows 14 and 14b.
        ("region2 vm=protected slot=0 flags=guest_memfd gpa=0x10000 size=32k hva=ram memfd=m0", "-1 EINVAL"),
        ("region2 vm=protected slot=0 gpa=0x10000 size=32k hva=ram", "-1 EINVAL"),
        // Rows 15 and 16.
        ("region vm=vm slot=0 gpa=0x10000 size=32k hva=ram", "-1 EINVAL"),
        ("region vm=vm slot=0 gpa=0x10000 size=64k hva=file", "-1 EINVAL"),
        ("region vm=vm slot=0 flags=readonly gpa=0x10000 size=64k hva=ram", "-1 EINVAL"),
        ("region vm=vm slot=0 gpa=0x10000 size=64k hva=ram", "0"),
        ("region vm=vm slot=0 flags=log_dirty gpa=0x10000 size=64k hva=ram", "0"),
        ("region vm=vm slot=0 gpa=0x18000 size=64k hva=ram", "0"),
        // Row 17.
        ("region vm=vm slot=1 gpa=0x1f000 size=4k hva=ram", "-1 EEXIST"),
        ("region vm=vm slot=1 gpa=0x20000 size=4k hva=ram", "0"),
        // Row 19.
        ("region2 vm=protected slot=1 flags=guest_memfd gpa=0x100000 size=4k hva=ram", "-1 EBADF"),
        ("region2 vm=protected slot=1 flags=guest_memfd gpa=0x100000 size=4k hva=ram memfd=other", "-1 EINVAL"),
        ("region2 vm=protected slot=1 flags=guest_memfd gpa=0x100000 size=4k hva=ram memfd=m0", "-1 EINVAL"),
        (
            "region2 vm=protected slot=1 flags=guest_memfd gpa=0x100000 size=64k hva=ram memfd=m0 offset=32k",
            "-1 EINVAL"
        ),
        ("region2 vm=protected slot=1 flags=guest_memfd gpa=0x100000 size=32k hva=ram memfd=m0 offset=32k", "0"),
    ])
    func `one row`(call: String, answer: String) throws { #expect(try outcome(call) == answer) }

    @Test func `an overlap is found only after all that is EINVAL`() throws {
        #expect(try outcome("region vm=vm slot=1 gpa=0x10000 size=0x80000000000 hva=null") == "-1 EINVAL")
        #expect(
            try outcome("region2 vm=protected slot=1 flags=guest_memfd gpa=0x10000 size=4k hva=ram") == "-1 EEXIST")
    }

    @Test func `a refused change leaves the slot as it was`() throws {
        let all = try outcomes(
            Self.begin + """
                vcpu vm=vm
                store host=ram value=9
                region vm=vm slot=0 gpa=0x10000 size=32k hva=ram
                guest read vm=vm cpu=0 gpa=0x10000
                """)
        #expect(all.suffix(2) == ["-1 EINVAL", "0 exit=io done=1 values=0x9"])
    }

    /// Rows 20 to 22, where the kernel's own memory ends.
    @Test func `a slot whose tables find no memory is ENOMEM; what is there stays`() throws {
        var features = KernelFeatures()
        features.slotPages = 16
        let script = try Script(
            text: """
                host name=ram kind=anonymous size=1M
                vm
                region slot=0 gpa=0 size=68k hva=ram
                region slot=0 flags=log_dirty gpa=0 size=68k hva=ram
                region slot=0 gpa=0 size=64k hva=ram
                region slot=0 flags=log_dirty gpa=0 size=64k hva=ram
                region slot=1 gpa=0 size=68k hva=ram
                region slot=0 gpa=0 size=0 hva=ram
                """, file: "script")
        var executor = try #require(ModelExecutor(features: features))
        let answers = script.run(on: &executor).dropFirst(2).map(\.description)
        executor.finish()
        #expect(answers == ["-1 ENOMEM", "-1 ENOMEM", "0", "0", "-1 EEXIST", "0"])
        #expect(executor.findings.isEmpty)
    }
}
