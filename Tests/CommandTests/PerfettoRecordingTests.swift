import Foundation
import Testing

@testable import Report
@testable import TraceAudit

@Suite struct PerfettoRecordings {
    private static let hasXZ = ["/usr/bin/xz", "/bin/xz", "/usr/local/bin/xz"].contains {
        FileManager.default.isExecutableFile(atPath: $0)
    }
    private static let samples = ["dontneed", "thp", "guest_pt_rewrite"]

    /// The timeline of a text.
    private func read(_ text: String) async throws -> (trace: PerfettoReader, report: AuditReport) {
        let folder = FileManager.default.temporaryDirectory.appendingPathComponent(UUID().uuidString)
        try Data(text.utf8).write(to: folder)
        defer { try? FileManager.default.removeItem(at: folder) }  // A temporary file that stays harms nobody.
        let store = Store()
        let report = try await RecordingTimeline.audit(RecordingSource(path: folder.path)) { store.bytes += $0 }
        return (try PerfettoReader(store.bytes), report)
    }

    private final class Store { var bytes: [UInt8] = [] }

    /// Events of thread 11, at microseconds.
    private func text(_ events: [(Int, String)], command: String = "CPU 0/KVM") -> String {
        var lines = ["# tracer: nop"]
        for (time, event) in events {
            let fraction = String("\(1_000_000 + time)".dropFirst())
            lines.append(" \(command)-11 (     10) [000] d..1.  5.\(fraction): \(event)")
        }
        return lines.joined(separator: "\n") + "\n"
    }

    private let fault = "kvm_page_fault: vcpu 0 rip 0x1 address 0x0000000000005000 error_code 0x2"
    private let requested = "kvm_mmu_spte_requested: gfn 5 pfn 7 level 1"
    private let changed = "kvm_tdp_mmu_spte_changed: as id 0 gfn 5 level 1 old_spte 0 new_spte 600000000007b77"
    private let set = "kvm_mmu_set_spte: gfn 5 spte 600000000007b77 (rwx) level 1 at 1000"
    private let walk = "kvm_mmu_pagetable_walk: addr 5000 pferr 6 W|U"

    private func microseconds(_ time: Int) -> UInt64 { 5_000_000_000 + UInt64(time) * 1000 }

    @Test(.enabled(if: hasXZ, "xz is needed"), arguments: samples)
    func `a recording's trace says what its report says`(_ name: String) throws {
        try Command.withFile("trace", "") { path in
            let result = try Command.run("audit", "Samples/\(name).ftrace.txt.xz", "--json", "--perfetto", path)
            #expect(result.status == 0, "\(result.errors)")
            let report = try JSONDecoder().decode(AuditReport.self, from: Data(result.output.utf8))
            let machine = try #require(report.machines.first)
            let trace = try PerfettoReader(path: path)
            #expect(trace.threads.map { UInt32($0.tid) }.sorted() == machine.threads)
            #expect(trace.slices("fault").count == Int(machine.faults.requests))
            let walks = machine.faults.walksRead + machine.faults.walksWrite + machine.faults.walksFetch
            #expect(trace.slices("fault").count + trace.slices("guest table walk").count == Int(walks))
            let runs = trace.slices.filter { $0.name.hasPrefix("guest ") && $0.facts["gpa"] != nil }
            #expect(runs.map { $0.facts["gpa"] } == machine.runs.map(\.guestAddress))
            #expect(runs.allSatisfy { $0.depth == 0 && $0.end > $0.begin })
            for (level, size) in [(1, "4K"), (2, "2M"), (3, "1G")] {
                let entries = machine.entries.filter { $0.level == level }.reduce(0) { $0 + $1.count }
                #expect(trace.last("entries set \(size)") ?? 0 == Int64(entries))
                #expect(trace.instants("map \(size)").count == Int(entries))
            }
            #expect(trace.instants("unmap range").count == Int(machine.notifier.unmapRanges))
            #expect(trace.instants("end table").count == Int(machine.zaps.tables.reduce(0) { $0 + $1.count }))
            #expect(trace.counters.keys.allSatisfy { !$0.hasPrefix("guest maps") })
        }
    }

    @Test func `a fault lasts until the guest goes on`() async throws {
        let (trace, _) = try await read(
            text([
                (1, "kvm_exit: reason EPT_VIOLATION"), (2, fault), (4, requested), (5, changed), (6, set),
                (9, "kvm_entry: vcpu 0"),
                (20, "kvm_exit: reason X"),
            ]))
        let slice = try #require(trace.slices("fault").first)
        #expect(trace.slices.count == 1)
        #expect(slice.begin == microseconds(2) && slice.end == microseconds(9))
        #expect(slice.facts == ["address": "0x5000", "error code": "0x2"])
        #expect(trace.threads == [PerfettoReader.Thread(pid: 10, tid: 11, name: "CPU 0/KVM")])
        #expect(trace.instants("map 4K").map(\.time) == [microseconds(6)])
        #expect(trace.last("guest maps 4K") == 1)
    }

    @Test func `without the guest's entry a fault lasts until its last event`() async throws {
        let (trace, _) = try await read(
            text([(2, fault), (4, requested), (6, set), (20, fault), (22, requested), (30, "sched_switch: x")]))
        #expect(trace.slices("fault").map(\.begin) == [microseconds(2), microseconds(20)])
        #expect(trace.slices("fault").map(\.end) == [microseconds(6), microseconds(22)])
    }

