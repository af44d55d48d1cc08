/// Audits a recording piece by piece: ``feed(_:)`` takes bytes in any portions, ``finish(file:)`` gives the report.
///
/// Not thread-safe; one recording, one auditor.
public final class TraceAuditor {
    private let recording = RecordingState()
    private var names = EventNames()
    private var machines: [MachineAudit] = []
    private var machineOfProcess: [UInt32: Int] = [:]
    private var threads: [TracedThread] = []
    private var threadIndex: [UInt32: Int] = [:]
    private var commands: [String] = []
    private var lastThread: (id: UInt32, index: Int)?

    private var splitter = LineSplitter()
    private var line: UInt64 = 0
    private var events: UInt64 = 0
    private var malformed: UInt64 = 0
    private var firstMalformed: UInt64?
    private var lost: UInt64 = 0
    private var firstLoss: UInt64?
    /// Machines that appear later in the same recording miss events too.
    private var lossInThisRecording: UInt64?
    private var firstTime: UInt64?
    private var lastTime: UInt64 = 0
    private var hasProcessColumn = false
    private var restarts: UInt64 = 0
    private var firstRestart: UInt64?

    private let follower: (any RecordingFollower)?

    public convenience init() { self.init(follower: nil) }

    /// `follower` hears of each event, after the rules.
    package init(follower: (any RecordingFollower)?) { self.follower = follower }

    /// Takes the next bytes of the recording.
    public func feed(_ bytes: UnsafeRawBufferPointer) { splitter.feed(bytes) { take($0) } }

    /// Takes bytes from an array: for small inputs and tests.
    public func feed(_ bytes: [UInt8]) { bytes.withUnsafeBytes { feed($0) } }

    /// Adds to the report what whoever read the file has to say of it.
    func note(_ text: String) { recording.note(text) }

    private func countMalformed() {
        malformed += 1
        if firstMalformed == nil { firstMalformed = line }
    }

    private func take(_ item: LineSplitter.Line) {
        line += 1
        switch item {
        case .overlong: countMalformed()
        case .bytes(let bytes):
            guard let base = bytes.baseAddress, let first = bytes.first else { return }
            let text = ByteCursor(base, base + bytes.count)
            if first == UInt8(ascii: "#") { return header(text) }
            guard let event = RecordingLine(text) else { return other(text) }
            handle(event)
        }
    }

    // MARK: lines that are no events

    private func header(_ text: ByteCursor) {
        var cursor = text
        if cursor.starts(with: "# tracer:") {
            if events > 0 {
                restart()
            }
        } else if cursor.skip("# entries-in-buffer/entries-written: "), let kept = cursor.decimal(), cursor.skip("/"),
            let written = cursor.decimal(), written > kept
        {
            recording.note(
                "line \(line): the ring buffer kept \(kept) of \(written) events; the beginning is missing")
            lose(written - kept)
        }
    }

    /// Blank lines, call chains, notices of lost events, and whatever is malformed.
    private func other(_ text: ByteCursor) {
        var cursor = text
        cursor.skipSpaces()
        if cursor.isAtEnd || cursor.starts(with: "cpus=") || cursor.starts(with: "version = ") { return }
        if text.isCallChain { return }
        guard let count = LossNotice.count(cursor) else { return countMalformed() }
        recording.note("line \(line): events were lost")
        lose(count)
    }

    private func lose(_ count: UInt64) {
        lost = lost.addingReportingOverflow(count).overflow ? .max : lost + count
        if firstLoss == nil { firstLoss = line }
        lossInThisRecording = line
        for machine in machines { machine.loseEvents(at: line) }
        forgetRequests()
    }

    /// Another recording begins in the same file: a second header, or a clock that goes back by more than a second.
    private func restart() {
        restarts += 1
        lossInThisRecording = nil
        if firstRestart == nil { firstRestart = line }
        lastTime = 0
        for machine in machines { machine.restart() }
        forgetRequests()
        follower?.restart()
    }

    private func forgetRequests() {
        for index in threads.indices {
            threads[index].request = nil
            threads[index].run = nil
            threads[index].linked = false
        }
    }

    // MARK: events

    private func handle(_ event: RecordingLine) {
        events += 1
        if firstTime == nil { firstTime = event.time }
        if event.time + 1_000_000_000 < lastTime {
            restart()
        }
        lastTime = event.time
        guard let name = names.count(event.event), let kind = names.kind(name) else {
            follower?.pass(event.event.text, thread: event.thread, time: event.time)
            return
        }
        guard let body = EventBody.parse(kind, event.body) else {
            names.countMalformed(name)
            countMalformed()
            return
        }
        guard let index = thread(event) else {
            recording.note("line \(line): more than \(TraceAuditLimits.tasks) threads; the rest is only counted")
            return
        }
        let machine = machines[threads[index].machine]
        if machine.tally.events == 0 { machine.tally.firstLine = line }
        machine.tally.events += 1
        machine.tally.lastLine = line
        let moment = Moment(line: line, time: event.time, machine: machine.index)
        // What an interrupt writes says nothing about where its victim is.
        if event.inInterrupt {
            var interrupt = TracedThread(id: .max, process: nil, machine: machine.index)
            interrupt.linked = true
            machine.handle(body, thread: &interrupt, at: moment)
        } else {
            machine.handle(body, thread: &threads[index], at: moment)
        }
        if machines.count > 1 { spread(body, from: machine, at: moment) }
        follower?.follow(
            RecordedEvent(
                time: event.time, thread: event.thread, process: event.process, command: commands[index],
                machine: machine.index, inInterrupt: event.inInterrupt, body: body))
    }

