import Testing

@testable import TraceAudit

@Suite(.enabled(if: Recordings.isThere("guest_pt_rewrite"), "xz is needed"))
struct X48_ShadowedReadOnly {
    @Test func `a writable entry for a shadowed level-2 table is reported`() throws {
        var recording = Recordings.load("guest_pt_rewrite")
        let index = try recording.index(of: "phase vm close")
        try recording.insert("kvm_mmu_set_spte: gfn e0012 spte 4321e67 (rwxu) level 1 at 105535090", before: index)
        try recording.insert("kvm_mmu_spte_requested: gfn e0012 pfn 4321 level 1", before: index)
        let report = recording.audit()
        #expect(report.brokenRules == ["X48"])
        #expect(report.findings.first?.text.contains("level 2 or higher") == true)
    }

    @Test func `a level-1 table that becomes writable without being unsynced is reported`() throws {
        var recording = Recordings.load("guest_pt_rewrite")
        recording.lines.remove(at: try recording.index(of: "kvm_mmu_unsync_page"))
        let report = recording.audit()
        #expect(report.brokenRules == ["X48"])
        #expect(report.findings.first?.text.contains("level 1 and in sync") == true)
    }

    @Test func `MMU-writable alone counts as writable`() throws {
        var recording = Recordings.load("guest_pt_rewrite")
        let index = try recording.index(of: "set_spte: gfn e0101", "a05")
        recording.replace("a05", with: "e05", at: index)
        #expect(recording.audit().brokenRules == ["X48"])
    }

    @Test func `once the shadow page is zapped its table may be writable`() throws {
        var recording = Recordings.load("guest_pt_rewrite")
        let index = try recording.index(of: "phase vm close")
        try recording.insert("kvm_mmu_set_spte: gfn e0012 spte 4321e67 (rwxu) level 1 at 105535090", before: index)
        try recording.insert("kvm_mmu_spte_requested: gfn e0012 pfn 4321 level 1", before: index)
        try recording.insert(
            "kvm_mmu_prepare_zap_page: sp gen 0 gfn e0012 l2 8-byte q0 wux nxe ad root 0 sync", before: index)
        #expect(recording.audit().findings("X48").isEmpty)
    }
}

@Suite(.enabled(if: Recordings.isThere("guest_pt_rewrite"), "xz is needed"))
struct X49_UnsyncLevel {
    @Test(arguments: [("l1", "l2"), ("q0 wux", "q0 direct wux")])
    func `an unsync page of another level, or a direct one, is reported`(old: String, new: String) throws {
        var recording = Recordings.load("guest_pt_rewrite")
        recording.replace(old, with: new, at: try recording.index(of: "kvm_mmu_unsync_page"))
        #expect(recording.audit().findings("X49").count == 1)
    }

    @Test func `an unsync flag on a level-2 page is reported in any event`() throws {
        var recording = Recordings.load("guest_pt_rewrite")
        let index = try recording.index(of: "kvm_mmu_prepare_zap_page", " l2 ")
        recording.replace("root 0 sync", with: "root 0 unsync", at: index)
        #expect(recording.audit().findings("X49").count == 1)
    }
}

@Suite(.enabled(if: Recordings.isThere("dontneed"), "xz is needed"))
struct Prefetch_GroupAndAccessed {
    @Test func `a prefetched entry outside the aligned group of eight is reported`() throws {
        var recording = Recordings.load("dontneed")
        let index = try recording.index(of: "set_spte: gfn 10407", "e47")
        let at = try #require(recording.lines[index].split(separator: " ").last)
        let value = try #require(UInt64(at, radix: 16))
        recording.replace(" at \(at)", with: " at \(String(value + 8, radix: 16))", at: index)
        let report = recording.audit()
        #expect(report.brokenRules == ["prefetch"])
    }

    @Test func `a prefetched entry with A set is reported`() throws {
        var recording = Recordings.load("dontneed")
        let index = try recording.index(of: "set_spte: gfn 10407", "e47")
        recording.replace("e47", with: "e67", at: index)
        #expect(recording.audit().brokenRules == ["prefetch-A"])
    }

    @Test func `a prefetched huge entry is reported`() throws {
        var recording = Recordings.load("dontneed")
        let index = try recording.index(of: "set_spte: gfn 10407", "e47")
        recording.replace("e47", with: "ec7", at: index)
        recording.replace("level 1", with: "level 2", at: index)
        #expect(recording.audit().findings("prefetch").count == 1)
    }
}
