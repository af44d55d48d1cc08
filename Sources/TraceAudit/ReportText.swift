extension AuditReport {
    /// The report for a terminal: verdict first, then each machine, the findings, the rules.
    ///
    /// `width` is the number of columns to fold findings and reasons at; `verbose` adds every slot change, every run,
    /// rules that never applied, and the events by name.
    public func render(width: Int = 100, color: Bool = false, verbose: Bool = false) -> String {
        var page = ReportPage(width: max(width, 60), color: color)
        page.verdict(self)
        for (index, machine) in machines.enumerated() { page.machine(machine, number: index + 1, verbose: verbose) }
        page.findings(self, verbose: verbose)
        page.rules(rules, verbose: verbose)
        page.names(self, verbose: verbose)
        if !notes.isEmpty {
            page.heading("Notes")
            for note in notes { page.folded("  - ", note) }
        }
        return page.text
    }
}

/// Text being laid out.
private struct ReportPage {
    private(set) var text = ""
    let width: Int
    let color: Bool

    private enum Style: String {
        case bold = "1"
        case red = "1;31"
        case green = "1;32"
        case yellow = "33"
        case dim = "2"
    }

    init(width: Int, color: Bool) {
        self.width = width
        self.color = color
    }

    private func styled(_ text: String, _ style: Style) -> String {
        color ? "\u{1b}[\(style.rawValue)m\(text)\u{1b}[0m" : text
    }

    private mutating func line(_ content: String = "") { text += content + "\n" }

    mutating func heading(_ title: String) {
        line()
        line(styled(title, .bold))
    }

    /// Breaks `content` at blanks; later lines are indented under the first.
    mutating func folded(_ prefix: String, _ content: String, plainPrefix: Int? = nil) {
        let indent = plainPrefix ?? prefix.count
        var row = prefix
        var column = indent
        var isFirst = true
        for word in content.split(separator: " ", omittingEmptySubsequences: true) {
            if !isFirst, column + 1 + word.count > width {
                line(row)
                row = String(repeating: " ", count: indent)
                column = indent
                isFirst = true
            }
            row += isFirst ? word : " " + word
            column += word.count + (isFirst ? 0 : 1)
            isFirst = false
        }
        line(row)
    }

    private mutating func row(_ label: String, _ parts: [String?]) {
        let present = parts.compactMap { $0 }
        guard !present.isEmpty else { return }
        folded("  " + pad(label, 15), present.joined(separator: ", "))
    }

    private func pad(_ text: String, _ width: Int) -> String {
        text.count >= width ? text + " " : text + String(repeating: " ", count: width - text.count)
    }

    private func right(_ text: String, _ width: Int) -> String {
        String(repeating: " ", count: max(0, width - text.count)) + text
    }

    private func number(_ value: UInt64) -> String {
        let digits = String(value)
        var grouped = ""
        for (offset, digit) in digits.enumerated() {
            if offset > 0, (digits.count - offset) % 3 == 0 { grouped += "," }
            grouped.append(digit)
        }
        return grouped
    }

    /// `what` is `singular|plural`, or one form for both; nothing for 0.
    private func some(_ value: UInt64, _ what: String) -> String? {
        let forms = what.split(separator: "|")
        guard value > 0, let form = value == 1 ? forms.first : forms.last else { return nil }
        return "\(number(value)) \(form)"
    }

