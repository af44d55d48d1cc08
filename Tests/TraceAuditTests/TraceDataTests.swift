import Glibc
import Testing

@testable import TraceAudit

/// trace-cmd's own files, through the real program where it is installed. Spec: ecosystem 7.2; x86 10.
@Suite(.enabled(if: Recordings.binaryIsThere, "xz, trace-cmd and ../shared/traces are needed"))
struct TraceDataFiles {
    /// Another recording of what `thp.ftrace.txt` recorded: the host's own doings differ, the virtual machine's do not.
    @Test func `a trace-cmd file says what the text of the same scenario says`() async throws {
        let data = try await auditRecording(path: Recordings.binaryPath)
        let text = Recordings.load("thp").audit()
        #expect(data.findings.isEmpty && text.findings.isEmpty, "\(data.render())")
        #expect(data.verdict == text.verdict)
        #expect(data.malformedLines == 0)
        #expect(data.lostEvents == 0)
        #expect(data.entryFormat == text.entryFormat)
        #expect(counts(data) == counts(text))
        let (left, right) = try (#require(data.machines.first), #require(text.machines.first))
        #expect(data.machines.count == 1 && text.machines.count == 1)
        #expect(left.command == "scen")
        #expect(left.entries == right.entries)
        #expect(left.prefetched == right.prefetched)
        #expect(left.faults == right.faults)
        #expect(left.zaps == right.zaps)
        #expect(left.kind == right.kind)
        #expect(left.runs.map(\.guestAddress) == right.runs.map(\.guestAddress))
        #expect(left.notifier.unmappedPages == right.notifier.unmappedPages)
        for (one, other) in zip(data.rules, text.rules) where one.id != "range" {
            #expect(one.verdict == other.verdict, "\(one.id)")
        }
    }

    /// By name. The ages and the scans are the host's: how often they come differs from run to run. A mark is `print` in
    /// one and `tracing_mark_write` in the other.
    private func counts(_ report: AuditReport) -> [String: UInt64] {
        var counts: [String: UInt64] = [:]
        for event in report.understood + report.unknown {
            if event.name == "kvm_age_hva" || event.name.hasPrefix("mm_") { continue }
            counts[event.name == "print" ? "tracing_mark_write" : event.name, default: 0] += event.count
        }
        return counts
    }

    @Test func `packed or plain, version 6 or 7, a file gives the same report`() async throws {
        let packed = try await auditRecording(path: Recordings.binaryPath)
        let bytes = Recordings.output(of: "xz -dc -- '\(Recordings.binaryPath)'")
        try await withFile(bytes) { path in
            try await expect(path, "7", sameAs: packed)
            let older = path + ".v6"
            defer { unlink(older) }
            _ = Recordings.output(
                of: "trace-cmd convert -i \(path) -o \(older) --file-version 6 --compression none 2>/dev/null")
            try await expect(older, "6", sameAs: packed)
        }
    }

    private func expect(_ path: String, _ version: String, sameAs expected: AuditReport) async throws {
        var report = try await auditRecording(path: path)
        report.file = expected.file
        #expect(report == expected)
        let origin = try await RecordingSource(path: path).forEachPart { _ in }
        #expect(origin == RecordingOrigin(traceDataVersion: version))
    }

    @Test func `a file comes through a pipe`() async throws {
        let bytes = Recordings.output(of: "xz -dc -- '\(Recordings.binaryPath)'")
        let report = try await withFile(bytes) { path in
            let pipe = path + ".pipe"
            mkfifo(pipe, 0o600)
            defer { unlink(pipe) }
            let writer = popen("cat \(path) > \(pipe)", "r")
            defer { pclose(writer) }
            try RecordingSource(path: pipe).check()
            return try await auditRecording(path: pipe)
        }
        #expect(report.understood == (try await auditRecording(path: Recordings.binaryPath)).understood)
    }

    @Test(arguments: [16, 100_000, 400_000, 1_000_000])
    func `a truncated file is an error that says so`(length: Int) async throws {
        let bytes = Recordings.output(of: "xz -dc -- '\(Recordings.binaryPath)'")
        #expect(bytes.count > length)
        let error = await withFile(Array(bytes.prefix(length))) { await failure(RecordingSource(path: $0)) }
        #expect(error?.kind == .traceCommandFailed)
        #expect(error?.description.contains("damaged or truncated") == true, "\(error?.description ?? "")")
    }

    @Test func `lines are counted alike by whoever reads them`() async throws {
        var lines: UInt64 = 0
        let origin = try await RecordingSource(path: Recordings.binaryPath).forEachLine { _ in lines += 1 }
        #expect(origin.isPacked && origin.traceDataVersion == "7")
        #expect(lines == (try await auditRecording(path: Recordings.binaryPath)).lines)
    }
}

/// What happens around the program, with programs that stand in for it.
@Suite struct TraceDataPrograms {
    private static let file = TraceData.magic + Array("7\0".utf8) + [UInt8](repeating: 0, count: 5000)