    @Test func `a walk is a fault if an entry comes of it`() async throws {
        let (trace, _) = try await read(
            text([(1, walk), (3, requested), (4, set), (7, walk), (9, walk), (10, fault), (12, walk)]))
        #expect(trace.slices("fault").map(\.begin) == [microseconds(1), microseconds(10)])
        #expect(trace.slices("fault").map(\.end) == [microseconds(4), microseconds(12)])
        #expect(trace.slices("guest table walk").map(\.begin) == [microseconds(7), microseconds(9)])
    }

    @Test func `pages are counted where each write of an entry is an event`() async throws {
        let huge = "kvm_tdp_mmu_spte_changed: as id 0 gfn 200 level 2 old_spte 0 new_spte 600000000200bf7"
        let zap = "kvm_tdp_mmu_spte_changed: as id 0 gfn 5 level 1 old_spte 600000000007b77 new_spte 0"
        let (trace, _) = try await read(text([(1, changed), (2, set), (3, huge), (4, zap), (5, changed)]))
        #expect(trace.counters["guest maps 4K"]?.map(\.value) == [1, 0, 1])
        #expect(trace.counters["guest maps 2M"]?.map(\.value) == [1])
        #expect(trace.counters["entries set 4K"] == nil)
        #expect(trace.instants("zap 4K").map(\.time) == [microseconds(4)])
    }

    @Test func `slices that the recording leaves open are closed, and interrupts close none`() async throws {
        let run = "tracing_mark_write: PROBE guest vcpu=0 op=w gpa=0x5000 count=1 stride=0x1000"
        var lines = text([(1, run), (2, fault), (3, requested), (5, set)])
        lines +=
            " CPU 0/KVM-11 (     10) [000] d.h1.  5.000004: kvm_unmap_hva_range: mmu notifier unmap range: 0x1000 -- 0x2000\n"
        lines += text([(6, set)]).split(separator: "\n").last! + "\n"
        let (trace, _) = try await read(lines)
        #expect(trace.slices("guest write").map(\.end) == [microseconds(6)])
        #expect(trace.slices("fault").map(\.end) == [microseconds(6)])
        #expect(trace.instants("unmap range").count == 1)
    }

    @Test func `a second recording in the file follows the first`() async throws {
        let one = text([(2, fault), (4, requested), (6, set)])
        let (trace, report) = try await read(one + one)
        #expect(report.notes.contains { $0.contains("2 recordings") })
        let begins = trace.slices("fault").map(\.begin)
        #expect(begins == [microseconds(2), microseconds(6) + 1_000_000_000])
    }

    @Test func `a TDP run's own recording has the pages that the run has`() throws {
        try Command.withFile("trace.txt", "") { text in
            try Command.withFile("trace", "") { path in
                _ = try Command.run("run", "Scenarios/virtio-gpu-blob.yaml", "--trace", text)
                #expect(try Command.run("audit", text, "--perfetto", path).status == 0)
                let trace = try PerfettoReader(path: path)
                #expect(trace.last("guest maps 4K") == 1)
                #expect(trace.slices("fault").count == 36)
            }
        }
    }

    @Test func `a recording is not written over`() throws {
        try Command.withFile("trace.txt", text([(1, fault)])) { path in
            let result = try Command.run("audit", path, "--perfetto", path)
            #expect(result.status == 2)
            #expect(result.errors.contains("\(path) can't be written: it is what is read"))
            #expect(try String(contentsOfFile: path, encoding: .utf8) == text([(1, fault)]))
        }
    }

    @Test func `an unreadable recording leaves the file as it is`() throws {
        try Command.withFile("kept", "what was there") { path in
            let result = try Command.run("audit", "/no/such/recording", "--perfetto", path)
            #expect(result.status == 2 && result.output.isEmpty)
            #expect(try String(contentsOfFile: path, encoding: .utf8) == "what was there")
        }
        try Command.withFile("trace.txt", text([(1, fault)])) { path in
            let result = try Command.run("audit", path, "--perfetto", "/no-such-folder/x")
            #expect(result.status == 2 && result.output.isEmpty)
            #expect(result.errors.contains("/no-such-folder/x can't be written: No such file or directory"))
        }
    }
}

/// What a user sees of recordings in other forms.
@Suite struct OtherRecordings {
    @Test func `a trace-cmd file without trace-cmd ends with 2 and says what to do`() throws {
        try Command.withFile("trace.dat", "\u{17}\u{08}Dtracing7\0" + String(repeating: "\0", count: 100)) { path in
            let result = try Command.run("audit", path, environment: ["PATH": "/no-such-folder"])
            #expect(result.status == 2 && result.output.isEmpty)
            #expect(result.errors.contains(path))
            #expect(result.errors.contains("install trace-cmd"))
        }
    }

    @Test func `a trace-cmd file of another version ends with 2 and names it`() throws {
        try Command.withFile("trace.dat", "\u{17}\u{08}Dtracing5\0") { path in
            let result = try Command.run("audit", path)
            #expect(result.status == 2 && result.output.isEmpty)
            #expect(result.errors.contains("version 5; versions 6 and 7 can be read"))
        }
    }

    @Test func `perf script text is audited`() throws {
        let text =
            "vmm 10/11 [000] 5.000001: kvmmmu:kvm_mmu_set_spte: gfn 5 spte 600000000007b77 (r-x) level 1 at 1000\n"
        try Command.withFile("perf.txt", text) { path in
            let result = try Command.run("audit", path)
            #expect(result.status == 1, "\(result.output)")
            #expect(result.output.contains("VIOLATED") || result.output.contains("perf.txt"))
        }
    }
}
