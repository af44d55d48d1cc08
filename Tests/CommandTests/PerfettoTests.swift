import Foundation
import Testing
import TraceAudit

@testable import Report

@Suite struct PerfettoWireFormat {
    /// Numbers around each border of seven bits, and texts around the border where their length takes two bytes.
    @Test func `fields read back as they were written`() throws {
        for shift in 0..<64 as Range<UInt64> {
            for number in [UInt64(1) << shift, (UInt64(1) << shift) - 1, .max] {
                var trace = PerfettoTraceBytes()
                let process = trace.writer.process(7, name: "x")
                let counter = trace.writer.counter("c", unit: "u", of: process)
                trace.writer.set(counter, to: Int(truncatingIfNeeded: number), at: number)
                let read = try PerfettoReader(trace.finished())
                #expect(read.counters["c"]?.first?.value == Int64(truncatingIfNeeded: number))
                #expect(read.counters["c"]?.first?.time == number)
            }
        }
        for length in [1, 127, 128, 129, 16_383, 16_384, 100_000] {
            let name = String(repeating: "é", count: length)
            var trace = PerfettoTraceBytes()
            let process = trace.writer.process(.max, name: name)
            trace.writer.instant(name, "c", on: process, at: 1, ["k": .text(name), "n": .count(.max)])
            let read = try PerfettoReader(trace.finished())
            #expect(read.processes == [name])
            #expect(read.instants.first?.facts == ["k": name, "n": "\(UInt64.max)"])
        }
    }

    @Test func `a number is written as the format's own example has it`() {
        var message = ProtobufMessage()
        message.add(1, 150)
        message.add(2, "testing")
        message.add(3, -1)
        #expect(
            message.bytes == [0x08, 0x96, 0x01, 0x12, 0x07] + Array("testing".utf8) + [0x18]
                + [UInt8](repeating: 0xff, count: 9) + [0x01])
    }

    @Test func `an event that is older than the one before gets its time`() throws {
        var trace = PerfettoTraceBytes()
        let process = trace.writer.process(1, name: "p")
        let other = trace.writer.lane("l", of: process)
        trace.writer.begin("a", "c", on: process, at: 10)
        trace.writer.instant("b", "c", on: other, at: 3)
        trace.writer.end(on: process, at: 9)
        let read = try PerfettoReader(trace.finished())
        #expect(read.slices("a").map(\.end) == [10])
        #expect(read.instants("b").map(\.time) == [3])
    }

    @Test func `what a reader must refuse is refused`() {
        for bytes: [UInt8] in [[0x0a], [0x0a, 5, 1], [0x0a, 0x80], [0x0b], [0x0a, 2, 0x50, 1], [0x10, 1]] {
            #expect(throws: PerfettoReader.Damage.self) { try PerfettoReader(bytes) }
        }
    }
}

/// A writer whose bytes are kept.
struct PerfettoTraceBytes {
    private final class Store { var bytes: [UInt8] = [] }
    private let store: Store
    var writer: PerfettoTrace

    init() {
        let store = Store()
        self.store = store
        writer = PerfettoTrace { store.bytes += $0 }
    }

    mutating func finished() -> [UInt8] {
        writer.finish()
        return store.bytes
    }
}

@Suite struct PerfettoRuns {
    private struct Report: Decodable {
        struct Step: Decodable { var action: String }
        struct Finding: Decodable { var rule: String }
        var steps: [Step]
        var findings: [Finding]
        var statistics: [String: Int64]
    }

    private func run(_ scenario: String, _ options: String...) throws -> (trace: PerfettoReader, report: Report) {
        try Command.withFile("run.pftrace", "") { path in
            let all = ["run", scenario, "--json", "--perfetto", path] + options
            let result = try Command.run(all)
            #expect(result.status < 2, "\(result.errors)")
            let report = try JSONDecoder().decode(Report.self, from: Data(result.output.utf8))
            return (try PerfettoReader(path: path), report)
        }
    }

