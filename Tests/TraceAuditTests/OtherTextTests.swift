import Testing

@testable import TraceAudit

/// A recording's lines as `perf script` prints them.
struct PerfText {
    var lines: [String] = []
    /// `pid/tid`, as with `-F comm,pid,tid,cpu,time,event,trace`; else the thread only, the default.
    var hasProcess: Bool

    /// `process` is whose threads they are; perf knows it even where ftrace did not record it.
    init(_ recording: Recording, hasProcess: Bool, process: Int = 4711) {
        self.hasProcess = hasProcess
        for line in recording.lines where !line.hasPrefix("#") {
            guard let bracket = line.firstRange(of: "["), let colon = line.firstRange(of: ": "),
                let dash = line[..<bracket.lowerBound].lastIndex(of: "-")
            else { continue }
            let command = line[..<dash].drop { $0 == " " }
            let thread = line[line.index(after: dash)..<bracket.lowerBound].prefix { $0 != " " }
            let columns = line[bracket.lowerBound..<colon.lowerBound].split(separator: " ")
            let event = line[colon.upperBound...]
            let system =
                event.hasPrefix("tracing_mark_write") ? "ftrace" : event.hasPrefix("kvm_mmu") ? "kvmmmu" : "kvm"
            let task = hasProcess ? "\(process)/\(thread)" : "\(thread)"
            lines.append(
                "\(String(repeating: " ", count: max(0, 16 - command.count)))\(command) \(task) \(columns[0])"
                    + " \(columns.last ?? ""): \(system):\(event)")
        }
    }

    var text: String { lines.joined(separator: "\n") + "\n" }
    func audit() -> AuditReport { Recording.audit(Array(text.utf8)) }
}

@Suite struct PerfScriptText {
    private static let name = "dontneed"

