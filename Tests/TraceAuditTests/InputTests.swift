import Glibc
import Testing

@testable import TraceAudit

@Suite struct BadInput_Text {
    private static let good = "            vmm-10 [000] d..1.  5.000001: kvm_mmu_spte_requested: gfn 1 pfn 2 level 1"

    @Test func `an empty recording is an answer`() {
        let report = Recording.audit([])
        #expect(report.verdict == .nothingToCheck)
        #expect(report.events == 0)
        #expect(report.notes == ["the recording is empty"])
        #expect(report.render().hasPrefix("NOTHING TO CHECK"))
    }

    @Test func `a recording with headers only says so`() {
        let report = Recording.audit(Array("# tracer: nop\n#\n".utf8))
        #expect(report.events == 0)
        #expect(report.notes.contains { $0.contains("no event") })
    }

    @Test func `carriage returns do not matter`() {
        let report = Recording.audit(Array((Self.good + "\r\n" + Self.good + "\r\n").utf8))
        #expect(report.events == 2)
        #expect(report.malformedLines == 0)
    }

    @Test func `a last line without an end counts if it is whole`() {
        #expect(Recording.audit(Array(Self.good.utf8)).events == 1)
        let cut = Recording.audit(Array((Self.good + "\n" + Self.good.dropLast(4)).utf8))
        #expect(cut.events == 2)
        #expect(cut.malformedLines == 1)
        #expect(cut.firstMalformedLine == 2)
    }

    @Test(arguments: [1, 1000, 70_000, 200_000])
    func `a very long line is one malformed line`(piece: Int) {
        let long = String(repeating: "x", count: 100_000)
        let bytes = Array((Self.good + "\n" + long + "\n" + Self.good + "\n").utf8)
        let report = Recording.audit(bytes, piece: piece == 1 ? 977 : piece)
        #expect(report.lines == 3)
        #expect(report.events == 2)
        #expect(report.malformedLines == 1)
        #expect(report.firstMalformedLine == 2)
    }

    @Test func `NUL bytes are malformed lines`() {
        let report = Recording.audit(Array(Self.good.utf8) + [10, 0, 0, 0, 10] + Array(Self.good.utf8) + [10])
        #expect(report.events == 2)
        #expect(report.malformedLines == 1)
        #expect(report.firstMalformedLine == 2)
    }

    @Test func `an unknown event is counted by its name`() {
        var writer = EventWriter()
        for _ in 0..<3 { writer.add("kvm_something_new: a 1") }
        writer.add("sched_switch: prev")
        let report = writer.audit()
        #expect(
            report.unknown == [
                EventCount(name: "kvm_something_new", count: 3, malformed: 0),
                EventCount(name: "sched_switch", count: 1, malformed: 0),
            ])
        #expect(report.notes.contains { $0.contains("none of KVM's MMU events") })
    }

    @Test func `a known event with another text is malformed, and counted under its name`() {
        var writer = EventWriter()
        writer.add("kvm_mmu_set_spte: gfn zz")
        let report = writer.audit()
        #expect(report.understood == [EventCount(name: "kvm_mmu_set_spte", count: 1, malformed: 1)])
        #expect(report.malformedLines == 1)
    }

    @Test func `more names than fit are counted together`() {
        var writer = EventWriter()
        for number in 0..<3000 { writer.add("event_\(number): x") }
        let report = writer.audit()
        #expect(report.unknown.count < 2100)
        #expect(report.notes.contains { $0.contains("further names") })
    }

    @Test func `sums of absurd numbers do not overflow`() {
        var writer = EventWriter()
        for _ in 0..<5 {
            writer.add("kvm_unmap_hva_range: mmu notifier unmap range: 0x00000000001000 -- 0xfffffffffffff000")
            writer.add("tracing_mark_write: PROBE guest vcpu=0 op=w gpa=0 count=18446744073709551615 stride=0x1000")
            writer.add("tracing_mark_write: PROBE guest done vcpu=0 ret=0 errno=0 exit=2")
            writer.add("tracing_mark_write: PROBE get_dirty_log slot=1")
            writer.add("tracing_mark_write: PROBE get_dirty_log ret=0 dirty=9223372036854775807")
        }
        let report = writer.audit()
        #expect(report.machines.first?.dirtyPages == .max)
        #expect(report.machines.first?.notifier.unmapRanges == 5)
    }

    @Test(arguments: 0..<24)
    func `random bytes never crash`(seed: UInt64) {
        var numbers = SeededNumbers(state: seed &* 977 &+ 11)
        var bytes = (0..<20_000).map { _ in UInt8(truncatingIfNeeded: numbers.next()) }
        let report = Recording.audit(bytes, piece: Int(numbers.next() % 5000) + 1)
        #expect(report.events == 0, "seed \(seed)")
        // Damaged text: real lines with random bytes in them.
        var writer = EventWriter()
        for _ in 0..<150 {
            let frame = String(numbers.number(bits: 40), radix: 16)
            let entry = String(numbers.number(), radix: 16)
            let level = numbers.next() % 7
            writer.add("kvm_mmu_spte_requested: gfn \(frame) pfn \(entry) level \(level)")
            writer.add("kvm_mmu_set_spte: gfn \(frame) spte \(entry) (rwxu) level \(level) at \(entry)")
            writer.add("kvm_tdp_mmu_spte_changed: as id 0 gfn \(frame) level \(level) old_spte 0 new_spte \(entry)")
            writer.add("kvm_unmap_hva_range: mmu notifier unmap range: 0x\(frame)000 -- 0x\(entry)")
            writer.add(
                "kvm_mmu_prepare_zap_page: sp gen 0 gfn \(frame) l\(level) 8-byte q0 direct wux nxe ad root 0 sync")
            writer.add(
                "tracing_mark_write: PROBE set_region slot=\(level) flags=1 gpa=0x\(frame)000 size=0x\(entry) hva=0")
            writer.add("tracing_mark_write: PROBE set_region ret=0 errno=0")
            writer.add("tracing_mark_write: PROBE guest vcpu=0 op=w gpa=0x\(entry) count=\(level) stride=0x\(frame)")
            writer.add("tracing_mark_write: PROBE guest done vcpu=0 ret=0 errno=0 exit=2")
            writer.add("tracing_mark_write: PROBE get_dirty_log slot=\(level)")
            writer.add("tracing_mark_write: PROBE get_dirty_log ret=0 dirty=\(level)")
        }
        bytes = Array(writer.text.utf8)
        _ = Recording.audit(bytes)
        for _ in 0..<500 {
            bytes[Int(numbers.next() % UInt64(bytes.count))] = UInt8(truncatingIfNeeded: numbers.next())
        }
        let damaged = Recording.audit(bytes, piece: 1000)
        #expect(damaged.lines > 0, "seed \(seed)")
    }
}