    /// The outcome of reading a file of version 7 with a shell script in trace-cmd's place.
    private func read(_ script: String, folder: String = "/tmp") async -> (AuditReport?, AuditInputError?) {
        await withFile(Array("#!/bin/sh\n\(script)\n".utf8), mode: 0o700) { program in
            await withFile(Self.file) { path in
                let source = RecordingSource(
                    path: path, programs: RecordingPrograms(converter: program, folder: folder))
                do throws(AuditInputError) {
                    return (try await auditRecording(source), nil)
                } catch {
                    #expect(error.path == path)
                    return (nil, error)
                }
            }
        }
    }

    @Test func `where trace-cmd is not installed the error says what to do`() async {
        let error = await withFile(Self.file) { path in
            await failure(RecordingSource(path: path, programs: RecordingPrograms(converter: "no-such-program")))
        }
        #expect(error?.kind == .traceCommandMissing)
        #expect(error?.description.contains("install trace-cmd") == true)
        #expect(error?.description.contains("trace-cmd report -N -t") == true)
    }

    @Test func `what it prints is audited, and what it complains of is told`() async {
        let line = "vmm-10 [000] 5.000001: kvm_mmu_spte_requested: gfn 1 pfn 2 level 1"
        let (report, _) = await read("cat > /dev/null; echo cpus=2; echo '\(line)'; echo '  odd thing' >&2")
        #expect(report?.events == 1)
        #expect(report?.malformedLines == 0)
        #expect(report?.notes.contains("trace-cmd: odd thing") == true)
    }

    @Test func `it gets the options and the file's bytes`() async {
        let (report, _) = await read(
            "echo cpus=$#; test \"$*\" = 'report -N -t -i /dev/stdin' && test $(wc -c < /dev/stdin) = \(Self.file.count)"
        )
        #expect(report?.lines == 1)
    }

    @Test(arguments: [
        ("echo cpus=2; echo 'no room in /dev/stdin' >&2; exit 3", "could not read it (no room in /tmp/trace-audit-"),
        ("exit 0", "read nothing from it"), ("echo bad >&2", "read nothing from it (bad)"),
        ("echo cpus=2; kill -SEGV $$", "crashed on it (signal 11)"),
    ])
    func `its failure is the file's error, with its own words`(script: String, words: String) async {
        let (_, error) = await read(script)
        #expect(error?.kind == .traceCommandFailed)
        #expect(error?.description.contains(words) == true, "\(error?.description ?? "no error")")
        #expect(error?.description.contains("/dev/stdin") == false)
    }

    @Test func `more complaints than fit are shortened`() async {
        let (report, _) = await read("echo cpus=2; i=0; while [ $i -lt 9000 ]; do i=$((i+1)); echo c$i >&2; done")
        #expect(report?.notes.filter { $0.hasPrefix("trace-cmd: ") }.count == 8)
        #expect(report?.notes.contains("trace-cmd: c9000") == true)
    }

    @Test func `a folder without room is an error that says so`() async {
        let (_, error) = await read("echo cpus=2", folder: "/no/such/folder")
        #expect(error?.kind == .noRoom)
        #expect(error?.description.contains("TMPDIR") == true)
    }
}

private func failure(_ source: RecordingSource) async -> AuditInputError? {
    do throws(AuditInputError) {
        _ = try await auditRecording(source)
        return nil
    } catch {
        return error
    }
}
