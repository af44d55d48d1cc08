import Explanations
import Testing

@testable import Replay
@testable import TraceAudit

extension Recording {
    /// What the model makes of it.
    func replay() throws -> ReplayReport {
        let recorded = RecordedRun()
        let auditor = TraceAuditor(follower: recorded)
        auditor.feed(Array(text.utf8))
        _ = auditor.finish(file: "recording")
        return try Replay.replay(recorded, file: "recording")
    }
}

/// The shadow MMU beside a real one: spec x86 10, 12.4.
@Suite struct ReplayOfRealRecordings {
    @Test(
        .enabled(if: Recordings.shipped.allSatisfy(Recordings.isThere), "xz is needed"),
        arguments: Recordings.shipped)
    func `the model does what the recorded kernel did`(name: String) async throws {
        try await expectFaithful(name, leastCompared: 2000)
    }

    @Test(
        .enabled(if: Recordings.allAreThere, "xz and ../shared/traces are needed"),
        arguments: Recordings.all.filter { !Recordings.shipped.contains($0) })
    func `the model does what every other kernel did`(name: String) async throws {
        try await expectFaithful(name, leastCompared: 3000)
    }

    private func expectFaithful(_ name: String, leastCompared: Int) async throws {
        let report = try await replayRecording(path: Recordings.path(name))
        #expect(report.isFaithful && report.compared > leastCompared, "\(ReplayText.render(report, show: 5))")
        #expect(report.leftOut.isEmpty)
    }

    @Test(.enabled(if: Recordings.binaryIsThere, "xz, trace-cmd and ../shared/traces are needed"))
    func `a trace.dat is replayed like its text`() async throws {
        let report = try await replayRecording(path: Recordings.binaryPath)
        #expect(report.isFaithful)
        #expect(try report.compared == Recordings.load("thp").replay().compared)
    }
}

/// A difference is told: each of these changes one thing in a recording that is replayed without any.
@Suite(.enabled(if: Recordings.shipped.allSatisfy(Recordings.isThere), "xz is needed"))
struct ReplayTellsDifferences {
    private func differences(
        _ name: String = "dontneed", _ change: (inout Recording) throws -> Void
    ) throws -> [ReplayDifference] {
        var recording = Recordings.load(name)
        try change(&recording)
        return try recording.replay().steps.flatMap(\.differences)
    }

    @Test(arguments: [("e67 (", "e47 ("), ("level 1", "level 2"), ("gfn 10005", "gfn 10006")])
    func `a bit, a level, a frame number`(old: String, new: String) throws {
        let found = try differences {
            $0.replace(old, with: new, at: try $0.index(of: "set_spte: gfn 10005 "))
        }
        #expect(found.count == 2 && Set(found.map(\.kind)) == [.missing, .extra])
    }

    @Test func `an event that the kernel did not tell`() throws {
        let found = try differences { $0.lines.remove(at: try $0.index(of: "spte_requested: gfn 10005 ")) }
        #expect(found.map(\.kind) == [.extra] && found[0].text.contains("10005"))
    }

    @Test func `an event that the model does not tell`() throws {
        let found = try differences {
            try $0.insert(
                "kvm_mmu_set_spte: gfn 10005 spte 12345e67 (rwxu) level 1 at 1000",
                before: try $0.index(of: "spte_requested: gfn 10006 "))
        }
        #expect(found.map(\.kind) == [.missing])
    }

    @Test func `another page under the name of one that is mapped`() throws {
        let found = try differences {
            let other = $0.lines[try $0.index(of: "set_spte: gfn 10004 ")].split(separator: " ")
            let mine = $0.lines[try $0.index(of: "set_spte: gfn 10005 ")].split(separator: " ")
            let (old, new) = (mine[mine.firstIndex(of: "spte")! + 1], other[other.firstIndex(of: "spte")! + 1])
            $0.replace(String(old), with: String(new), at: try $0.index(of: "set_spte: gfn 10005 "))
        }
        #expect(found.map(\.kind) == [.frame])
    }

    @Test(arguments: [
        (" wux ", " -ux "), ("8-byte", "4-byte"), ("root 0", "root 1"), ("direct ", ""), ("new", "existing"),
    ])
    func `a shadow page of another role`(old: String, new: String) throws {
        let found = try differences {
            $0.replace(old, with: new, at: try $0.index(of: "get_page: sp gen 0 gfn 10000 l1"))
        }
        #expect(found.count >= 2 && Set(found.map(\.kind)).isSuperset(of: [.missing, .extra]))
    }

    @Test func `the order of two events`() throws {
        let found = try differences {
            let at = try $0.index(of: "spte_requested: gfn 10005 ")
            $0.lines.swapAt(at, at + 1)
        }
        #expect(found.count == 2)
    }

