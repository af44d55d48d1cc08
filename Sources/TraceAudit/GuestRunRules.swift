/// The rules that need the marks of the program that drove KVM: what the guest really did, and where its memory is.
/// Spec: generic I-6; x86 X11, X43.
extension MachineAudit {
    /// Pages of one run that are looked at.
    private static let pagesPerRun: UInt64 = 1 << 20

    func mark(_ mark: ProbeMark, thread: inout TracedThread, at moment: Moment) {
        closeWindows(of: thread.id, at: moment)
        guard mark != .other else {
            tally.otherMarks += 1
            return
        }
        tally.marks += 1
        switch mark {
        case .scenario: begin(thread: thread)
        case .phase(_, let closes): if closes { closed = true }
        case .setRegion(let request): setRegion(request, thread: thread, at: moment)
        case .setRegionResult(let result): setRegionResult(result, thread: thread, at: moment)
        case .guest(let run):
            thread.run = MarkedRun(run: run, startLine: moment.line, startTime: moment.time)
        case .guestDone(_, let result, let exit): finishRun(thread: &thread, result: result, exit: exit, at: moment)
        case .getDirtyLog(let slot): dirtyLogRead = (slot, moment.line)
        case .getDirtyLogResult(let result, let dirty): readDirtyLog(result: result, dirty: dirty, at: moment)
        case .action, .line, .other: break
        }
        thread.linked = true
    }

    private func begin(thread: TracedThread) {
        if !slots.isEmpty, !closed, !thread.linked, process == nil { conflated = true }
        let lost = eventsLostAt
        restart()
        eventsLostAt = lost
        seenFromStart = true
        tally.scenarios += 1
    }

    private func setRegion(_ request: SlotRequest, thread: TracedThread, at moment: Moment) {
        slotChange = (request, thread.id, moment.line)
        guard let old = slots.slot(id: request.slot) else { return }
        if let new = MarkedSlot(request), new.hasSamePlace(as: old) { return }
        openWindow(.slotChange, thread: thread.id, frames: [old.frames], at: moment)
    }

    private func setRegionResult(_ result: Int64, thread: TracedThread, at moment: Moment) {
        guard let change = slotChange, change.thread == thread.id else { return }
        slotChange = nil
        closeSlotChange(of: thread.id, at: moment, succeeded: result == 0)
        guard result == 0 else {
            tally.failedSlotChanges += 1
            return
        }
        var new = MarkedSlot(change.request)
        let old = slots.slot(id: change.request.slot)
        if new?.isLogged == true {
            new?.loggedSince = old?.isLogged == true ? old?.loggedSince : moment.line
            new?.loggedRuns = old?.isLogged == true ? old?.loggedRuns ?? [] : []
        }
        slots.replace(id: change.request.slot, with: new)
        tally.slotChange(change.request, line: change.line)
    }

    // MARK: guest runs

    private func finishRun(thread: inout TracedThread, result: Int64, exit: Int64, at moment: Moment) {
        guard let run = thread.run else { return }
        thread.run = nil
        // Exit 2 is KVM_EXIT_IO, the guest's way to say that it is through.
        let succeeded = result == 0 && exit == 2
        tally.run(run.run, line: run.startLine, result: result, exit: exit)
        guard succeeded else { return }
        if let why = whyNotCheckable(run) {
            rules.skip(.guestAccess, why)
        } else {
            checkAccesses(run, at: moment)
        }
        // A run that is left out makes the dirty log's lower bound smaller, never wrong.
        let size = min(run.run.count, Self.pagesPerRun)
        if run.run.writes, slots.hasLog, size <= recording.guestPages {
            recording.guestPages -= size
            log(run, doneLine: moment.line)
        }
    }

    private func whyNotCheckable(_ run: MarkedRun) -> String? {
        if let why = why(.guestAccess) { return why }
        if !seenFromStart { return "the recording does not begin with the machine: entries may be older" }
        if history.isIncomplete { return "too many entries to remember" }
        if min(run.run.count, Self.pagesPerRun) > recording.guestPages {
            return "the marked runs touch more pages than the auditor looks at"
        }
        if run.emulated { return "an instruction of the run was emulated: it may have needed no entry" }
        return nil
    }