    @Test(arguments: Command.scenarios) func `a run's trace says what its report says`(_ scenario: String) throws {
        let (trace, report) = try run(scenario)
        #expect(trace.processes.count == 1)
        #expect(trace.threads.contains { $0.name == "host" })
        let steps = trace.slices.filter { $0.facts["as expected"] != nil }
        // In the order in which they began: a step that waits lets others begin.
        #expect(steps.map(\.name).sorted() == report.steps.map(\.action).sorted())
        #expect(steps.allSatisfy { $0.depth == 0 && $0.end > $0.begin })
        #expect(trace.slices("fault").allSatisfy { $0.depth == 1 && $0.end > $0.begin })
        // Of a misconfiguration, where an entry says that there is no memory, KVM tells nothing.
        let faults = Int64(trace.slices("fault").count)
        let taken = report.statistics["pf_taken"] ?? 0
        let marked = report.statistics["pf_mmio_spte_created"] ?? 0
        #expect(faults <= taken && taken - faults <= marked)
        // After the last step, so that what the VM's end zaps does not count.
        let end = steps.map(\.end).max() ?? 0
        for (size, statistic) in [("4K", "pages_4k"), ("2M", "pages_2m"), ("1G", "pages_1g")] {
            let value = trace.counters["guest maps \(size)"]?.last { $0.time <= end }?.value ?? 0
            #expect(value == report.statistics[statistic], "\(statistic)")
        }
    }

    @Test func `vCPUs, faults and their story, notifier ranges and flushes are there`() throws {
        let (trace, _) = try run("Scenarios/virtio-gpu-blob.yaml")
        #expect(trace.threads.contains { $0.name == "vCPU 0" })
        #expect(trace.slices("fault").first?.facts["gfn"] == "0x100000")
        #expect(trace.slices("fault").first?.facts["story"]?.contains("PFN-mapped, no reference") == true)
        #expect(trace.slices("fault").allSatisfy { $0.track == "vCPU 0" })
        #expect(trace.instants("invalidate start").count == 3)
        #expect(trace.instants("invalidate end").allSatisfy { $0.track == "host" })
        #expect(trace.instants("flush").count == 3)
        #expect(trace.instants("map 4K").count == 35)
        #expect(trace.instants("zap 4K").count == 34)
    }

    @Test func `findings are shown where they were made`() throws {
        let (trace, report) = try run("Scenarios/virtio-gpu-blob.yaml", "--policy", "guess")
        #expect(!report.findings.isEmpty)
        for rule in Set(report.findings.map(\.rule)) {
            #expect(trace.instants(rule).count == report.findings.count { $0.rule == rule }, "\(rule)")
        }
    }

    @Test func `two runs write the same bytes`() throws {
        try Command.withFile("one", "") { one in
            try Command.withFile("two", "") { two in
                _ = try Command.run("run", "Scenarios/dirty-logging.yaml", "--perfetto", one)
                _ = try Command.run(
                    "run", "Scenarios/dirty-logging.yaml", "--perfetto", two,
                    environment: ["SWIFT_DETERMINISTIC_HASHING": "1"])
                let (left, right) = try (
                    Data(contentsOf: URL(fileURLWithPath: one)), Data(contentsOf: URL(fileURLWithPath: two))
                )
                #expect(left == right && !left.isEmpty)
            }
        }
    }

    @Test func `nothing is run when the file can't be written`() throws {
        for (path, reason) in [("/no-such-folder/x", "No such file or directory"), ("/tmp", "Is a directory")] {
            let result = try Command.run("run", "Scenarios/anonymous.yaml", "--perfetto", path)
            #expect(result.status == 2 && result.output.isEmpty)
            #expect(result.errors.contains("\(path) can't be written: \(reason)"))
        }
        let full = try Command.run("run", "Scenarios/anonymous.yaml", "--perfetto", "/dev/full")
        #expect(full.status == 2)
        #expect(full.errors.contains("/dev/full can't be written: No space left on device"))
    }
}
