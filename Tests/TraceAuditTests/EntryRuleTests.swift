import Testing

@testable import TraceAudit

/// Doctored copies of a real recording (shadow paging), one entry changed in each.
private func doctored(_ name: String = "guest_pt_rewrite", _ edit: (inout Recording) throws -> Void) rethrows
    -> AuditReport
{
    var recording = Recordings.load(name)
    try edit(&recording)
    return recording.audit()
}

@Suite(.enabled(if: Recordings.isThere("guest_pt_rewrite"), "xz is needed"))
struct X18_MMUPresent {
    @Test func `a present entry without the MMU-present bit is reported`() throws {
        let report = try doctored { recording in
            let index = try recording.index(of: "kvm_mmu_set_spte: gfn 10005", "e67")
            recording.replace("e67 (", with: "667 (", at: index)
        }
        let finding = try #require(report.findings("X18").first)
        #expect(finding.text.contains("without bit 11"))
        #expect(finding.text.contains("gfn 0x10005"))
        #expect(finding.line > 0)
    }
}

@Suite(.enabled(if: Recordings.isThere("guest_pt_rewrite"), "xz is needed"))
struct X19_LeafWritability {
    @Test(arguments: [("e67", "867"), ("e67", "a67"), ("e67", "c65"), ("e67", "c67")])
    func `a writable entry without host-writable or MMU-writable is reported`(old: String, new: String) throws {
        let report = try doctored { recording in
            let index = try recording.index(of: "kvm_mmu_set_spte: gfn 10005", old)
            recording.replace(old + " (rw", with: new + (new == "c65" ? " (r-" : " (rw"), at: index)
        }
        #expect(report.findings("X19").count == 1)
        #expect(report.findings("flags").isEmpty)
    }

    @Test(arguments: ["e67 (rw", "e65 (r-", "a65 (r-", "865 (r-"])
    func `the four legal states are accepted`(state: String) throws {
        let report = try doctored { recording in
            let index = try recording.index(of: "kvm_mmu_set_spte: gfn 10005", "e67")
            recording.replace("e67 (rw", with: state, at: index)
        }
        #expect(report.findings("X19").isEmpty)
    }
}

@Suite(.enabled(if: Recordings.isThere("thp"), "xz is needed"))
struct X22_Alignment {
    @Test func `a huge leaf with a misaligned pfn is reported`() throws {
        let report = try doctored("thp") { recording in
            let index = try recording.index(of: "kvm_mmu_set_spte: gfn 10400")
            recording.replace("000ee7", with: "001ee7", at: index)
        }
        #expect(report.findings("X22").count == 1)
        #expect(report.findings("X22").first?.text.contains("multiples of 0x200") == true)
    }

    @Test func `a huge leaf with a misaligned gfn is reported`() throws {
        let report = try doctored("thp") { recording in
            let index = try recording.index(of: "kvm_mmu_set_spte: gfn 10400")
            recording.replace("gfn 10400", with: "gfn 10401", at: index)
        }
        #expect(report.findings("X22").count == 1)
    }

    @Test func `a huge leaf without bit 7 is reported`() throws {
        let report = try doctored("thp") { recording in
            let index = try recording.index(of: "kvm_mmu_set_spte: gfn 10400")
            recording.replace("ee7", with: "e67", at: index)
        }
        #expect(report.findings("X22").first?.text.contains("lacks bit 7") == true)
    }

    @Test func `a huge request with incongruent frames is reported`() throws {
        let report = try doctored("thp") { recording in
            let index = try recording.index(of: "kvm_mmu_spte_requested: gfn 10400")
            recording.replace("gfn 10400", with: "gfn 10402", at: index)
        }
        #expect(report.findings("X22").first?.text.contains("was requested") == true)
    }
}

