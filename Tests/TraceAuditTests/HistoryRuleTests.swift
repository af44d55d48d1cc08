import Testing

@testable import TraceAudit

@Suite(.enabled(if: Recordings.isThere("guest_pt_rewrite"), "xz is needed"))
struct X21_SameHostFrame {
    /// Writes gfn 10005 again at the end, with another pfn, after `events`.
    private func rewritten(after events: [String]) throws -> AuditReport {
        var recording = Recordings.load("guest_pt_rewrite")
        let set = try recording.index(of: "kvm_mmu_set_spte: gfn 10005", "e67")
        let event = try #require(recording.lines[set].firstRange(of: "kvm_mmu_set_spte"))
        let body = recording.lines[set][event.lowerBound...]
        let at = try #require(body.split(separator: " ").last)
        for event in events + [
            "kvm_mmu_spte_requested: gfn 10005 pfn 4321 level 1",
            "kvm_mmu_set_spte: gfn 10005 spte 4321e67 (rwxu) level 1 at \(at)",
        ] {
            try recording.insert(event, before: recording.index(of: "phase vm close"))
        }
        return recording.audit()
    }

    @Test func `a leaf whose pfn changes without a zap in between is reported`() throws {
        let report = try rewritten(after: [])
        #expect(report.brokenRules == ["X21"])
        #expect(report.findings.first?.text.contains("to 0x4321") == true)
    }

    @Test(arguments: [
        "kvm_unmap_hva_range: mmu notifier unmap range: 0x007e0000005000 -- 0x007e0000006000",
        "kvm_mmu_prepare_zap_page: sp gen 0 gfn 10000 l1 8-byte q0 direct wux nxe ad root 0 sync",
        "kvm_mmu_prepare_zap_page: sp gen 0 gfn e0012 l2 8-byte q0 wux nxe ad root 0 sync",
        "kvm_mmu_zap_all_fast: kvm-mmu-valid-gen 0 used_pages f",
    ])
    func `a zap in between makes another pfn right`(zap: String) throws {
        #expect(try rewritten(after: [zap]).findings.isEmpty)
    }

    @Test func `a zap of the page beside it does not`() throws {
        let zap = "kvm_unmap_hva_range: mmu notifier unmap range: 0x007e0000006000 -- 0x007e0000007000"
        #expect(try rewritten(after: [zap]).brokenRules == ["X21"])
    }

    @Test func `without notifier events in the recording nothing is claimed`() throws {
        var recording = Recordings.load("thp")
        recording.lines.removeAll { $0.contains("kvm_unmap_hva_range") }
        let report = recording.audit()
        #expect(report.findings("X21").isEmpty)
        #expect(report.status("X21")?.reason?.contains("kvm_unmap_hva_range") == true)
    }
}

@Suite(.enabled(if: Recordings.isThere("guest_pt_rewrite"), "xz is needed"))
struct X12_NoStaleInstall {
    @Test func `an entry from a lookup that an invalidation overtook is reported`() throws {
        var recording = Recordings.load("guest_pt_rewrite")
        let set = try recording.index(of: "kvm_mmu_set_spte: gfn 10005", "e67")
        try recording.insert(
            "kvm_unmap_hva_range: mmu notifier unmap range: 0x007e0000005000 -- 0x007e0000006000", before: set)
        let report = recording.audit()
        #expect(report.brokenRules == ["X12"])
        #expect(report.findings.first?.text.contains("should have retried") == true)
    }

    @Test func `an invalidation of other memory at that moment is no finding`() throws {
        var recording = Recordings.load("guest_pt_rewrite")
        let set = try recording.index(of: "kvm_mmu_set_spte: gfn 10005", "e67")
        try recording.insert(
            "kvm_unmap_hva_range: mmu notifier unmap range: 0x007e0000007000 -- 0x007e0000008000", before: set)
        #expect(recording.audit().findings("X12").isEmpty)
    }

    @Test func `another thread may still install while the zap waits for the lock`() throws {
        var recording = Recordings.load("guest_pt_rewrite")
        let set = try recording.index(of: "kvm_mmu_set_spte: gfn 10005", "e67")
        try recording.insert(
            "kvm_unmap_hva_range: mmu notifier unmap range: 0x007e0000005000 -- 0x007e0000006000", before: set)
        recording.replace("scen-18322", with: "khug-000099", at: set)
        #expect(recording.audit().findings("X12").isEmpty)
    }

    @Test func `one of another thread that was over long before is reported`() throws {
        var recording = Recordings.load("guest_pt_rewrite")
        let set = try recording.index(of: "kvm_mmu_set_spte: gfn 10005", "e67")
        try recording.insert("tracing_mark_write: done", before: set)
        try recording.insert(
            "kvm_unmap_hva_range: mmu notifier unmap range: 0x007e0000005000 -- 0x007e0000006000", before: set)
        recording.replace("scen-18322", with: "khug-000099", at: set)
        recording.replace("scen-18322", with: "khug-000099", at: set + 1)
        for index in (set + 2)..<recording.lines.count {
            recording.replace(" 2022.", with: " 2023.", at: index)
        }
        #expect(recording.audit().brokenRules == ["X12"])
    }
}