    @Test func `a range that the notifier heard of, and one that it did not`() throws {
        let missed = try differences {
            $0.lines.remove(at: try $0.index(of: "unmap range: 0x007e0000800000 -- 0x007e0000a00000"))
        }
        #expect(missed.contains { $0.kind == .extra && $0.text.contains("7e0000800000") })
        let added = try differences {
            try $0.insert(
                "kvm_unmap_hva_range: mmu notifier unmap range: 0x007e0000001000 -- 0x007e0000002000",
                before: try $0.index(of: "spte_requested: gfn 10005 "))
        }
        #expect(added.map(\.kind) == [.missing])
    }

    @Test func `a page out of sync, and the results of calls and runs`() throws {
        let unsync = try differences("guest_pt_rewrite") {
            $0.lines.remove(at: try $0.index(of: "kvm_mmu_unsync_page"))
        }
        #expect(unsync.map(\.kind) == [.extra])
        let result = try differences {
            $0.replace("ret=-1 errno=14 exit=0", with: "ret=0 errno=0 exit=2", at: try $0.index(of: "ret=-1"))
        }
        #expect(result.contains { $0.kind == .result })
    }

    @Test func `without marks there is nothing to replay`() throws {
        var recording = Recordings.load("thp")
        recording.lines.removeAll { $0.contains("PROBE") }
        #expect(throws: ReplayFailure.self) { try recording.replay() }
    }
}

/// Explanations: what they take out, and what they must not.
@Suite struct ReplayExplanations {
    private static let good = """
        - name: cut of a VMA
          kernel_rule: mm, split_huge_pmd_if_needed
          kind: missing
          step: phase *
          text: unmap range *00000 -- *00000
          must_not_match: ["set_spte gfn 1 bits e67 level 1"]
        """

    @Test func `a rule takes out what it matches, and nothing else`() throws {
        let rules = try ExplanationFile(text: Self.good, file: "f").rules
        func difference(_ kind: ReplayDifference.Kind, _ text: String) -> ReplayDifference {
            ReplayDifference(kind: kind, text: text, detail: "")
        }
        let mine = difference(.missing, "unmap range 7e0000800000 -- 7e0000a00000")
        let others = [
            difference(.extra, mine.text), difference(.missing, "unmap range 7e0000800000 -- 7e0000a01000"),
            difference(.missing, "walk addr 0 pferr 0"),
        ]
        let step = ReplayStep(name: "phase munmap", compared: 1000, differences: [mine] + others)
        let elsewhere = ReplayStep(name: "guest vcpu 0", compared: 10, differences: [mine])
        var report = ReplayReport(file: "f", steps: [step, elsewhere], findings: [], leftOut: [])
        report.explain(rules)
        #expect(report.steps[0].differences == others && report.steps[1].differences == [mine])
        #expect(report.absorbed.map(\.count) == [1] && !report.explainsTooMuch && !report.isFaithful)
        #expect(ReplayText.render(report, show: 1).contains("explained: 1 by cut of a VMA"))
        var small = ReplayReport(
            file: "f", steps: [ReplayStep(name: "phase x", compared: 100, differences: [mine])], findings: [],
            leftOut: [])
        small.explain(rules)
        #expect(small.differences == 0 && small.explainsTooMuch && !small.isFaithful)
    }

    @Test(arguments: [
        ("kind: missing", "kind: gone", "unknown kind"), ("step: phase *", "stop: x", "unknown key `stop`"),
        ("  must_not_match: [\"set_spte gfn 1 bits e67 level 1\"]", "", "`must_not_match` is missing"),
        ("set_spte gfn 1 bits e67 level 1", "unmap range 00000 -- 100000", "which it must not"),
        ("- name", "name", "no list"),
    ])
    func `a bad file is refused, with its line`(old: String, new: String, problem: String) {
        let text = old == "- name" ? "name: x" : Self.good.replacing(old, with: new)
        do {
            _ = try ExplanationFile(text: text, file: "rules.yaml")
            Issue.record("accepted")
        } catch {
            #expect(error.description.contains(problem) && error.description.hasPrefix("rules.yaml:"), "\(error)")
        }
    }

    @Test(arguments: [
        ("a*c", "abc", true), ("a*c", "ab", false), ("*", "", true), ("a", "ab", false), ("a*b*c", "aXbYc", true),
        ("a*b*c", "acb", false), ("ab*ba", "aba", false),
    ])
    func `patterns`(pattern: String, text: String, isFit: Bool) {
        #expect(fits(pattern, text) == isFit)
    }
}
