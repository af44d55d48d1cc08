import Foundation
import Testing

/// `faultline check` and `defects`, as a user meets them.
@Suite(.serialized) struct CheckCommand {
    private let race = "Scenarios/race-dirty-log.yaml"

    @Test func `a scenario without a wrong order ends with 0 and says what was run`() throws {
        let result = try Command.run("check", "Scenarios/reserved-memory.yaml")
        #expect(result.status == 0 && result.errors.isEmpty)
        #expect(result.output.contains("complete"))
        #expect(result.output.split(separator: "\n").last?.hasPrefix("ok: no order goes wrong") == true)
    }

    @Test func `a finding ends with 1, and its last line makes it again, byte for byte`() throws {
        let result = try Command.run("check", race, "--defect", "fast-fault-unlogged")
        #expect(result.status == 1 && result.errors.isEmpty)
        #expect(result.output.contains("I-12"))
        #expect(!result.output.contains("\u{1b}"))
        let last = try #require(result.output.split(separator: "\n").last)
        let words = last.split(separator: " ").map(String.init)
        #expect(words.prefix(3) == ["reproduce:", "faultline", "check"])
        let schedule = try #require(words.last)
        let again = try Command.run("check", race, "--defect", "fast-fault-unlogged", "--schedule", schedule)
        #expect(again.status == 1)
        #expect(again.output.split(separator: "\n").last == last)
        let twice = try Command.run("check", race, "--defect", "fast-fault-unlogged")
        #expect(twice.output == result.output)
    }

    @Test func `JSON has the rules, the schedule and the story`() throws {
        let result = try Command.run("check", race, "--defect", "fast-fault-unlogged", "--json")
        #expect(result.status == 1)
        let report = try #require(try JSONSerialization.jsonObject(with: Data(result.output.utf8)) as? [String: Any])
        let finding = try #require(report["finding"] as? [String: Any])
        #expect((finding["rules"] as? [String])?.contains("I-12") == true)
        #expect(finding["schedule"] is String && (finding["story"] as? [Any])?.isEmpty == false)
    }

    @Test(arguments: [
        ("--defect", "no-such", "unowned-put"), ("--schedule", "A3.Z9", "character 4"),
        ("--schedule", "A0", "1 or more"), ("--schedule", "A1.P1", "can't go on"),
        ("--schedule", "A99999", "does not fit"), ("--depth", "100000000", "--depth"), ("--runs", "0", "--runs"),
        ("--preemptions", "-1", "--preemptions"), ("--architecture", "vax", "Usage"),
    ])
    func `what can't be done ends with 2 and says what would be right`(
        _ option: String, _ value: String, _ hint: String
    ) throws {
        let result = try Command.run("check", race, "\(option)=\(value)")
        #expect(result.status == 2 && result.output.isEmpty)
        #expect(result.errors.contains(hint))
    }

    @Test func `a scenario that does not end within the depth is refused`() throws {
        let result = try Command.run("check", "Scenarios/buffer-eviction-while-mapped.yaml", "--depth", "100")
        #expect(result.status == 2 || result.output.contains("complete"))
        let text = """
            name: long
            host:
              regions:
                - name: ram
                  kind: anonymous
                  size: 4 KiB
            vm:
              slots:
                - slot: 0
                  guest_phys_addr: 0x0
                  userspace_addr: ram
            phases:
              - name: many
                vcpu0:
                  - write: ram
                    count: 512
                    stride: 8
                host:
                  - load: ram
                    expect: anything
            """
        try Command.withFile("long.yaml", text) { path in
            let result = try Command.run("check", path, "--depth", "1000")
            #expect(result.status == 2 && result.output.isEmpty)
            #expect(result.errors.contains("does not end within 1000 points"))
        }
    }

    @Test func `the museum is listed, as text and as JSON`() throws {
        let text = try Command.run("defects")
        #expect(text.status == 0 && text.output.contains("CVE-2021-22543"))
        let json = try Command.run("defects", "--json")
        let list = try #require(try JSONSerialization.jsonObject(with: Data(json.output.utf8)) as? [[String: Any]])
        #expect(list.count >= 10)
        for entry in list {
            #expect(entry["mechanism"] is String && entry["reference"] is String)
            #expect((entry["scenarios"] as? [String])?.count == 2)
        }
    }
}