    private func checkAccesses(_ run: MarkedRun, at moment: Moment) {
        recording.guestPages -= min(run.run.count, Self.pagesPerRun)
        let start = Self.short(run.startLine)
        var firstBad: UInt64?
        var bad: UInt64 = 0
        var looked: UInt64 = 0
        forEachFrame(of: run.run) { frame in
            guard slots.slot(holding: frame) != nil else { return }
            looked += 1
            if isAllowed(frame, write: run.run.writes, since: start) { return }
            bad += 1
            if firstBad == nil { firstBad = frame }
        }
        guard let firstBad else {
            if looked > 0 { rules.held(.guestAccess) }
            return
        }
        let known = history.entry(space: 0, level: 1, frame: firstBad)
        let what = run.run.writes ? "written" : "read"
        let state =
            switch known.state {
            case .never: "no entry was ever set for it"
            case .lost: "its entry was zapped by line \(known.lostAt) and no fault brought it back"
            default: "its entry \(hex(known.entry)) of line \(known.setAt) is read-only"
            }
        rules.suspect(
            .guestAccess, needsNotifierEvents: false, at: moment,
            "the run marked at line \(run.startLine) succeeded, but gfn \(hex(firstBad)) cannot have been \(what): "
                + state + (bad > 1 ? " (and \(bad - 1) more pages)" : ""))
    }

    /// Distinct consecutive frames that the run touches: eight bytes at each step.
    private func forEachFrame(of run: GuestRun, _ body: (UInt64) -> Void) {
        var last = UInt64.max
        var seen: UInt64 = 0
        for step in 0..<min(run.count, Self.pagesPerRun) {
            let address = run.guestAddress &+ step &* run.stride
            for frame in [address >> 12, (address &+ 7) >> 12] where frame != last {
                last = frame
                seen += 1
                body(frame)
            }
            if seen >= Self.pagesPerRun { return }
        }
    }

    /// Whether some entry may have allowed the access at some time since line `start`.
    private func isAllowed(_ frame: UInt64, write: Bool, since start: UInt32) -> Bool {
        for level in 1...3 {
            let known = history.entry(space: 0, level: level, frame: frame)
            switch known.state {
            case .never: continue
            case .unknown: return true
            case .present:
                if !write || known.entry & 2 != 0 || known.writableLostAt > start { return true }
            case .lost:
                guard known.lostAt > start else { continue }
                if !write || known.entry & 2 != 0 || known.writableLostAt > start { return true }
            }
        }
        return false
    }

    // MARK: dirty log

    private func log(_ run: MarkedRun, doneLine: UInt64) {
        slots.updateAll { slot in
            guard let since = slot.loggedSince, run.startLine > since, slot.loggedRuns.count < 1024 else { return }
            var count: UInt64 = 0
            var low = UInt64.max
            var high: UInt64 = 0
            let frames = slot.frames
            forEachFrame(of: run.run) { frame in
                guard frames.contains(frame) else { return }
                // A run that goes backwards or in circles counts as one page: too few is never wrong.
                count = frame > high || count == 0 ? count + 1 : 1
                low = min(low, frame)
                high = max(high, frame)
            }
            guard count > 0 else { return }
            slot.loggedRuns.append(
                LoggedRun(startLine: run.startLine, doneLine: doneLine, frames: low...high, count: count))
        }
    }

    private func readDirtyLog(result: Int64, dirty: UInt64, at moment: Moment) {
        guard let read = dirtyLogRead else { return }
        dirtyLogRead = nil
        guard result == 0 else { return }
        tally.dirtyLogReads += 1
        tally.dirtyPages = saturating(tally.dirtyPages, dirty)
        guard let slot = slots.slot(id: read.slot), slot.loggedSince != nil else {
            return rules.skip(.dirtyLog, "the marks do not say that the slot was being logged")
        }
        let least = Self.leastWritten(slot.loggedRuns.filter { $0.doneLine < read.line })
        slots.update(id: read.slot) { slot in
            slot.loggedSince = moment.line
            slot.loggedRuns.removeAll { $0.startLine < moment.line }
        }
        if let why = why(.dirtyLog) { return rules.skip(.dirtyLog, why) }
        rules.check(
            .dirtyLog, dirty >= least && dirty <= slot.frameCount, at: moment,
            "slot \(read.slot): the log reports \(dirty) dirty pages; marked runs wrote at least \(least) since it was "
                + "last read, and the slot has \(slot.frameCount)")
    }

    /// Pages that a set of runs wrote at least: runs over disjoint ranges add up, of overlapping ones the larger counts.
    private static func leastWritten(_ runs: [LoggedRun]) -> UInt64 {
        var groups: [(frames: ClosedRange<UInt64>, count: UInt64)] = []
        for run in runs.sorted(by: { $0.frames.lowerBound < $1.frames.lowerBound }) {
            if let last = groups.last, last.frames.overlaps(run.frames) {
                let joined = last.frames.lowerBound...max(last.frames.upperBound, run.frames.upperBound)
                groups[groups.count - 1] = (joined, max(last.count, run.count))
            } else {
                groups.append((run.frames, run.count))
            }
        }
        return groups.reduce(0) { $0 + $1.count }
    }
}
