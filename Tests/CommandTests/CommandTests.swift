import Foundation
import Testing

/// What a user sees of the command: exit statuses, streams, colours. Spec: DESIGN "Scenario", "The command".
@Suite struct ExitStatus {
    @Test func `a clean run ends with 0 and prints the verdict last`() throws {
        let result = try Command.run("run", "Scenarios/virtio-gpu-blob.yaml")
        #expect(result.status == 0)
        #expect(result.output.contains("PFN-mapped, no reference"))
        #expect(result.output.contains("held at the end: nothing"))
        #expect(result.output.split(separator: "\n").last?.hasPrefix("ok: ") == true)
        #expect(result.errors.isEmpty)
    }

    @Test func `a run that breaks a rule ends with 1 and names the rule`() throws {
        let result = try Command.run("run", "Scenarios/virtio-gpu-blob.yaml", "--policy", "guess")
        #expect(result.status == 1)
        #expect(result.output.contains("EFAULT"))
        #expect(result.output.contains("I-5"))
        #expect(result.output.split(separator: "\n").last?.hasPrefix("not ok: ") == true)
    }

    @Test func `a missing file ends with 2 and nothing on standard output`() throws {
        let result = try Command.run("run", "Scenarios/no-such.yaml")
        #expect(result.status == 2 && result.output.isEmpty)
        #expect(result.errors.contains("Scenarios/no-such.yaml"))
    }

    @Test(arguments: [
        ["run"], ["run", "a", "b"], ["fly"], ["run", "Scenarios/anonymous.yaml", "--policy", "kind"],
        ["run", "Scenarios/anonymous.yaml", "--architecture", "vax"], ["bench", "--guest", "0"],
    ])
    func `wrong usage ends with 2 and says what would be right`(_ arguments: [String]) throws {
        let result = try run(arguments)
        #expect(result.status == 2 && result.output.isEmpty)
        #expect(result.errors.contains("Usage:"))
    }

    private func run(_ arguments: [String]) throws -> Command.Result {
        switch arguments.count {
        case 1: try Command.run(arguments[0])
        case 3: try Command.run(arguments[0], arguments[1], arguments[2])
        default: try Command.run(arguments[0], arguments[1], arguments[2], arguments[3])
        }
    }

    @Test func `help and version end with 0`() throws {
        #expect(try Command.run("--help").status == 0)
        #expect(try Command.run("--version").status == 0)
        #expect(try Command.run("run", "--help").output.contains("--policy"))
    }

    @Test func `an error has file, line, column and what would be right`() throws {
        let text = "name: x\nhost:\n  memory: 8 MiB\n  regoins: []\n"
        try Command.withFile("bad.yaml", text) { path in
            let result = try Command.run("run", path)
            #expect(result.status == 2 && result.output.isEmpty)
            #expect(result.errors.contains("\(path):4:3: error: "))
            #expect(result.errors.contains("regions"))
        }
    }

    @Test func `nothing is run when a trace can't be written`() throws {
        let result = try Command.run("run", "Scenarios/anonymous.yaml", "--trace", "/no-such-folder/trace.txt")
        #expect(result.status == 2 && result.output.isEmpty)
    }
}

@Suite struct PlainOutput {
    @Test(arguments: Command.scenarios)
    func `every scenario is clean, without colour in a pipe, and the same twice`(_ scenario: String) throws {
        let first = try Command.run("run", scenario)
        let second = try Command.run("run", scenario, environment: ["SWIFT_DETERMINISTIC_HASHING": "1"])
        #expect(first.status == 0)
        #expect(first.output == second.output)
        #expect(!first.output.contains("\u{1b}"))
    }

    @Test(arguments: Command.scenarios) func `every comparison is what the scenario knows`(_ scenario: String) throws {
        let result = try Command.run("compare", scenario)
        #expect(result.status == 0, "\(result.output)")
    }

    @Test func `JSON is JSON, with sorted keys and the same verdict`() throws {
        let result = try Command.run("run", "Scenarios/dirty-logging.yaml", "--json")
        let object = try JSONSerialization.jsonObject(with: Data(result.output.utf8)) as? [String: Any]
        #expect(object?["verdict"] as? String == "ok")
        let table = try Command.run("compare", "Scenarios/virtio-gpu-blob.yaml", "--json")
        let cells = try JSONSerialization.jsonObject(with: Data(table.output.utf8)) as? [String: Any]
        #expect((cells?["cells"] as? [Any])?.count == 15)
    }

    @Test func `a schema is printed`() throws {
        let result = try Command.run("schema")
        #expect(result.status == 0)
        #expect(throws: Never.self) { try JSONSerialization.jsonObject(with: Data(result.output.utf8)) }
    }
}

/// The model's own runs go through the auditor of real recordings. Spec: DESIGN "Output speaks the kernel's language".
@Suite struct OwnTraces {
    @Test(arguments: Command.scenarios, ["x86-tdp", "x86-shadow"])
    func `a run's trace is clean`(_ scenario: String, _ architecture: String) throws {
        try Command.withFile("trace.txt", "") { path in
            let run = try Command.run("run", scenario, "--architecture", architecture, "--trace", path)
            // 2: the scenario is not meant for the architecture.
            guard run.status != 2 else { return }
            #expect(run.status == 0)
            let audit = try Command.run("audit", path)
            #expect(audit.status == 0, "\(audit.output)")
            // Read-only entries alone don't tell EPT from the legacy format, and secret memory gets none: nothing can be
            // judged there.
            let isJudged = !["read-only-slot", "secret-memory"].contains { scenario.hasSuffix("/\($0).yaml") }
            #expect(audit.output.hasPrefix("CLEAN") || !isJudged)
        }
    }

    @Test func `a trace of the model that is tampered with is found out`() throws {
        try Command.withFile("trace.txt", "") { path in
            _ = try Command.run("run", "Scenarios/anonymous.yaml", "--trace", path)
            let text = try String(contentsOfFile: path, encoding: .utf8)
            // The first writable leaf loses host-writable, bit 57 (0x86… becomes 0x84…).
            let broken = text.replacing("new_spte 86", with: "new_spte 84")
            #expect(broken != text)
            try broken.write(toFile: path, atomically: true, encoding: .utf8)
            let audit = try Command.run("audit", path)
            #expect(audit.status == 1)
            #expect(audit.output.contains("X19"))
        }
    }
}
