/// A thread of the recording: what it is in the middle of.
struct TracedThread {
    var id: UInt32
    var process: UInt32?
    var machine: Int
    /// Its last `kvm_mmu_spte_requested`, and whether the fault's own entry has been written since.
    var request: EntryRequested?
    var requestLine: UInt64 = 0
    var answered = false
    /// Physical address of the fault's own entry.
    var faultEntryAt: UInt64?
    var run: MarkedRun?
    /// It writes entries of the section's machine for certain.
    var linked = false
}

/// A marked guest run that has not finished.
struct MarkedRun {
    var run: GuestRun
    var startLine: UInt64
    var startTime: UInt64
    /// An instruction other than port I/O was interpreted: accesses may have needed no entry.
    var emulated = false
}

/// One section of the report: the virtual machine of one process, and what the recording says about it.
///
/// The rules are in the extensions named after them.
final class MachineAudit {
    let index: Int
    let process: UInt32?
    let recording: RecordingState
    let history: EntryHistory
    var rules: RuleBook { recording.rules }

    var slots = MarkedSlots()
    var slotChange: (request: SlotRequest, thread: UInt32, line: UInt64)?
    var dirtyLogRead: (slot: UInt64, line: UInt64)?
    var openWindows: [ZapWindow] = []
    var closedWindows: [ZapWindow] = []
    /// Live shadow pages of guest tables, by the guest frame of the table. Spec: x86 X48.
    var shadowedTables: [UInt64: ShadowedTable] = [:]
    /// Host frames of table pages seen, to tell whether a new thread belongs to this machine.
    var tables: Set<UInt32> = []
    var lastTable: UInt32?

    /// The recording begins with the machine: no entry is older than the marks.
    var seenFromStart = false
    /// Set when events of two machines may be in this section.
    var conflated = false
    /// Line from which events are missing.
    var eventsLostAt: UInt64?
    var closed = false
    /// TDP roots created in the recording; the chain rule needs exactly one.
    var directRoots = 0
    var directRootAt: UInt64 = 0
    var sawChange = false
    var sawShadowTable = false
    var tally = MachineTally()

    init(index: Int, process: UInt32?, recording: RecordingState) {
        self.index = index
        self.process = process
        self.recording = recording
        history = EntryHistory(budget: recording.budget)
    }

    /// Forgets all state, keeping the counts: another recording, or another machine of the same process, begins.
    func restart() {
        history.removeAll()
        slots = MarkedSlots()
        slotChange = nil
        dirtyLogRead = nil
        openWindows = []
        closedWindows = []
        shadowedTables = [:]
        tables = []
        lastTable = nil
        seenFromStart = false
        eventsLostAt = nil
        closed = false
        directRoots = 0
        directRootAt = 0
    }

    /// Events are missing before `line`: nothing that was known is certain any more.
    func loseEvents(at line: UInt64) {
        let slots = self.slots
        let fromStart = seenFromStart
        restart()
        self.slots = slots
        seenFromStart = fromStart
        eventsLostAt = line
    }

    func why(_ rule: Rule) -> String? {
        if let eventsLostAt, rule.needsEveryEvent { return "events were lost before line \(eventsLostAt)" }
        if conflated { return "more than one virtual machine may be in it and it has no process ids" }
        return nil
    }

    func handle(_ body: EventBody, thread: inout TracedThread, at moment: Moment) {
        switch body {
        case .entrySet(let event): install(event, thread: &thread, at: moment)
        case .entryRequested(let event): request(event, thread: &thread, at: moment)
        case .tableWalk(let address, let code):
            closeWindows(of: thread.id, at: moment)
            tally.countWalk(address: address, errorCode: code)
        case .entryChanged(let event): change(event, thread: thread, at: moment)
        case .table(let kind, let event): table(kind, event, at: moment)
        case .tableWithoutFrame:
            recording.note(
                "line \(moment.line): a plugin of libtraceevent printed this event without its guest frame; what is known "
                    + "starts anew with each such event (trace-cmd report -N prints all)")
            loseEvents(at: moment.line)
        case .zapAllFast: zapAllFast(thread: thread, at: moment)
        case .unmapRange(let range): unmap(range, thread: thread, at: moment)
        case .ageRange(let range):
            tally.ageRanges += 1
            check(range, at: moment)
        case .testAge: tally.ageRanges += 1
        case .pageFault(_, _):
            closeWindows(of: thread.id, at: moment)
            tally.pageFaults += 1
        case .fastPageFault(let fault): fastFault(fault, thread: thread, at: moment)
        case .splitHugePage(_, _, let errno):
            tally.splits += 1
            if errno != 0 { tally.failedSplits += 1 }
        case .checkMMIO(let event): check(event, at: moment)
        case .emulate(let byte): emulate(firstByte: byte, thread: &thread)
        case .mark(let mark): self.mark(mark, thread: &thread, at: moment)
        case .walkedElement: tally.count(.walkedElement)
        case .setFlag(let kind, _): tally.count(kind)
        case .walkerError: tally.count(.walkerError)
        case .counted(let kind): tally.count(kind)
        }
    }

