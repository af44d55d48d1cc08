import TraceAudit

/// A recording of a real kernel as a Perfetto trace, written while the auditor reads it: a process for each virtual
/// machine, with the threads that wrote events; marked guest runs and calls as slices, faults as slices (``FaultSlice``),
/// entries, zaps, shadow pages and notifier ranges as instants; counters by page size.
///
/// What the guest maps can be counted where each write of an entry is an event: the TDP MMU. The shadow MMU ends leaves
/// without one, so there the counters say how many entries have been set. Times are the recording's own; a second
/// recording in the same file follows one second behind the first. Memory grows with the number of threads only.
public final class RecordingTimeline: RecordingFollower {
    struct Thread {
        var track: PerfettoTrace.Track
        var machine: Int
        var fault: FaultSlice?
        /// A guest run or call that a mark began.
        var isInMark = false
        var latest: UInt64 = 0
    }
    struct Machine {
        var pid: UInt32
        var process: PerfettoTrace.Track
        var pages: PageCounters
        var entriesSet: PageCounters
        /// `kvm_tdp_mmu_spte_changed` has been seen: pages can be counted.
        var hasChanges = false
    }

    var trace: PerfettoTrace
    private var threads: [UInt32: Thread] = [:]
    private var machines: [Int: Machine] = [:]
    /// Added to the recording's times.
    private var shift: UInt64 = 0
    private var latest: UInt64 = 0
    private var startsAnew = false

    /// `sink` takes the trace's bytes, piece by piece.
    public init(to sink: @escaping ([UInt8]) -> Void) { trace = PerfettoTrace(sink: sink) }

    /// Audits a recording and writes its timeline on the way.
    public static func audit(
        _ source: RecordingSource, to sink: @escaping ([UInt8]) -> Void
    ) async throws(AuditInputError) -> AuditReport {
        let timeline = RecordingTimeline(to: sink)
        let report = try await auditRecording(source, follower: timeline)
        timeline.finish()
        return report
    }

    /// Ends what is still open and hands over the last bytes.
    func finish() {
        settle()
        trace.finish()
    }

    // MARK: the recording

    package func follow(_ event: RecordedEvent) {
        let time = shifted(event.time)
        var thread = threads[event.thread] ?? enter(event)
        thread.latest = max(thread.latest, time)
        // What an interrupt writes says nothing about where its victim is.
        if event.inInterrupt {
            show(event.body, on: thread, at: time)
        } else {
            place(event.body, on: &thread, at: time)
        }
        threads[event.thread] = thread
    }

    package func pass(_ name: String, thread: UInt32, time: UInt64) {
        guard var known = threads[thread], known.fault != nil else { return }
        // The guest goes on, or user space is asked: the fault is over now. The other events prove nothing.
        guard name == "kvm_entry" || name == "kvm_userspace_exit" else { return }
        let now = shifted(time)
        known.latest = max(known.latest, now)
        known.fault?.lasts(until: now)
        closeFault(&known)
        threads[thread] = known
    }

    package func restart() {
        settle()
        startsAnew = true
    }

    private func shifted(_ time: UInt64) -> UInt64 {
        if startsAnew {
            startsAnew = false
            let begin = latest + 1_000_000_000
            shift = begin > time ? begin - time : 0
        }
        latest = max(latest, time + shift)
        return time + shift
    }

    /// Closes every slice, in the order of the threads' ids.
    private func settle() {
        for id in threads.keys.sorted() {
            guard var thread = threads[id] else { continue }
            closeFault(&thread)
            closeMark(&thread, at: thread.latest)
            threads[id] = thread
        }
    }

    private func enter(_ event: RecordedEvent) -> Thread {
        let pid = machine(of: event).pid
        return Thread(
            track: trace.thread(event.thread, of: pid, name: event.command), machine: event.machine, fault: nil)
    }

    private func machine(of event: RecordedEvent) -> Machine {
        if let known = machines[event.machine] { return known }
        // Without process ids the section has its first thread's.
        let pid = event.process ?? event.thread
        let process = trace.process(pid, name: event.process == nil ? "KVM (all processes)" : event.command)
        let machine = Machine(
            pid: pid, process: process, pages: PageCounters("guest maps", unit: "pages", of: process),
            entriesSet: PageCounters("entries set", unit: "entries", of: process))
        machines[event.machine] = machine
        return machine
    }

