import Testing

@testable import TraceAudit

@Suite struct RealRecordings {
    @Test(
        .enabled(if: Recordings.shipped.allSatisfy(Recordings.isThere), "xz is needed"),
        arguments: Recordings.shipped)
    func `a shipped recording has no finding`(name: String) async throws {
        try await expectClean(name)
    }

    @Test(
        .enabled(if: Recordings.allAreThere, "xz and ../shared/traces are needed"), arguments: Recordings.all)
    func `a recording of a real host has no finding`(name: String) async throws {
        try await expectClean(name)
    }

    private func expectClean(_ name: String) async throws {
        let report = try await auditRecording(path: Recordings.path(name))
        #expect(report.findings.isEmpty, "\(report.render())")
        #expect(report.verdict == .clean)
        #expect(report.malformedLines == 0)
        #expect(report.entryFormat == .legacy)
        #expect(report.machines.count == 1)
        #expect(report.machines.first?.kind == .shadow)
        let runs = try #require(report.status("I-6"))
        let marked = report.machines[0]
        #expect(runs.checks == marked.runCount - marked.failedRuns)
        #expect(runs.notCheckable == 0)
        for rule in ["X18", "X19", "X23", "X12", "request", "flags", "range", "X48"] {
            #expect(report.status(rule)?.verdict == .held, "\(rule)")
        }
    }

    @Test(.enabled(if: Recordings.isThere("dirtylog_4k"), "xz and ../shared/traces are needed"))
    func `every read of the dirty log is checked`() throws {
        let report = Recordings.load("dirtylog_4k").audit()
        #expect(report.status("X43")?.checks == 3)
        #expect(report.machines.first?.dirtyPages == 1536)
        #expect(try #require(report.status("X21")).checks > 1000)
    }

    @Test(.enabled(if: Recordings.isThere("dontneed"), "xz is needed"))
    func `what happened is counted`() throws {
        let report = Recordings.load("dontneed").audit()
        let machine = try #require(report.machines.first)
        #expect(machine.slotChanges.map(\.slot) == [500, 1])
        #expect(machine.runCount == 6)
        #expect(machine.failedRuns == 2)
        #expect(machine.prefetched == 448)
        #expect(machine.notifier.unmapRanges == 8)
        #expect(machine.notifier.rangesInSlots == 7)
        #expect(machine.faults.requests == 4417)
        #expect(
            machine.entries == [
                EntryCount(level: 1, permissions: "r-xu", count: 256),
                EntryCount(level: 1, permissions: "rwxu", count: 4609),
            ])
        #expect(report.unknown.first?.name == "kvm_apicv_inhibit_changed")
        #expect(report.unknown.reduce(0) { $0 + $1.count } == 39)
    }

    @Test(.enabled(if: Recordings.isThere("thp"), "xz is needed"), arguments: [1, 7, 4096, 100_003])
    func `the size of the pieces does not matter`(piece: Int) {
        let recording = Recordings.load("thp")
        #expect(recording.audit(piece: piece) == recording.audit())
    }

    @Test(.enabled(if: Recordings.isThere("dontneed"), "xz is needed"))
    func `without marks nothing that needs slots is judged`() {
        var recording = Recordings.load("dontneed")
        recording.lines.removeAll { $0.contains("tracing_mark_write") }
        let report = recording.audit()
        #expect(report.findings.isEmpty)
        for rule in ["X12", "X21"] {
            #expect(report.status(rule)?.reason?.contains("no slot marks") == true)
        }
        #expect(report.status("X12")?.verdict == .notCheckable)
        for rule in ["I-6", "X43"] { #expect(report.status(rule)?.verdict == .notCheckable) }
    }

    @Test(.enabled(if: Recordings.isThere("thp"), "xz is needed"))
    func `two recordings in one file are told apart`() {
        let recording = Recordings.load("thp")
        var twice = recording
        twice.lines += recording.lines
        let report = twice.audit()
        #expect(report.findings.isEmpty)
        #expect(report.notes.contains { $0.contains("holds 2 recordings") })
    }
}