    /// But for line numbers, which a header moves, and what perf does not print.
    private func expectSame(_ left: AuditReport, _ right: AuditReport) throws {
        #expect(left.verdict == right.verdict)
        #expect(left.findings == right.findings)
        #expect(left.events == right.events)
        #expect(left.malformedLines == 0 && right.malformedLines == 0)
        #expect(left.understood == right.understood && left.unknown == right.unknown)
        #expect(left.entryFormat == right.entryFormat)
        #expect(left.firstTime == right.firstTime && left.lastTime == right.lastTime)
        #expect(left.rules == right.rules)
        let (one, other) = try (#require(left.machines.first), #require(right.machines.first))
        #expect(one.threads == other.threads)
        #expect(one.command == other.command)
        #expect(one.entries == other.entries && one.faults == other.faults)
        #expect(one.zaps == other.zaps && one.notifier == other.notifier)
        #expect(one.runCount == other.runCount && one.prefetched == other.prefetched)
    }

    @Test(.enabled(if: Recordings.isThere(name), "xz is needed"), arguments: [false, true])
    func `a recording in perf's layout gives the same report`(hasProcess: Bool) throws {
        let recording = Recordings.load(Self.name)
        let report = PerfText(recording, hasProcess: hasProcess).audit()
        try expectSame(report, recording.audit())
        #expect(report.machines.first?.process == (hasProcess ? 4711 : nil))
    }

    @Test(.enabled(if: Recordings.isThere(name), "xz is needed"))
    func `a broken rule is found in perf's layout too`() throws {
        var recording = Recordings.load(Self.name)
        let index = try recording.index(of: "kvm_mmu_set_spte", "(rwxu)")
        recording.replace("(rwxu)", with: "(r-xu)", at: index)
        let report = PerfText(recording, hasProcess: true).audit()
        #expect(!report.findings.isEmpty)
        #expect(report.brokenRules == recording.audit().brokenRules)
    }

    /// As perf 6.1 printed them.
    @Test(
        arguments: [
            ("            perf 30141 [000] 72121.142236: kvm:kvm_fpu: load", "perf", 30141, nil),
            ("            perf 30141/30142 [000] 72121.142236707: kvm:kvm_fpu: load", "perf", 30142, 30141),
            ("     migration/0    18/18    [000] 72121.142250: kvm:kvm_fpu: load", "migration/0", 18, 18),
            ("         swapper     0/0     [000] 72121.142349: kvm:kvm_fpu: load", "swapper", 0, 0),
            (" memfd:sealed-91 28264 [000] 72121.164517: kvm:kvm_fpu: load", "memfd:sealed-91", 28264, nil),
            ("CPU 0/KVM 77/78 [001] 1.000000: kvm:kvm_fpu: load", "CPU 0/KVM", 78, 77),
            ("sleep  3712 [000] 72440.423847: kvm:kvm_fpu: load", "sleep", 3712, nil),
        ] as [(String, String, UInt32, UInt32?)])
    func `perf's columns are read`(line: String, command: String, thread: UInt32, process: UInt32?) throws {
        try Array(line.utf8).withUnsafeBufferPointer { bytes in
            let base = try #require(bytes.baseAddress)
            let read = try #require(RecordingLine(ByteCursor(base, base + bytes.count)))
            #expect(read.command.text == command)
            #expect(read.thread == thread)
            #expect(read.process == process)
            #expect(read.hasProcessColumn == (process != nil))
            #expect(read.event.text == "kvm_fpu")
            #expect(read.body.text == "load")
        }
    }

    @Test(arguments: [
        "vmm 1/ [000] 1.0: a: b", "vmm /2 [000] 1.0: a: b", "vmm 1/2/3x [000] 1.0: a: b", "1/2 [000] 1.0: a:",
    ])
    func `columns that are nobody's are malformed`(line: String) {
        #expect(Recording.audit(Array((line + "\n").utf8)).malformedLines == 1)
    }

    @Test func `call chains are no malformed lines, and lost events are lost`() {
        let text = """
            vmm 10/11 [000] 5.000001: kvmmmu:kvm_mmu_spte_requested: gfn 1 pfn 2 level 1
            \tffffffff82265488 __schedule+0x628 ([kernel.kallsyms])
            \t           cf503 clock_nanosleep@GLIBC_2.2.5+0x23 (/usr/lib/libc.so.6)

            vmm 10/11 [000] 5.000002: PERF_RECORD_LOST lost 1784

            """
        let report = Recording.audit(Array(text.utf8))
        #expect(report.events == 1)
        #expect(report.malformedLines == 0)
        #expect(report.lostEvents == 1784)
        #expect(report.firstLossAtLine == 5)
    }
}

@Suite struct TraceCommandText {
    @Test func `the name of an instance is not part of a command`() {
        let text = """
            cpus=2
            probe:             scen-17928 [001]  2016.806885619: kvm_mmu_spte_requested: gfn 1 pfn 2 level 1
            probe: CPU:1 [7 EVENTS DROPPED]
            CPU:0 [LOST 2 EVENTS]

            """
        let report = Recording.audit(Array(text.utf8))
        #expect(report.machines.first?.command == "scen")
        #expect(report.malformedLines == 0)
        #expect(report.lostEvents == 9)
    }