    // MARK: slices

    private func place(_ body: EventBody, on thread: inout Thread, at time: UInt64) {
        switch FaultSlice.role(of: body, in: thread.fault) {
        case .begins(let slice):
            closeFault(&thread)
            thread.fault = slice
            thread.fault?.begin(at: time)
            if slice.isCertain { showFault(&thread) }
        case .proves:
            thread.fault?.lasts(until: time)
            showFault(&thread)
        case .continues: thread.fault?.lasts(until: time)
        case .ends: closeFault(&thread)
        case .isElsewhere: break
        }
        thread.fault?.notice(body)
        if case .mark(let mark) = body { place(mark, on: &thread, at: time) }
        show(body, on: thread, at: time)
    }

    private func showFault(_ thread: inout Thread) {
        guard let fault = thread.fault, !fault.isShown else { return }
        thread.fault?.isShown = true
        trace.begin("fault", "kvm", on: thread.track, at: fault.start, fault.facts)
    }

    private func closeFault(_ thread: inout Thread) {
        guard let fault = thread.fault else { return }
        thread.fault = nil
        // A walk that led to no entry: the emulator's, or one that ended in the guest's own fault.
        if !fault.isShown { trace.begin("guest table walk", "kvm", on: thread.track, at: fault.start, fault.facts) }
        trace.end(on: thread.track, at: fault.end)
    }

    private func place(_ mark: ProbeMark, on thread: inout Thread, at time: UInt64) {
        switch mark {
        case .guest(let run):
            closeMark(&thread, at: time)
            thread.isInMark = true
            trace.begin(
                run.name, "guest", on: thread.track, at: time,
                [
                    "vcpu": .count(UInt64(bitPattern: run.vcpu)), "gpa": .address(run.guestAddress),
                    "count": .count(run.count), "stride": .address(run.stride),
                ])
        case .setRegion(let slot):
            closeMark(&thread, at: time)
            thread.isInMark = true
            trace.begin(
                slot.size == 0 ? "delete slot" : "set slot", "call", on: thread.track, at: time,
                [
                    "slot": .count(slot.slot), "flags": .address(slot.flags), "gpa": .address(slot.guestAddress),
                    "size": .address(slot.size), "hva": .address(slot.hostAddress),
                ])
        case .getDirtyLog(let slot):
            closeMark(&thread, at: time)
            thread.isInMark = true
            trace.begin("get dirty log", "call", on: thread.track, at: time, ["slot": .count(slot)])
        case .line(let number, isDone: false):
            closeMark(&thread, at: time)
            thread.isInMark = true
            trace.begin("line \(number + 1)", "call", on: thread.track, at: time, [:])
        case .guestDone, .setRegionResult, .getDirtyLogResult, .line(_, isDone: true): closeMark(&thread, at: time)
        case .scenario, .phase, .action, .other: break
        }
    }

    private func closeMark(_ thread: inout Thread, at time: UInt64) {
        guard thread.isInMark else { return }
        thread.isInMark = false
        trace.end(on: thread.track, at: time)
    }

    // MARK: instants and counters

    private func show(_ body: EventBody, on thread: Thread, at time: UInt64) {
        if let instant = RecordedInstant(body) {
            trace.instant(instant.name, "kvm", on: thread.track, at: time, instant.facts)
        }
        guard var machine = machines[thread.machine] else { return }
        switch body {
        case .entryChanged(let change):
            machine.hasChanges = true
            let (old, new) = (change.wasLeaf ? 1 : 0, change.isLeaf ? 1 : 0)
            machine.pages.add(new - old, level: change.level, at: time, to: &trace)
        case .entrySet(let set) where !machine.hasChanges:
            machine.entriesSet.add(1, level: set.level, at: time, to: &trace)
        default: return
        }
        machines[thread.machine] = machine
    }
}

extension GuestRun {
    fileprivate var name: String {
        switch operation {
        case .read: "guest read"
        case .write: "guest write"
        case .lockedIncrement: "guest locked increment"
        }
    }
}