    /// Host memory is shared between processes: a range that one of them (or kswapd) unmaps may be guest memory of
    /// another. It then excuses what it might have zapped, and proves nothing.
    private func spread(_ body: EventBody, from machine: MachineAudit, at moment: Moment) {
        switch body {
        case .unmapRange(let range):
            for other in machines where other !== machine { other.foreignUnmap(range) }
        case .table(.zapTable, _) where !machine.isMachine:
            for other in machines where other !== machine {
                other.history.makeUnknown(before: MachineAudit.short(moment.line))
            }
        default: break
        }
    }

    private func thread(_ event: RecordingLine) -> Int? {
        if let lastThread, lastThread.id == event.thread, !event.hasProcessColumn { return lastThread.index }
        if event.hasProcessColumn { hasProcessColumn = true }
        if let index = threadIndex[event.thread] {
            if let process = event.process, threads[index].process != process {
                threads[index].process = process
                threads[index].machine = machine(of: process)
            }
            lastThread = (event.thread, index)
            return index
        }
        guard threads.count < TraceAuditLimits.tasks else { return nil }
        let index = threads.count
        threads.append(TracedThread(id: event.thread, process: event.process, machine: machine(of: event.process)))
        commands.append(event.command.text)
        threadIndex[event.thread] = index
        lastThread = (event.thread, index)
        return index
    }

    private func machine(of process: UInt32?) -> Int {
        let key = process ?? 0
        if let index = machineOfProcess[key] { return index }
        guard machines.count < TraceAuditLimits.machines else {
            recording.note(
                "line \(line): more than \(TraceAuditLimits.machines) processes; the last section has the rest")
            machines[machines.count - 1].conflated = true
            return machines.count - 1
        }
        machines.append(MachineAudit(index: machines.count, process: process, recording: recording))
        machines[machines.count - 1].eventsLostAt = lossInThisRecording
        machineOfProcess[key] = machines.count - 1
        return machines.count - 1
    }

    // MARK: the report

    /// Takes an unfinished last line, settles what had to wait for the end, and reports.
    public func finish(file: String) -> AuditReport {
        splitter.finish { take($0) }
        recording.rules.settle(
            hasNotifierEvents: recording.hasNotifierEvents, hasEmulationEvents: recording.hasEmulationEvents)
        addClosingNotes()
        let statuses = recording.rules.statuses()
        let violated = statuses.contains { $0.violations > 0 }
        let checked = statuses.contains { $0.checks > 0 }
        return AuditReport(
            file: file, verdict: violated ? .violated : checked ? .clean : .nothingToCheck, lines: line,
            events: events, malformedLines: malformed, firstMalformedLine: firstMalformed, lostEvents: lost,
            firstLossAtLine: firstLoss, firstTime: firstTime.map(Timestamp.text),
            lastTime: firstTime == nil ? nil : Timestamp.text(lastTime), entryFormat: recording.format.decided,
            machines: machineReports(), findings: recording.rules.findings, rules: statuses,
            understood: names.counts(understood: true), unknown: names.counts(understood: false),
            notes: recording.notes)
    }

    private func machineReports() -> [MachineReport] {
        machines.map { machine in
            let members = threads.indices.filter { threads[$0].machine == machine.index }
            return machine.report(
                threads: members.prefix(TraceAuditLimits.listed).map { threads[$0].id }.sorted(),
                command: members.first.map { commands[$0] } ?? "")
        }
    }

    private func addClosingNotes() {
        if line == 0 {
            recording.note("the recording is empty")
        } else if events == 0 {
            recording.note("the recording has no event; is it ftrace text?")
        } else if machines.isEmpty {
            recording.note("the recording has none of KVM's MMU events")
        } else if !hasProcessColumn {
            recording.note(
                "no process ids in the recording (trace option record-tgid): all threads are reported as one section")
        }
        if let firstRestart {
            recording.note(
                "the file holds \(restarts + 1) recordings, the second from line \(firstRestart); what is known starts "
                    + "anew with each")
        }
        if machines.contains(where: { $0.history.isIncomplete }) {
            recording.note("more entries than the auditor remembers: rules on their history cover the first ones")
        }
        if recording.format.isMixed {
            recording.note("entries of both formats: the rarer ones are judged by the more frequent format")
        }
        if names.overflow > 0 {
            recording.note("\(names.overflow) events have further names that are not listed")
        }
    }
}