@Suite(.enabled(if: Recordings.isThere("guest_pt_rewrite"), "xz is needed"))
struct X23_ReservedBits {
    @Test(arguments: ["8000000000000", "10000000000000", "4000000000000000"])
    func `a reserved bit is reported`(bit: String) throws {
        let report = try doctored { recording in
            let index = try recording.index(of: "kvm_mmu_set_spte: gfn 10005", "e67")
            let line = recording.lines[index]
            let spte = try #require(line.split(separator: " ").first { $0.hasSuffix("e67") })
            let value = try #require(UInt64(spte, radix: 16))
            let mask = try #require(UInt64(bit, radix: 16))
            recording.replace(String(spte), with: String(value | mask, radix: 16), at: index)
        }
        #expect(report.findings("X23").count == 1)
        #expect(
            report.findings("X23").first?.text.contains("bit \(UInt64(bit, radix: 16)?.trailingZeroBitCount ?? 0)")
                == true)
    }
}

@Suite(.enabled(if: Recordings.isThere("guest_pt_rewrite"), "xz is needed"))
struct Tracepoints_PrintedFlags {
    @Test(arguments: ["(r-xu)", "(rw-u)", "(rwx-)"])
    func `printed permissions that the entry does not have are reported`(flags: String) throws {
        let report = try doctored { recording in
            let index = try recording.index(of: "kvm_mmu_set_spte: gfn 10005", "e67")
            recording.replace("(rwxu)", with: flags, at: index)
        }
        #expect(report.brokenRules == ["flags"])
    }
}

@Suite(.enabled(if: Recordings.isThere("guest_pt_rewrite"), "xz is needed"))
struct Mapping_RequestedIsInstalled {
    @Test func `another pfn than the requested one is reported`() throws {
        let report = try doctored { recording in
            let index = try recording.index(of: "kvm_mmu_spte_requested: gfn 10005")
            let pfn = try #require(recording.lines[index].split(separator: " ").dropLast(2).last)
            recording.replace("pfn \(pfn)", with: "pfn 1234", at: index)
        }
        #expect(report.brokenRules == ["request"])
        #expect(report.findings.first?.text.contains("0x1234 was requested") == true)
    }
}

@Suite(.enabled(if: Recordings.isThere("guest_pt_rewrite"), "xz is needed"))
struct Tracepoints_NotifierRanges {
    @Test(arguments: [
        "0x007e0000200000 -- 0x007e0000100000", "0x007e0000100000 -- 0x007e0000100000",
        "0x007e0000100000 -- 0x007e0000200800",
    ])
    func `an empty or unaligned notifier range is reported`(range: String) throws {
        let report = try doctored { recording in
            let index = try recording.index(of: "phase vm close")
            try recording.insert("kvm_unmap_hva_range: mmu notifier unmap range: \(range)", before: index)
            try recording.insert("kvm_age_hva: mmu notifier age hva: \(range)", before: index)
        }
        #expect(report.findings("range").count == 2)
        #expect(report.brokenRules == ["range"])
    }
}

@Suite(.enabled(if: Recordings.isThere("guest_pt_rewrite"), "xz is needed"))
struct X27_MMIOGeneration {
    /// Generation 0x2a5: bits 7:0 at 10:3, bits 18:8 at 62:52.
    private static let entry = String(UInt64(0x2) << 52 | 1 << 51 | UInt64(0xa5) << 3 | 1, radix: 16)

    @Test(arguments: [
        ("kvm_gen 2a5 spte-gen 2a5 valid 1", false), ("kvm_gen 2a6 spte-gen 2a5 valid 0", false),
        ("kvm_gen 2a6 spte-gen 2a5 valid 1", true), ("kvm_gen 2a5 spte-gen 2a5 valid 0", true),
        ("kvm_gen 2a6 spte-gen 2a6 valid 1", true),
    ])
    func `a verdict that contradicts the generations is reported`(fields: String, wrong: Bool) throws {
        let report = try doctored { recording in
            let index = try recording.index(of: "phase vm close")
            try recording.insert("check_mmio_spte: spte \(Self.entry) \(fields)", before: index)
        }
        #expect(report.brokenRules == (wrong ? ["X27"] : []))
    }
}
