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
}
