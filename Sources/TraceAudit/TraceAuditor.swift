import Glibc

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

    /// The beginning of a line whose end has not come yet.
    private var carry: [UInt8] = []
    /// Inside a line that is longer than the limit.
    private var skippingLine = false

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

    public init() {}

    /// Takes the next bytes of the recording.
    public func feed(_ bytes: UnsafeRawBufferPointer) {
        guard var position = bytes.bindMemory(to: UInt8.self).baseAddress else { return }
        let end = position + bytes.count
        while position != end {
            guard let newline = memchr(position, 0x0a, end - position) else { break }
            let stop = UnsafePointer(newline.assumingMemoryBound(to: UInt8.self))
            if skippingLine {
                skippingLine = false
            } else if carry.isEmpty {
                take(ByteCursor(position, stop))
            } else if carry.count + (stop - position) <= TraceAuditLimits.lineBytes {
                carry.append(contentsOf: UnsafeBufferPointer(start: position, count: stop - position))
                takeCarry()
            } else {
                carry = []
                countOverlong()
            }
            position = stop + 1
        }
        keep(position, end)
    }

    /// Takes bytes from an array: for small inputs and tests.
    public func feed(_ bytes: [UInt8]) { bytes.withUnsafeBytes { feed($0) } }

    private func keep(_ position: UnsafePointer<UInt8>, _ end: UnsafePointer<UInt8>) {
        guard position != end, !skippingLine else { return }
        if carry.count + (end - position) > TraceAuditLimits.lineBytes {
            carry = []
            skippingLine = true
            countOverlong()
            return
        }
        carry.append(contentsOf: UnsafeBufferPointer(start: position, count: end - position))
    }

    private func takeCarry() {
        carry.withUnsafeBufferPointer { bytes in
            guard let base = bytes.baseAddress else { return }
            take(ByteCursor(base, base + bytes.count))
        }
        carry.removeAll(keepingCapacity: true)
    }

    private func countOverlong() {
        line += 1
        countMalformed()
    }

    private func countMalformed() {
        malformed += 1
        if firstMalformed == nil { firstMalformed = line }
    }

    private func take(_ bytes: ByteCursor) {
        line += 1
        var end = bytes.end
        while end > bytes.position, (end - 1).pointee == 0x0d { end -= 1 }
        let text = ByteCursor(bytes.position, end)
        guard let first = text.next else { return }
        if first == UInt8(ascii: "#") { return header(text) }
        guard let event = RecordingLine(text) else { return other(text) }
        handle(event)
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

    /// Blank lines, notices of lost events, and whatever is malformed.
    private func other(_ text: ByteCursor) {
        var cursor = text
        cursor.skipSpaces()
        if cursor.isAtEnd || cursor.starts(with: "cpus=") || cursor.starts(with: "version = ") { return }
        if cursor.starts(with: "CPU:"), let notice = cursor.upTo("["), notice.count < 16 {
            let bracketed = cursor
            if cursor.skip("LOST ") || (cursor.decimal() != nil && cursor.skip(" EVENTS DROPPED")) {
                var number = bracketed
                _ = number.skip("LOST ")
                recording.note("line \(line): events were lost")
                lose(number.decimal() ?? 1)
                return
            }
        }
        countMalformed()
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
        guard let name = names.count(event.event), let kind = names.kind(name) else { return }
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
        if !carry.isEmpty { takeCarry() }
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
