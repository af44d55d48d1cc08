import Foundation
import IoctlScript
import LinuxKVM
import Machine
import Scenario
import Testing

@testable import Conformance

/// Scenarios as scripts, and what a kernel makes of them.
@Suite struct PlayedScenarios {
    private static let folder = URL(fileURLWithPath: #filePath).deletingLastPathComponent()
        .appendingPathComponent("../../Scenarios").standardized

    private static func plan(_ name: String) throws -> Plan {
        try loadScenario(path: folder.appendingPathComponent(name + ".yaml").path).plan
    }

    private func plan(_ steps: String, slot: String = "", regions: String = "") throws -> Plan {
        try loadScenario(
            text: """
                name: s
                host:
                  regions:
                    - {name: ram, kind: anonymous, size: 64 KiB}\(regions)
                vm:
                  slots:
                    - {slot: 3, guest_phys_addr: 0x10000, userspace_addr: ram\(slot)}
                phases:
                  - name: p
                \(steps)
                """, file: "s.yaml"
        ).plan
    }

    @Test func `a step is a line, and repeated accesses a line each`() throws {
        let script = try PlanScript(
            try plan(
                "    vcpu0:\n      - {write: ram, count: 2, value: 0x7}\n    host:\n      - get_dirty_log: 3\n",
                slot: ", flags: [log_dirty_pages]"))
        #expect(
            script.script.source == """
                # faultline ioctl 1
                host name=r0 kind=anonymous size=0x10000 prot=rw
                vm name=vm type=default
                vcpu vm=vm id=0
                region vm=vm slot=3 flags=log_dirty gpa=0x10000 size=0x10000 hva=r0
                guest write vm=vm cpu=0 gpa=0x10000 value=0x7
                guest write vm=vm cpu=0 gpa=0x11000 value=0x8
                get_dirty_log vm=vm slot=3

                """)
        #expect(script.preparation == 4 && script.places.map(\.lines) == [4..<6, 6..<7])
        // The language reads it back.
        #expect(try Script(text: script.script.source, file: "s").lines.map(\.step) == script.script.lines.map(\.step))
    }

    @Test func `answers become outcomes`() throws {
        let script = try PlanScript(
            try plan(
                "    vcpu0:\n      - read: ram\n      - write: ram\n        value: 1\n    host:\n      - load: ram\n      - get_dirty_log: 3\n",
                slot: ", flags: [log_dirty_pages]"
            ))
        func outcome(_ line: Int, _ outcome: Answer.Outcome, _ fields: Answer.Field...) -> StepOutcome {
            script.outcome(line, Answer(outcome, fields))
        }
        let io = Answer.Field("exit", .word("io"))
        #expect(outcome(4, .returned(0), io, .init("done", .decimal(1)), .init("values", .list([9]))) == .value(9))
        #expect(outcome(5, .returned(0), io) == .done)
        #expect(outcome(4, .returned(0), .init("exit", .word("mmio"))) == .mmio)
        #expect(outcome(4, .returned(0), .init("exit", .word("dirty_ring_full"))) == .dirtyRingFull)
        #expect(outcome(4, .failed(14), .init("exit", .word("memory_fault"))) == .memoryFault)
        #expect(outcome(4, .failed(14)) == .error(.EFAULT))
        #expect(outcome(6, .returned(0), .init("values", .list([3]))) == .value(3))
        #expect(outcome(6, .signal("SIGBUS")) == .error(.EFAULT))
        #expect(outcome(7, .returned(0), .init("bits", .list([0x5, 0x1]))) == .pages([0, 2, 64]))
    }

    @Test(arguments: [
        ("virtio-gpu-blob", "region blob: only the model has such memory"), ("swap", "a swap device"),
        ("async-fault", "a swap device"), ("private-memory", "private memory"),
    ])
    func `what no process has at will is refused with the reason`(name: String, reason: String) throws {
        let error = #expect(throws: PlanScript.Unplayable.self) { try PlanScript(try Self.plan(name)) }
        #expect(error?.description.contains(reason) == true)
    }

    private static var playable: [String] {
        let names = (try? FileManager.default.contentsOfDirectory(atPath: folder.path)) ?? []
        return names.filter { $0.hasSuffix(".yaml") }.map { String($0.dropLast(5)) }.sorted().filter { name in
            (try? PlanScript(plan(name))) != nil
        }
    }

    @Test(.needsKVM) func `every scenario that can be played comes out as it says, and as on the model`() throws {
        let names = Self.playable
        #expect(names.count >= 33)
        for name in names {
            let plan = try Self.plan(name)
            var options = RealRun.Options()
            options.hugePages = plan.transparentHugePages
            let played = try PlayedScenario(plan, on: try RealRun(options), comparing: true)
            #expect(played.isClean, "\(played.text)")
            #expect(played.steps.count == plan.phases.flatMap(\.tasks).map(\.steps.count).reduce(0, +))
        }
    }

    @Test(.needsKVM) func `a step that is not as the scenario says is told`() throws {
        let wrong = try plan(
            "    vcpu0:\n      - {write: ram, count: 3, value: 0x7}\n      - {read: ram, count: 3, expect: {counting_from: 0x7}}\n      - {read: ram+4 KiB, expect: 0x9}\n"
        )
        let played = try PlayedScenario(wrong, on: try RealRun(), comparing: true)
        #expect(!played.isClean && played.steps.map(\.isExpected) == [true, true, false])
        #expect(played.steps[2].outcome == .value(8) && played.comparison?.differences.isEmpty == true)
        #expect(played.text.contains("value 0x8  NOT as the scenario says"))
        #expect(played.text.hasSuffix("not ok: 1 of 3 steps are not as the scenario says\n"))
    }

    @Test(.needsKVM) func `what can't be prepared is told, and nothing is judged`() throws {
        let overlapping = try plan("    vcpu0:\n      - read: ram\n")
        var plan = overlapping
        plan.slots[0].size += 1
        let played = try PlayedScenario(plan, on: try RealRun(), comparing: false)
        #expect(!played.isClean && played.steps.isEmpty)
        #expect(played.failure?.contains("-1 EINVAL") == true)
    }
}
