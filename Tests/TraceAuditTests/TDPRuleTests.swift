import Testing

@testable import TraceAudit

/// EPT recordings, written here: there is no TDP host among the real ones.
private struct TDPRecording {
    var writer = EventWriter()
    static let empty: UInt64 = 0x8000_0000_0000_0000
    static let frozen: UInt64 = 0x8000_0000_0000_05a0

    init() {
        change("1", 4, Self.empty, 0x8000_0000_0012_3907)
        writer = EventWriter()
        writer.add("kvm_mmu_get_page: sp gen 0 gfn 0 l4 8-byte q0 direct wux nxe ad root 0 sync new")
        install(frame: 0x100, pfn: 0x5100)
    }

    static func leaf(_ pfn: UInt64, level: Int = 1) -> UInt64 {
        0x8600_0000_0000_0b77 | pfn << 12 | (level > 1 ? 0x80 : 0)
    }

    mutating func change(_ frame: String, _ level: Int, _ old: UInt64, _ new: UInt64) {
        writer.add(
            "kvm_tdp_mmu_spte_changed: as id 0 gfn \(frame) level \(level) old_spte \(String(old, radix: 16)) "
                + "new_spte \(String(new, radix: 16))")
    }

    mutating func install(frame: UInt64, pfn: UInt64, level: Int = 1, entry: UInt64? = nil) {
        let name = String(frame, radix: 16)
        let entry = entry ?? Self.leaf(pfn, level: level)
        writer.add("kvm_mmu_spte_requested: gfn \(name) pfn \(String(pfn, radix: 16)) level \(level)")
        change(name, level, Self.empty, entry)
        let flags = "r" + (entry & 2 != 0 ? "w" : "-") + (entry & 4 != 0 ? "x" : "-") + (entry & 1 != 0 ? "u" : "-")
        writer.add(
            "kvm_mmu_set_spte: gfn \(name) spte \(String(entry, radix: 16)) (\(flags)) level \(level) at 7000\(name)")
    }

    func audit() -> AuditReport { writer.audit() }
}

@Suite struct TDP_CleanRecording {
    @Test func `a fault, a zap and a refault have no finding`() {
        var recording = TDPRecording()
        let leaf = TDPRecording.leaf(0x5100)
        recording.change("100", 1, leaf | 0x300, TDPRecording.empty)
        recording.install(frame: 0x100, pfn: 0x9100)
        recording.install(frame: 0x400, pfn: 0xa00, level: 2)
        recording.change("400", 2, TDPRecording.leaf(0xa00, level: 2), 0x8000_0000_0043_2907)
        recording.change("405", 1, TDPRecording.leaf(0xa05), TDPRecording.frozen)
        let report = recording.audit()
        #expect(report.findings.isEmpty)
        #expect(report.entryFormat == .extended)
        #expect(report.machines.first?.kind == .tdp)
        #expect(report.machines.first?.zaps.leaves == [LevelCount(level: 1, count: 2)])
        for rule in ["X18", "X19", "X20", "X22", "X23", "X24", "X28", "chain", "change", "request", "flags"] {
            // Rules that nothing here touches hold trivially elsewhere.
            if rule == "X20" || rule == "change" { continue }
            #expect(report.status(rule)?.verdict == .held, "\(rule)")
        }
    }
}

@Suite struct X20_HostWritableKept {
    @Test func `host-writable cleared in a present leaf is reported`() {
        var recording = TDPRecording()
        recording.change("100", 1, TDPRecording.leaf(0x5100), 0x8000_0000_0510_0b75)
        #expect(recording.audit().brokenRules == ["X20"])
    }

    @Test func `host-writable gained is fine`() {
        var recording = TDPRecording()
        recording.install(frame: 0x101, pfn: 0x5101, entry: 0x8000_0000_0510_1b75)
        recording.change("101", 1, 0x8000_0000_0510_1b75, TDPRecording.leaf(0x5101))
        #expect(recording.audit().findings.isEmpty)
        #expect(recording.audit().status("X20")?.verdict == .held)
    }
}

@Suite struct X21_TDPSameHostFrame {
    @Test func `a leaf that changes its pfn in one write is reported`() {
        var recording = TDPRecording()
        recording.change("100", 1, TDPRecording.leaf(0x5100), TDPRecording.leaf(0x5101))
        #expect(recording.audit().brokenRules == ["X21"])
    }
}

@Suite struct X23_EPTReservedBits {
    @Test(arguments: [
        (UInt64(0x8600_0000_0510_0b6f), "memory type 5", false), (0x8600_0000_0510_0b57, "memory type 2", true),
        (0x8600_0000_0510_0b7f, "memory type 7", true), (0xa600_0000_0510_0b77, "bit 61", true),
        (0x8600_0000_0510_0b76, "W without R", true), (0x8608_0000_0510_0b77, "bit 51", true),
    ])
    func `a misconfigured EPT entry is reported`(entry: UInt64, what: String, wrong: Bool) {
        var recording = TDPRecording()
        recording.install(frame: 0x102, pfn: 0x5100, entry: entry)
        let findings = recording.audit().findings("X23")
        #expect(findings.isEmpty != wrong)
        #expect(findings.allSatisfy { $0.text.contains(what) })
    }