    private func request(_ event: EntryRequested, thread: inout TracedThread, at moment: Moment) {
        closeWindows(of: thread.id, at: moment)
        tally.requests += 1
        thread.request = event
        thread.requestLine = moment.line
        thread.answered = false
        thread.faultEntryAt = nil
        if event.level > 1 {
            let mask = pages(level: event.level) - 1
            rules.check(
                .alignment, (event.frame ^ event.hostFrame) & mask == 0, at: moment,
                "level \(event.level) was requested for gfn \(hex(event.frame)) with pfn \(hex(event.hostFrame)): "
                    + "their low \(9 * (event.level - 1)) bits must be equal for a huge leaf")
        }
    }

    private func emulate(firstByte: UInt8?, thread: inout TracedThread) {
        tally.emulated += 1
        recording.hasEmulationEvents = true
        guard thread.run != nil else { return }
        switch firstByte {
        case 0xe4, 0xe5, 0xe6, 0xe7, 0xec, 0xed, 0xee, 0xef: break
        default: thread.run?.emulated = true
        }
    }

    private func unmap(_ range: HostRange, thread: TracedThread, at moment: Moment) {
        recording.hasNotifierEvents = true
        tally.notifierRanges += 1
        check(range, at: moment)
        guard range.start < range.end else { return }
        tally.notifierPages = saturating(tally.notifierPages, (range.end - range.start) >> 12)
        let frames = slots.frames(in: range)
        tally.notifierGuestFrames = frames.reduce(tally.notifierGuestFrames) { saturating($0, UInt64($1.count)) }
        if !frames.isEmpty { tally.notifierRangesInSlots += 1 }
        openWindow(.notifier, thread: thread.id, frames: frames, at: moment)
    }

    /// A notifier range that another process (or the kernel) caused: it may be about this machine's memory.
    func foreignUnmap(_ range: HostRange) {
        for frames in slots.frames(in: range) {
            history.forEach(in: frames) { known in
                if known.state == .present { known.state = .unknown }
            }
        }
    }

    private func check(_ range: HostRange, at moment: Moment) {
        rules.check(
            .hostRanges, range.start < range.end && (range.start | range.end) & 0xfff == 0, at: moment,
            "notifier range \(hex(range.start)) -- \(hex(range.end)) should be page aligned and not empty")
    }

    private func check(_ event: MMIOCheck, at moment: Moment) {
        tally.mmioChecks += 1
        let stored = (event.entry >> 3 & 0xff) | (event.entry >> 52 & 0x7ff) << 8
        rules.check(
            .mmioGeneration,
            event.valid == (event.currentGeneration == event.entryGeneration) && stored == event.entryGeneration,
            at: moment,
            "MMIO entry \(hex(event.entry)) holds generation \(hex(stored)), printed as "
                + "\(hex(event.entryGeneration)), current \(hex(event.currentGeneration)): it was called "
                + (event.valid ? "valid" : "stale"))
    }

    private func zapAllFast(thread: TracedThread, at moment: Moment) {
        tally.fastZaps += 1
        shadowedTables = [:]
        openWindow(.fastZap, thread: thread.id, frames: [0...(1 << 52 - 1)], at: moment)
    }

    private func fastFault(_ fault: FastPageFault, thread: TracedThread, at moment: Moment) {
        closeWindows(of: thread.id, at: moment)
        tally.fastFaults += 1
        if fault.fixed { tally.fastFixed += 1 }
        if fault.spurious { tally.fastSpurious += 1 }
        guard let format = recording.format.decided, fault.fixed else { return }
        // Only direct MMUs take this path, so the address is the guest's physical one. Which level the leaf has is
        // not printed: the highest present one it must be.
        for level in (1...3).reversed() {
            let frame = fault.address >> 12 & ~(pages(level: level) - 1)
            let known = history.entry(space: 0, level: level, frame: frame)
            guard known.state == .present else { continue }
            let entry = DecodedEntry(raw: fault.new, format: format, level: level)
            checkEntry(entry, frame: frame, at: moment)
            history.recordLeaf(
                entry, space: 0, frame: frame, table: known.table, line: Self.short(moment.line), chained: known.chained
            )
            return
        }
    }
}