@Suite(.enabled(if: Recordings.isThere("dontneed"), "xz is needed"))
struct I6_NoStaleEntry {
    @Test func `a guest write to an unmapped range that no new fault precedes is reported`() throws {
        var recording = Recordings.load("dontneed")
        // The pages of MADV_FREE are faulted in again by the run that follows: take these faults away.
        let start = try recording.index(of: "gpa=0x10400000 count=256")
        let end = try recording.index(of: "guest done", from: start)
        for index in (start..<end).reversed()
        where ["spte_requested", "set_spte", "pagetable_walk: addr 104"].contains(where: {
            recording.lines[index].contains($0)
        }) {
            recording.lines.remove(at: index)
        }
        let report = recording.audit()
        #expect(report.brokenRules == ["I-6"])
        let finding = try #require(report.findings.first)
        #expect(finding.text.contains("gfn 0x10400 cannot have been written"))
        #expect(finding.text.contains("255 more pages"))
    }

    @Test func `a guest read of an unmapped range is reported too`() throws {
        var recording = Recordings.load("dontneed")
        let index = try recording.index(of: "gpa=0x10800000 count=1 ")
        recording.lines.removeSubrange((index + 1)..<(index + 4))
        recording.replace(
            "ret=-1 errno=14 exit=0", with: "ret=0 errno=0 exit=2",
            at: try recording.index(of: "guest done", from: index))
        #expect(recording.audit().findings("I-6").first?.text.contains("cannot have been read") == true)
    }

    @Test func `a page that was never mapped cannot be written`() throws {
        var recording = Recordings.load("guest_pt_rewrite")
        recording.lines.removeAll { $0.contains("set_spte: gfn 10123 ") || $0.contains("requested: gfn 10123 ") }
        let report = recording.audit()
        #expect(report.brokenRules == ["I-6"])
        #expect(report.findings.first?.text.contains("no entry was ever set") == true)
    }

    @Test func `a page mapped read-only cannot be written`() throws {
        var recording = Recordings.load("guest_pt_rewrite")
        let index = try recording.index(of: "set_spte: gfn 10123 ")
        recording.replace("e67 (rw", with: "825 (r-", at: index)
        let report = recording.audit()
        #expect(report.brokenRules == ["I-6"])
        #expect(report.findings.first?.text.contains("read-only") == true)
    }

    @Test func `an emulated store needs no entry`() throws {
        var recording = Recordings.load("guest_pt_rewrite")
        let index = try recording.index(of: "set_spte: gfn 10123 ")
        recording.replace("e67 (rw", with: "825 (r-", at: index)
        let again = try recording.index(of: "guest vcpu=0 op=w", number: 1)
        for place in [again + 1, index + 1] {
            try recording.insert("kvm_emulate_insn: 0:e0001003:48 89 07 (prot64)", before: place)
        }
        let report = recording.audit()
        #expect(report.findings.isEmpty)
        #expect(report.status("I-6")?.reason?.contains("emulated") == true)
    }

    @Test func `without emulation events nothing is claimed`() throws {
        var recording = Recordings.load("guest_pt_rewrite")
        recording.lines.removeAll { $0.contains("kvm_emulate_insn") || $0.contains("set_spte: gfn 10123 ") }
        #expect(recording.audit().findings("I-6").isEmpty)
    }

    @Test func `after lost events it is not checkable`() throws {
        var recording = Recordings.load("guest_pt_rewrite")
        recording.lines.removeAll { $0.contains("set_spte: gfn 10123 ") }
        recording.lines.insert("CPU:1 [LOST 12 EVENTS]", at: try recording.index(of: "gfn 10100"))
        let report = recording.audit()
        #expect(report.findings.isEmpty)
        #expect(report.lostEvents == 12)
        #expect(report.status("I-6")?.verdict == .notCheckable)
        #expect(report.status("I-6")?.reason?.contains("events were lost") == true)
        #expect(report.malformedLines == 0)
    }

    @Test func `a ring buffer that overwrote the beginning makes it not checkable`() throws {
        var recording = Recordings.load("guest_pt_rewrite")
        let index = try recording.index(of: "# entries-in-buffer")
        recording.lines[index] = "# entries-in-buffer/entries-written: 3171/9000   #P:2"
        let report = recording.audit()
        #expect(report.lostEvents == 5829)
        #expect(report.status("I-6")?.verdict == .notCheckable)
    }
}

@Suite(.enabled(if: Recordings.isThere("dirtylog_4k"), "xz and ../shared/traces are needed"))
struct X43_DirtyLog {
    @Test(arguments: ["1023", "4097"])
    func `a log that misses a page, or has more than the slot, is reported`(count: String) throws {
        var recording = Recordings.load("dirtylog_4k")
        recording.replace("dirty=1024", with: "dirty=\(count)", at: try recording.index(of: "dirty=1024"))
        let report = recording.audit()
        #expect(report.brokenRules == ["X43"])
        #expect(report.findings.first?.text.contains("at least 1024") == true)
    }

    @Test func `a log read twice need not repeat itself`() throws {
        var recording = Recordings.load("dirtylog_4k")
        let index = try recording.index(of: "dirty=1024")
        try recording.insert("tracing_mark_write: PROBE get_dirty_log ret=0 dirty=0", before: index + 1)
        try recording.insert("tracing_mark_write: PROBE get_dirty_log slot=1", before: index + 1)
        #expect(recording.audit().findings.isEmpty)
    }
}