    private func bytes(_ value: UInt64) -> String {
        for (shift, unit) in [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")] as [(UInt64, String)]
        where value >= 1 << shift && value % (1 << shift) == 0 { return "\(value >> shift) \(unit)" }
        return "\(value) bytes"
    }

    // MARK: parts

    mutating func verdict(_ report: AuditReport) {
        let broken = report.rules.filter { $0.verdict == .violated }
        let checks = report.rules.reduce(UInt64(0)) { $0 + $1.checks }
        let violations = report.rules.reduce(UInt64(0)) { $0 + $1.violations }
        switch report.verdict {
        case .clean:
            let held = report.rules.count { $0.verdict == .held }
            line(styled("CLEAN", .green) + "  no rule is broken: \(number(checks)) checks of \(held) rules")
        case .violated:
            let names = broken.map(\.id).joined(separator: ", ")
            line(styled("VIOLATED", .red) + "  \(some(violations, "finding|findings") ?? "") against \(names)")
        case .nothingToCheck:
            line(styled("NOTHING TO CHECK", .yellow) + "  no rule applies to what is in the recording")
        }
        var span = ""
        if let first = report.firstTime, let last = report.lastTime { span = ", from \(first) s to \(last) s" }
        folded("", "\(report.file): \(number(report.lines)) lines, \(number(report.events)) events\(span)")
        if let format = report.entryFormat { line("entries in the \(format.rawValue) format") }
        if let first = report.firstMalformedLine {
            line(styled("\(number(report.malformedLines)) malformed lines, the first is line \(first)", .yellow))
        }
        if let first = report.firstLossAtLine {
            line(styled("\(number(report.lostEvents)) events were lost, first before line \(first)", .yellow))
        }
    }

    mutating func machine(_ machine: MachineReport, number index: Int, verbose: Bool) {
        let owner = machine.process.map { "process \($0)" } ?? "all threads"
        let kind =
            switch machine.kind {
            case .tdp: "TDP"
            case .shadow: "shadow paging"
            case .unknown: "MMU kind unknown"
            }
        heading("VM \(index): \(machine.command), \(owner), \(kind)")
        row("told from", [machine.kindReason])
        row(
            "threads",
            [
                machine.threads.prefix(8).map { String($0) }.joined(separator: " ")
                    + (machine.threads.count > 8 ? " ..." : "")
            ])
        slots(machine, verbose: verbose)
        runs(machine, verbose: verbose)
        row(
            "faults",
            [
                some(machine.faults.pageFaults, "page fault|page faults"),
                some(machine.faults.fastFixed, "fixed without lock"),
                some(machine.faults.fastSpurious, "fast spurious"), some(machine.faults.fastOther, "other fast"),
                some(machine.faults.walksRead, "read walk|read walks"),
                some(machine.faults.walksWrite, "write walk|write walks"),
                some(machine.faults.walksFetch, "fetch walk|fetch walks"),
                some(machine.faults.requests, "entry requested|entries requested"),
                some(machine.faults.emulated, "instruction emulated|instructions emulated"),
            ])
        entries(machine)
        row(
            "notifier",
            [
                some(machine.notifier.unmapRanges, "unmap range|unmap ranges"),
                some(machine.notifier.unmappedPages, "page|pages"),
                some(machine.notifier.rangesInSlots, "of them in marked slots"),
                some(machine.notifier.guestFrames, "guest frame|guest frames"),
                some(machine.notifier.ageRanges, "ageing"),
            ])
        row(
            "zaps",
            [
                some(machine.zaps.fastZaps, "of everything"),
                some(machine.zaps.splits, "huge entry split|huge entries split"),
            ]
                + machine.zaps.tables.map { some($0.count, "level-\($0.level) table|level-\($0.level) tables") }
                + machine.zaps.leaves.map { some($0.count, "level-\($0.level) leaf|level-\($0.level) leaves") })
        row(
            "tables",
            [
                some(machine.zaps.newTables, "new"), some(machine.zaps.foundTables, "found again"),
                some(machine.zaps.unsynced, "unsynced"), some(machine.zaps.synced, "synced"),
                some(machine.zaps.changes, "TDP entry change|TDP entry changes"),
            ])
        row("also", machine.otherEvents.map { "\(number($0.count)) \($0.name)" })
    }

    private mutating func slots(_ machine: MachineReport, verbose: Bool) {
        guard machine.slotChangeCount > 0 else {
            row("memslots", ["no marks"])
            return
        }
        let shown = verbose ? machine.slotChanges : Array(machine.slotChanges.prefix(6))
        var label = "memslots"
        for slot in shown {
            let what =
                slot.size == 0
                ? "deleted" : "\(slot.guestAddress) \(bytes(slot.size)) at \(slot.hostAddress)"
            let logging = slot.flags & 1 != 0 ? ", dirty log" : ""
            let readOnly = slot.flags & 2 != 0 ? ", read-only" : ""
            row(label, ["slot \(slot.slot): \(what)\(logging)\(readOnly) (line \(slot.line))"])
            label = ""
        }
        more(machine.slotChangeCount, shown.count)
    }

    private mutating func runs(_ machine: MachineReport, verbose: Bool) {
        guard machine.runCount > 0 else { return }
        let shown = verbose ? machine.runs : Array(machine.runs.prefix(8))
        var label = "guest runs"
        for run in shown {
            let verb = run.operation == "r" ? "read" : run.operation == "w" ? "write" : "locked add"
            let outcome =
                run.result == 0 && run.exit == 2 ? "ok" : "returned \(run.result), exit \(run.exit)"
            row(
                label,
                [
                    "vcpu \(run.vcpu) \(some(run.count, "\(verb)|\(verb)s") ?? "nothing") from \(run.guestAddress) every \(hex(run.stride)): "
                        + "\(outcome) (line \(run.line))"
                ])
            label = ""
        }
        more(machine.runCount, shown.count)
        if machine.dirtyLogReads > 0 {
            row("dirty log", ["\(number(machine.dirtyLogReads)) reads, \(number(machine.dirtyPages)) pages reported"])
        }
    }

    private mutating func more(_ total: UInt64, _ shown: Int) {
        if total > UInt64(shown) { row("", ["and \(number(total - UInt64(shown))) more"]) }
    }

    private mutating func entries(_ machine: MachineReport) {
        let sizes = ["", "4K", "2M", "1G", "512G", "256T"]
        var label = "entries set"
        for level in 1...5 {
            let counts = machine.entries.filter { $0.level == level }
            guard !counts.isEmpty else { continue }
            row(
                label,
                [
                    "\(sizes[level]): "
                        + counts.map { "\(number($0.count)) \($0.permissions)" }.joined(separator: ", ")
                ])
            label = ""
        }
        if machine.prefetched > 0 { row("", ["\(number(machine.prefetched)) of them prefetched"]) }
    }

    mutating func findings(_ report: AuditReport, verbose: Bool) {
        guard !report.findings.isEmpty else { return }
        heading("Findings")
        let shown = verbose ? report.findings : Array(report.findings.prefix(20))
        for finding in shown {
            let place = "line \(finding.line)"
            let plain = "  \(pad(finding.rule, 11))\(pad(place, 13))"
            folded(
                "  " + styled(pad(finding.rule, 11), .red) + pad(place, 13), finding.text + " [\(finding.time) s]",
                plainPrefix: plain.count)
        }
        let total = report.rules.reduce(UInt64(0)) { $0 + $1.violations }
        if total > UInt64(shown.count) { line("  and \(number(total - UInt64(shown.count))) more") }
    }

    mutating func rules(_ rules: [RuleStatus], verbose: Bool) {
        heading("Rules")
        var silent = 0
        for rule in rules {
            if rule.verdict == .notCheckable, rule.notCheckable == 0, !verbose {
                silent += 1
                continue
            }
            var what = rule.statement
            let verdict: String
            let style: Style
            switch rule.verdict {
            case .held: (verdict, style) = ("ok \(number(rule.checks))", .green)
            case .violated: (verdict, style) = ("VIOLATED \(number(rule.violations))", .red)
            case .notCheckable: (verdict, style) = ("not checkable", .yellow)
            }
            if rule.notCheckable > 0 {
                what += " (not checkable \(number(rule.notCheckable)) times: \(rule.reason ?? ""))"
            } else if rule.verdict == .notCheckable {
                what += " (\(rule.reason ?? ""))"
            }
            let plain = "  \(pad(rule.id, 11))\(pad(verdict, 15))"
            folded("  \(pad(rule.id, 11))" + styled(pad(verdict, 15), style), what, plainPrefix: plain.count)
        }
        if silent > 0 { line(styled("  \(silent) more rules are about events that the recording does not have", .dim)) }
    }

    mutating func names(_ report: AuditReport, verbose: Bool) {
        if verbose, !report.understood.isEmpty {
            heading("Events understood")
            for event in report.understood { name(event) }
        }
        guard !report.unknown.isEmpty else { return }
        heading("Events not understood, only counted")
        if verbose {
            for event in report.unknown { name(event) }
        } else {
            folded("  ", report.unknown.map { "\($0.name) \(number($0.count))" }.joined(separator: ", "))
        }
    }

    private mutating func name(_ event: EventCount) {
        let damaged = event.malformed > 0 ? ", \(number(event.malformed)) malformed" : ""
        line("  " + right(number(event.count), 12) + "  \(event.name)\(damaged)")
    }
}
