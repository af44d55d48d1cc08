import Foundation
import IoctlScript
import Machine
import Replay
import Scenario
import Testing

@testable import Conformance
@testable import LinuxKVM

/// Recording on this machine: root, tracefs, and a KVM whose events are compared.
private enum Tracing {
    static let reason: String? = {
        do throws(RealRun.Unavailable) {
            _ = try TracedRun(RealRun.Options())
            return nil
        } catch {
            return error.reason
        }
    }()
}

extension Trait where Self == ConditionTrait {
    fileprivate static var needsTracing: Self { .enabled(if: Tracing.reason == nil, "\(Tracing.reason ?? "")") }
}

/// What KVM's trace events tell of scripts, beside what the model tells. Spec: real-kvm, "What can be seen"; x86 10.
@Suite(.needsTracing, .serialized) struct TracedScripts {
    private func run() throws -> TracedRun { try TracedRun(RealRun.Options()) }

    @Test func `every scenario that can be played: entries, levels, rights, pages and zaps are the model's`() throws {
        let folder = URL(fileURLWithPath: #filePath).deletingLastPathComponent()
            .appendingPathComponent("../../Scenarios").standardized
        let (run, huge) = (try run(), try run(hugePages: true))
        var (traced, compared) = (0, 0)
        for name in try FileManager.default.contentsOfDirectory(atPath: folder.path).sorted()
        where name.hasSuffix(".yaml") {
            let plan = try loadScenario(path: folder.appendingPathComponent(name).path).plan
            let script: Script
            do throws(PlanScript.Unplayable) { script = try PlanScript(plan).script } catch { continue }
            let result = try (plan.transparentHugePages ? huge : run).compare(script, name: name)
            #expect(result.report.isFaithful, "\(result.text)")
            traced += 1
            compared += result.report.compared
        }
        #expect(traced >= 33 && compared > 8000)
    }

    private func run(hugePages: Bool) throws -> TracedRun {
        var options = RealRun.Options()
        options.hugePages = hugePages
        return try TracedRun(options)
    }

    @Test func `a script with what a shadow MMU meets`() throws {
        let result = try run().compare(try .named("traced"), name: "traced")
        #expect(result.report.isFaithful && result.report.compared > 600, "\(result.text)")
        #expect(result.report.absorbed.isEmpty)
        #expect(result.text.hasPrefix("traced  recorded on Linux \(result.kernel), beside the model's shadow MMU\n"))
    }

    @Test func `random scripts`() throws {
        var compared = 0
        let found = try run().compareRandom(seed: 1, steps: 1500) {
            compared = $1
            return true
        }
        #expect(found == nil, "\(found?.comparison.text ?? "")")
        #expect(compared > 5000)
    }

    // MARK: What is told

    private static let changes: [(String, @Sendable (ReplayEvent) -> ReplayEvent?)] = [
        ("an entry is left out", { if case .set = $0 { nil } else { $0 } }),
        (
            "a right more",
            {
                guard case .set(let guest, let bits, let level) = $0 else { return $0 }
                return .set(guest, bits: bits ^ 2, level: level)
            }
        ),
        (
            "another level",
            {
                guard case .set(let guest, let bits, let level) = $0 else { return $0 }
                return .set(guest, bits: bits, level: level + 1)
            }
        ),
        (
            "another guest frame",
            {
                guard case .requested(let guest, let level) = $0 else { return $0 }
                return .requested(guest + 1, level: level)
            }
        ),
        (
            "a page of another role",
            {
                guard case .page(let fate, var page) = $0 else { return $0 }
                page.access ^= 1
                return .page(fate, page)
            }
        ),
        ("no page is taken", { if case .page(.taken, _) = $0 { nil } else { $0 } }),
        ("no page is zapped", { if case .page(.zapped, _) = $0 { nil } else { $0 } }),
        (
            "another range",
            {
                guard case .invalidated(let start, let end) = $0 else { return $0 }
                return .invalidated(start, end + 4096)
            }
        ),
        ("no invalidation", { if case .invalidated = $0 { nil } else { $0 } }),
        (
            "another error code",
            { if case .walk(let address, let code) = $0 { .walk(address, code: code ^ 2) } else { $0 } }
        ),
        (
            "another entry of the guest's",
            { if case .element(let entry, let level) = $0 { .element(entry ^ 0x20, level: level) } else { $0 } }
        ),
        ("no zap of all", { if case .allObsolete = $0 { nil } else { $0 } }),
    ]

    @Test(arguments: 0..<12) func `one change in the recording is a difference`(index: Int) throws {
        let (name, change) = Self.changes[index]
        let result = try run().compare(try .named("traced"), name: name) { observation in
            guard let event = change(observation.event) else { return nil }
            var changed = observation
            changed.event = event
            return changed
        }
        #expect(!result.report.isFaithful && result.report.differences > 0, "\(name)")
        #expect(result.text.contains(" differ\n"))
    }

    @Test func `a frame that two guest frames share on one side alone is a difference`() throws {
        let result = try run().compare(try .named("traced"), name: "frames") { observation in
            var changed = observation
            if case .set = observation.event { changed.frame = 0x1234 }
            return changed
        }
        #expect(result.text.contains("frame: set_spte"))
    }

    @Test func `a range too many in mprotect is explained, anything else is not`() throws {
        let rule = try #require(TracedRun.known.events.first)
        #expect(rule.kind == .extra && rule.step == "* mprotect *" && TracedRun.known.events.count == 2)
        // What is unmapped has no tables on Linux any more; the model keeps its own.
        let script = try Script(
            "host name=r kind=anonymous size=64k", "vm", "vcpu", "region slot=0 gpa=0x10000 size=64k hva=r",
            "guest write cpu=0 gpa=0x10000 count=16 value=1", "get_dirty_log slot=0", "munmap host=r length=64k",
            "mmap host=r length=64k", "mprotect host=r length=64k prot=none", "guest read cpu=0 gpa=0x10000")
        let result = try run().compare(script, name: "rule")
        #expect(result.report.explained == 1 && result.report.differences == 0, "\(result.text)")
    }

    @Test func `what an explained answer has parted is left out, and told`() throws {
        let script = try Script(
            "host name=r kind=perf_ring size=36k prot=none", "vm", "vcpu",
            "region slot=0 gpa=0x10000 size=24k hva=r+4k",
            "guest read cpu=0 gpa=0x12000", "guest write cpu=0 gpa=0x30000")
        let result = try run().compare(script, name: "parted")
        #expect(result.report.isFaithful && result.report.steps.count == 4)
        #expect(
            result.report.leftOut == [
                "from line 5 on, whose answer is explained: a PFN map that allows nothing"
            ])
    }