    @Test func `a table entry with a memory type is reported`() {
        var recording = TDPRecording()
        recording.change("200000", 2, TDPRecording.empty, 0x8000_0000_0012_3937)
        #expect(recording.audit().brokenRules == ["X23"])
    }
}

@Suite struct X24_SuppressVE {
    @Test func `an EPT entry without bit 63 is reported`() {
        var recording = TDPRecording()
        recording.install(frame: 0x102, pfn: 0x5102, entry: TDPRecording.leaf(0x5102) & ~TDPRecording.empty)
        #expect(recording.audit().brokenRules == ["X24"])
    }

    @Test func `a kernel that never sets bit 63 is not accused`() {
        var writer = EventWriter()
        for page in 0..<4 {
            writer.add(
                "kvm_mmu_set_spte: gfn 10\(page) spte 60000000510\(page)b77 (rwxu) level 1 at 70000\(page)0")
        }
        let report = writer.audit()
        #expect(report.findings.isEmpty)
        #expect(report.status("X24")?.verdict == .notCheckable)
    }
}

@Suite struct X26_AccessTracking {
    @Test(arguments: [
        (UInt64(0x8650_0000_0510_3870), false), (0x8610_0000_0510_3870, true), (0x8640_0000_0510_3870, true),
        (0x8650_0000_0510_3970, true),
    ])
    func `an access-tracked entry must be able to come back`(entry: UInt64, wrong: Bool) {
        var recording = TDPRecording()
        recording.install(frame: 0x103, pfn: 0x5103)
        recording.change("103", 1, TDPRecording.leaf(0x5103), entry)
        #expect(recording.audit().brokenRules == (wrong ? ["X26"] : []))
    }
}

@Suite struct X28_FrozenIsFinal {
    @Test func `a frozen value that is overwritten is reported`() {
        var recording = TDPRecording()
        recording.change("104", 1, TDPRecording.frozen, TDPRecording.leaf(0x5104))
        #expect(recording.audit().brokenRules == ["X28"])
    }
}

@Suite struct TDP_LegalChanges {
    @Test func `a non-present value that becomes another one is reported`() {
        var recording = TDPRecording()
        recording.change("105", 1, 0, TDPRecording.empty)
        #expect(recording.audit().brokenRules == ["change"])
    }

    @Test func `MMIO and frozen values may come from nothing`() {
        var recording = TDPRecording()
        recording.change("105", 1, TDPRecording.empty, 0x0000_0000_00fe_0006)
        recording.change("105", 1, 0x0000_0000_00fe_0006, TDPRecording.frozen)
        let report = recording.audit()
        #expect(report.findings.isEmpty)
        #expect(report.status("change")?.checks == 2)
    }
}

@Suite struct X36_ChainOfChanges {
    @Test func `a change that does not start where the last one ended is reported`() {
        var recording = TDPRecording()
        recording.change("100", 1, TDPRecording.empty, TDPRecording.leaf(0x5100))
        #expect(recording.audit().brokenRules == ["chain"])
    }

    @Test func `A, D and W may change without an event`() {
        var recording = TDPRecording()
        recording.change("100", 1, TDPRecording.leaf(0x5100) & ~0x302, TDPRecording.empty)
        #expect(recording.audit().findings.isEmpty)
    }

    @Test func `with a second root it is not checkable`() {
        var recording = TDPRecording()
        recording.writer.add("kvm_mmu_get_page: sp gen 0 gfn 0 l4 8-byte q0 direct wux nxe ad root 0 sync new")
        recording.change("100", 1, TDPRecording.empty, TDPRecording.leaf(0x5100))
        let report = recording.audit()
        #expect(report.findings.isEmpty)
        #expect(report.status("chain")?.reason?.contains("more than one root") == true)
    }

    @Test func `a split fills the table below without events`() {
        var recording = TDPRecording()
        recording.install(frame: 0x401, pfn: 0xb01)
        recording.change("400", 2, 0x8000_0000_0043_2907, TDPRecording.leaf(0xa00, level: 2))
        recording.change("401", 1, TDPRecording.leaf(0xb01), TDPRecording.frozen)
        recording.change("400", 2, TDPRecording.leaf(0xa00, level: 2), 0x8000_0000_0043_2907)
        recording.change("401", 1, TDPRecording.leaf(0xa01), TDPRecording.empty)
        #expect(recording.audit().findings.isEmpty)
    }
}
