import Testing

@testable import TraceAudit

@Suite struct Report_Machines {
    @Test func `machines are told apart by process`() {
        var writer = EventWriter()
        for (process, pfn) in [(100, "5000"), (200, "6000"), (100, "5000"), (200, "6000")] {
            writer.add("kvm_mmu_spte_requested: gfn 10 pfn \(pfn) level 1", thread: process + 1, process: process)
            writer.add(
                "kvm_mmu_set_spte: gfn 10 spte \(pfn)e67 (rwxu) level 1 at 7\(process)080", thread: process + 1,
                process: process)
        }
        let report = writer.audit()
        #expect(report.machines.map(\.process) == [100, 200])
        #expect(report.machines.map { $0.entries.first?.count } == [2, 2])
        #expect(report.findings.isEmpty)
        #expect(!report.notes.contains { $0.contains("record-tgid") })
    }

    @Test func `without process ids the report says that it cannot tell`() {
        var writer = EventWriter()
        for thread in [11, 12] {
            writer.add("kvm_mmu_spte_requested: gfn 10 pfn 5\(thread) level 1", thread: thread)
            writer.add("kvm_mmu_set_spte: gfn 10 spte 5\(thread)e67 (rwxu) level 1 at 7\(thread)080", thread: thread)
        }
        let report = writer.audit()
        #expect(report.machines.count == 1)
        #expect(report.findings.isEmpty)
        #expect(report.notes.contains { $0.contains("record-tgid") && $0.contains("another virtual machine") })
    }

    @Test func `a range that another process unmaps excuses, and proves nothing`() {
        var writer = EventWriter()
        func add(_ writer: inout EventWriter, _ event: String, _ process: Int = 100) {
            writer.add(event, thread: process, process: process)
        }
        add(&writer, "tracing_mark_write: PROBE scenario two")
        add(&writer, "tracing_mark_write: PROBE set_region slot=1 flags=0 gpa=0x10000 size=0x10000 hva=0x700000")
        add(&writer, "tracing_mark_write: PROBE set_region ret=0 errno=0")
        add(&writer, "kvm_mmu_spte_requested: gfn 10 pfn 5000 level 1")
        add(&writer, "kvm_mmu_set_spte: gfn 10 spte 5000e67 (rwxu) level 1 at 7080")
        add(&writer, "kvm_unmap_hva_range: mmu notifier unmap range: 0x00000000700000 -- 0x00000000701000", 77)
        add(&writer, "kvm_emulate_insn: 0:1:e6 10 (prot64)")
        add(&writer, "tracing_mark_write: PROBE guest vcpu=0 op=w gpa=0x10000 count=1 stride=0x8")
        add(&writer, "tracing_mark_write: PROBE guest done vcpu=0 ret=0 errno=0 exit=2")
        add(&writer, "kvm_mmu_spte_requested: gfn 10 pfn 5001 level 1")
        add(&writer, "kvm_mmu_set_spte: gfn 10 spte 5001e67 (rwxu) level 1 at 7080")
        #expect(writer.audit().findings.isEmpty)
    }
}

@Suite(.enabled(if: Recordings.isThere("thp"), "xz is needed"))
struct Report_Output {
    private func broken() throws -> AuditReport {
        var recording = Recordings.load("thp")
        recording.replace("000ee7", with: "001ee7", at: try recording.index(of: "kvm_mmu_set_spte: gfn 10400"))
        return recording.audit()
    }

    @Test func `the verdict comes first and names the rules`() throws {
        let text = try broken().render()
        let line = try Recordings.load("thp").index(of: "kvm_mmu_set_spte: gfn 10400") + 1
        #expect(text.hasPrefix("VIOLATED  2 findings against X22, request\n"))
        #expect(text.contains("  X22        line \(line)"))
        #expect(text.contains("  X22        VIOLATED 1"))
        #expect(Recordings.load("thp").audit().render().hasPrefix("CLEAN  "))
    }

    @Test func `no line is longer than the width, and plain text has no escapes`() throws {
        let report = try broken()
        for width in [60, 80, 120] {
            let text = report.render(width: width, verbose: true)
            #expect(!text.contains("\u{1b}"))
            for line in text.split(separator: "\n") where line.contains(" ") {
                #expect(line.count <= width || !line.dropFirst(30).contains(" "), "\(width): \(line)")
            }
        }
        #expect(report.render(color: true).contains("\u{1b}[1;31mVIOLATED"))
    }

    @Test func `JSON has sorted keys and is the same every time`() throws {
        let first = try broken().jsonString()
        #expect(first == (try broken().jsonString()))
        let keys = first.split(separator: "\n").filter { $0.hasPrefix("  \"") }
            .compactMap { $0.split(separator: "\"").dropFirst().first }
        #expect(keys == keys.sorted())
        #expect(keys.contains("findings"))
    }
}