    /// Every shadow page that can be printed, in the kernel's text and in the two of libtraceevent.
    @Test func `shadow pages are read alike in three texts`() throws {
        let access = ["---", "--x", "w--", "w-x", "-u-", "-ux", "wu-", "wux"]
        for role in 0..<(1 << 12) where (1...5).contains(role & 0xf) {
            let (level, quadrant, letters) = (role & 0xf, role >> 5 & 3, access[role >> 8 & 7])
            let direct = role >> 7 & 1 != 0 ? " direct" : ""
            let invalid = role >> 11 & 1 != 0 ? " invalid" : ""
            let isSmall = role >> 4 & 1 != 0
            let unsync = role % 3 == 0
            let created = role % 2 == 0
            let sync = unsync ? "unsync" : "sync"
            let kernel =
                "sp gen 0 gfn e0010 l\(level) \(isSmall ? 4 : 8)-byte q\(quadrant)\(direct) \(letters)\(invalid) nxe ad"
                + " root 3 \(sync) \(created ? "new" : "existing")"
            let plugin =
                "\(created ? "new" : "existing") sp gfn e0010 \(level) q\(quadrant)\(direct) \(letters)\(invalid)"
                + " \(isSmall ? "" : "!")pae !nxe wp smep root 3 \(sync)"
            let fields =
                "[FAILED TO PARSE] mmu_valid_gen=0 gfn=917520 role=\(role) root_count=3 unsync=\(unsync ? 1 : 0)"
                + " created=\(created ? 1 : 0)"
            let expected = try #require(body(.getTable, kernel))
            #expect(body(.getTable, plugin) == expected, "\(plugin)")
            #expect(body(.getTable, fields) == expected, "\(fields)")
            let ended = fields.replacing(" created=\(created ? 1 : 0)", with: "")
            #expect(body(.zapTable, ended) == body(.zapTable, String(kernel.dropLast(created ? 4 : 9))))
        }
    }

    private func body(_ kind: EventKind, _ text: String) -> EventBody? {
        Array(text.utf8).withUnsafeBufferPointer { bytes in
            bytes.baseAddress.flatMap { EventBody.parse(kind, ByteCursor($0, $0 + bytes.count)) }
        }
    }

    @Test(arguments: [
        "new sp gfn e0010", "new sp gfn e0010 9 q0 wux !pae nxe wp root 0 sync", "1 q0", "0 q0 wux !pae root 0 sync",
        "[FAILED TO PARSE] gfn=1 role=0 root_count=0 unsync=0", "[FAILED TO PARSE] gfn=1",
        "gfn=1 role=3 root_count=x unsync=0",
    ])
    func `damaged texts are malformed`(text: String) {
        #expect(body(.zapTable, text) == nil)
        #expect(body(.getTable, text) == nil)
    }

    @Test(.enabled(if: Recordings.isThere("thp"), "xz is needed"))
    func `a plugin that hides which page ended makes nothing a finding`() throws {
        var recording = Recordings.load("thp")
        for index in recording.lines.indices where recording.lines[index].contains("kvm_mmu_prepare_zap_page: ") {
            let start = try #require(recording.lines[index].firstRange(of: "kvm_mmu_prepare_zap_page: "))
            recording.lines[index].replaceSubrange(
                start.upperBound..., with: "1 q0 direct wux !pae nxe wp root 0 sync")
        }
        let report = recording.audit()
        #expect(report.findings.isEmpty)
        #expect(report.malformedLines == 0)
        #expect(report.lostEvents == 0)
        #expect(report.notes.contains { $0.contains("without its guest frame") })
    }

    /// The shadow page of a guest table ends, and then the table may be written again. Spec: x86 X48.
    @Test(arguments: [
        ("", ["X48"]), ("kvm_mmu_prepare_zap_page: sp gen 0 gfn 5 l1 8-byte q0 wux nxe ad root 0 sync", []),
        ("kvm_mmu_prepare_zap_page: [FAILED TO PARSE] mmu_valid_gen=0 gfn=5 role=1793 root_count=0 unsync=0", []),
        ("kvm_mmu_prepare_zap_page: 1 q0 wux !pae nxe wp root 0 sync", []),
    ])
    func `the end of a shadow page is known in each text`(end: String, broken: [String]) {
        var writer = EventWriter()
        writer.add("kvm_mmu_get_page: sp gen 0 gfn 5 l1 8-byte q0 wux nxe ad root 0 sync new")
        if !end.isEmpty { writer.add(end) }
        writer.add("kvm_mmu_set_spte: gfn 5 spte 7e67 (rwxu) level 1 at 1000")
        let report = writer.audit()
        #expect(report.malformedLines == 0)
        #expect(report.brokenRules == broken)
    }
}