@Suite struct BadInput_Files {
    private func failure(of path: String) async -> AuditInputError? {
        do throws(AuditInputError) {
            _ = try await auditRecording(path: path)
            return nil
        } catch {
            return error
        }
    }

    private func kind(of path: String) async -> AuditInputError.Kind? { await failure(of: path)?.kind }

    @Test func `a missing file and a directory are told apart`() async {
        #expect(await kind(of: "/tmp/there/is/no/such/recording") == .notFound)
        #expect(await kind(of: "/tmp") == .isDirectory)
    }

    @Test func `binary files are refused, each with its way out`() async {
        let cases: [([UInt8], AuditInputError.Kind)] = [
            ([0x17, 0x08, 0x44] + Array("tracing7".utf8), .traceCommandFailed),
            ([0x17, 0x08, 0x44] + Array("tracing5\0".utf8), .otherVersion),
            ([0x17, 0x08, 0x44] + Array("tracing8\0".utf8), .otherVersion),
            (Array("PERFILE2".utf8), .binaryRecording),
            ([0x1f, 0x8b, 8, 0], .otherCompression), ([0x28, 0xb5, 0x2f, 0xfd], .otherCompression),
            ([UInt8](repeating: 0, count: 10_000), .binaryRecording),
        ]
        for (bytes, expected) in cases {
            let found = await withFile(bytes) { await kind(of: $0) }
            #expect(found == expected)
        }
    }

    @Test func `an empty file is answered`() async throws {
        let report = try await withFile([]) { try await auditRecording(path: $0) }
        #expect(report.notes == ["the recording is empty"])
    }

    @Test(.enabled(if: Recordings.isThere("thp"), "xz is needed"))
    func `a truncated xz file is an error that names it`() async throws {
        let packed = try #require(contents(of: Recordings.path("thp")))
        let error = await withFile(Array(packed.prefix(packed.count / 2))) { await failure(of: $0) }
        #expect(error?.kind == .xzFailed)
        #expect(error?.description.contains("truncated") == true)
    }

    @Test(.enabled(if: Recordings.isThere("thp"), "the sample is needed"))
    func `where xz is not installed the error says what to do`() async {
        let error = await #expect(throws: AuditInputError.self) {
            try await auditRecording(
                RecordingSource(path: Recordings.path("thp"), programs: RecordingPrograms(unpacker: "no-such-unpacker"))
            )
        }
        #expect(error?.kind == .xzMissing)
        #expect(error?.description.contains("install xz") == true)
    }

    private func contents(of path: String) -> [UInt8]? {
        guard let file = fopen(path, "r") else { return nil }
        defer { fclose(file) }
        var bytes = [UInt8](repeating: 0, count: 1 << 20)
        let count = fread(&bytes, 1, bytes.count, file)
        return Array(bytes[..<count])
    }
}

/// A file that lives as long as `body`.
func withFile<R>(_ bytes: [UInt8], mode: mode_t = 0o600, _ body: (String) async throws -> R) async rethrows -> R {
    var template = Array("/tmp/trace-audit-XXXXXX".utf8CString)
    let descriptor = mkstemp(&template)
    let path = String(decoding: template.dropLast().map { UInt8(bitPattern: $0) }, as: UTF8.self)
    defer { unlink(path) }
    _ = bytes.withUnsafeBytes { write(descriptor, $0.baseAddress, $0.count) }
    fchmod(descriptor, mode)
    close(descriptor)
    return try await body(path)
}