    @Test(arguments: [
        ("guest read cpu=0 gpa=0 size=4", "only accesses of whole words, by the processor, are traced"),
        ("guest write cpu=0 gpa=0 by=emulator", "only accesses of whole words, by the processor, are traced"),
        ("vm name=v2", "one VM is traced, the first"),
        ("enable_cap cap=dirty_log_ring_with_bitmap", "the executor's own slot is in the way"),
    ])
    func `what the model's guest can't do is refused with the line`(line: String, reason: String) throws {
        let script = try Script("vm", "vcpu", line)
        let error = #expect(throws: PlayError.self) { try run().compare(script, name: "refused") }
        guard case .unplayable(let why)? = error else {
            Issue.record("refused for another reason")
            return
        }
        #expect(why.description.hasSuffix(": \(reason)"))
    }
}

/// The recording's instance of tracefs: there while it is needed, and never longer.
@Suite(.needsTracing, .serialized) struct TraceInstances {
    private func start(_ change: (inout RealRun.Options) -> Void = { _ in }) throws -> RealRun {
        var options = RealRun.Options()
        options.records = true
        change(&options)
        return try RealRun(options)
    }

    /// As the child of `run` sees tracefs, which is mounted for it alone.
    private func instances(_ run: RealRun) throws -> [String] {
        let child = try #require(run.processes?.child)
        let folder = "/proc/\(child)/root/sys/kernel/tracing/instances"
        return try FileManager.default.contentsOfDirectory(atPath: folder).filter { $0.hasPrefix("faultline-") }
    }

    private func name(_ run: RealRun) throws -> String { "faultline-\(try #require(run.processes?.child))" }

    @Test func `an instance is made, and goes with the run; nobody else sees it mounted`() throws {
        let mounts = try String(contentsOfFile: "/proc/self/mounts", encoding: .utf8)
        let window = try start()
        let other: String
        do {
            let run = try start()
            other = try name(run)
            #expect(try instances(window).contains(other))
            #expect(try String(contentsOfFile: "/proc/self/mounts", encoding: .utf8) == mounts)
            let answers = try run.answers(of: try Script("vm", "vcpu"))
            #expect(answers == [.done, .done])
            run.finish()
            let text = try String(contentsOfFile: try #require(run.recordingPath), encoding: .utf8)
            for mark in ["PROBE line 0\n", "PROBE line 0 done\n", "PROBE line 1\n", "PROBE line 1 done\n"] {
                #expect(text.contains(mark))
            }
        }
        #expect(try !instances(window).contains(other))
        #expect(try instances(window).contains(name(window)))
    }

    @Test func `without recording there is none`() throws {
        let run = try RealRun()
        _ = try run.answers(of: try Script("vm"))
        #expect(run.recordingPath == nil)
    }

    @Test func `what a killed child leaves goes when that is noticed`() throws {
        let window = try start()
        let killed = try start()
        let left = try name(killed)
        kill(try #require(killed.processes?.child), SIGKILL)
        #expect(try instances(window).contains(left))
        #expect(throws: RealRun.Failure.self) { try killed.answers(of: try Script("vm")) }
        #expect(try !instances(window).contains(left))
    }

    @Test func `what is left by one whose asker is gone too the next removes`() throws {
        let window = try start()
        // No process has this number.
        let left = "faultline-4194300"
        let folder = "/proc/\(try #require(window.processes?.child))/root/sys/kernel/tracing/instances/\(left)"
        try FileManager.default.createDirectory(atPath: folder, withIntermediateDirectories: false)
        #expect(try instances(window).contains(left))
        let next = try start()
        #expect(try !instances(window).contains(left))
        #expect(try instances(window).contains(name(next)))
    }

    @Test func `whatever call of its making fails is told, and leaves nothing`() throws {
        let window = try start()
        let calls = window.preparationCalls
        var reasons: Set<String> = []
        for call in 1...calls {
            do {
                // It may be one that nothing depends on.
                _ = try start { $0.preparation = .init(call: call, errno: 13) }
            } catch let error as RealRun.Unavailable {
                reasons.insert(error.reason)
            }
            // Other tests record meanwhile.
            let left = try instances(window).filter { !Process.exists(Int32($0.dropFirst(10)) ?? 0) }
            #expect(left.isEmpty, "call \(call): \(left)")
        }
        #expect(reasons.contains("what a kernel does can be recorded by root alone: EACCES"))
        #expect(reasons.contains("this kernel's tracefs can't be used for recording: EACCES"))
    }
}
