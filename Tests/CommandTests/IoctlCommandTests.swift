import Foundation
import Testing

/// `faultline ioctl`: answers on standard output, mistakes with their place on standard error, and the exit status.
@Suite struct IoctlCommand {
    /// Runs `body` with the path of a script.
    private func with(_ text: String, _ body: (String) throws -> Void) throws {
        let path = NSTemporaryDirectory() + "script-\(UUID().uuidString).ioctl"
        try text.write(toFile: path, atomically: true, encoding: .utf8)
        try body(path)
        try FileManager.default.removeItem(atPath: path)
    }

    @Test func `a script's answers, as text and as JSON`() throws {
        try with("vm\nring_reset\n") { path in
            let text = try Command.run("ioctl", path)
            #expect(text.status == 0 && text.errors.isEmpty)
            #expect(text.output == "1: 0\n2: -1 EINVAL\n")
            let json = try Command.run("ioctl", "--on=model", "--json", path)
            #expect(json.status == 0)
            #expect(
                json.output == """
                    [
                      {"line": 1, "result": 0},
                      {"line": 2, "result": -1, "errno": "EINVAL"}
                    ]

                    """)
        }
    }

    @Test func `a mistake ends with 2 before anything ran`() throws {
        try with("vm\nvmm\n") { path in
            let result = try Command.run("ioctl", path)
            #expect(result.status == 2 && result.output.isEmpty)
            #expect(result.errors.hasPrefix("\(path):2:1: error: there is no call \"vmm\"\n"))
        }
    }

    @Test(arguments: ["--json", "--random=0", "--print", "--on=tape", "/nowhere", "--seed=x"])
    func `wrong usage ends with 2`(_ argument: String) throws {
        let result = try Command.run("ioctl", argument)
        #expect(result.status == 2 && result.output.isEmpty)
    }

    @Test func `random scripts are run, or printed`() throws {
        let run = try Command.run("ioctl", "--random=500", "--seed=3")
        #expect(run.status == 0 && run.output.hasPrefix("ok: "))
        let printed = try Command.run("ioctl", "--random=1", "--seed=3", "--print")
        #expect(printed.status == 0 && printed.output.hasPrefix("# faultline ioctl 1\nhost "))
    }

    @Test func `a quick benchmark prints each row`() throws {
        let result = try Command.run("bench", "ioctl", "--quick")
        #expect(result.status == 0 && result.errors.isEmpty, "\(result.errors)")
        for row in ["random scripts", "a guest write, mapped", "a slot made, and deleted"] {
            #expect(result.output.contains(row))
        }
    }

    // MARK: This machine's kernel

    @Test func `a device that can't be used ends with 3 and the reason`() throws {
        try with("vm\n") { path in
            for arguments in [["--on=kvm"], ["--diff"]] {
                let result = try Command.run(["ioctl", "--device=/nowhere", path] + arguments)
                #expect(result.status == 3 && result.output.isEmpty)
                #expect(result.errors == "error: /nowhere can't be opened: ENOENT\n")
            }
        }
    }

    @Test func `a script that is wrong ends with 2 whoever should answer`() throws {
        try with("vmm\n") { path in
            for side in ["--on=kvm", "--diff"] {
                let result = try Command.run("ioctl", side, path)
                #expect(result.status == 2 && result.output.isEmpty)
            }
        }
    }

    private static let hasKVM = access("/dev/kvm", R_OK | W_OK) == 0

    @Test(.enabled(if: hasKVM, "/dev/kvm can't be opened"))
    func `the kernel's answers, and what differs`() throws {
        try with("vm\nring_reset\ncheck_extension of=device cap=9999\n") { path in
            let real = try Command.run("ioctl", "--on=kvm", path)
            #expect(real.status == 0 && real.errors.isEmpty && real.output == "1: 0\n2: -1 EINVAL\n3: 0\n")
            let same = try Command.run("ioctl", "--diff", path)
            #expect(same.status == 0 && same.output == "0 of 3 answers differ\n")
        }
        // Not about memory, and so nothing that the model has.
        try with("vm\nenable_cap cap=max_vcpu_id args=16\n") { path in
            let different = try Command.run("ioctl", "--diff", path)
            #expect(different.status == 1 && different.output.hasSuffix("1 of 2 answers differ\n"))
        }
    }

    @Test(.enabled(if: hasKVM, "/dev/kvm can't be opened"))
    func `a call that does not return ends with 1 and the line`() throws {
        let slow = "guest write cpu=0 gpa=0 count=1048576 stride=0"
        let lines = ["host name=r kind=anonymous size=64k", "vm", "vcpu", "region slot=0 gpa=0 size=64k hva=r"]
        try with((lines + Array(repeating: slow + " by=emulator", count: 2)).joined(separator: "\n")) { path in
            let result = try Command.run("ioctl", "--on=kvm", "--deadline=1", path)
            // Where the emulator can't be had, or is fast, nothing is slow.
            guard result.status != 0 else { return }
            #expect(result.status == 1 && result.output.hasPrefix("1: 0\n2: 0\n3: 0\n4: 0\n"))
            #expect(result.errors.contains("the call did not return within 1000 ms"))
        }
    }
}
