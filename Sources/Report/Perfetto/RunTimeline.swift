import Audit
import Frames
import Machine
import Paging

/// A run of the model as a Perfetto trace: a process for the VM, a thread for each vCPU, the host, and each of the host's
/// tasks; a slice for each step and each fault, an instant for every other event, counters of the pages that the guest
/// maps by size, and the findings where they were made.
///
/// Time is counted in events, a microsecond each, as in ``FtraceText``. A step that waits for another task's has the
/// other's events in its range: an event belongs to the innermost step, the one whose range ends first.
public struct RunTimeline {
    private let outcome: RunOutcome
    private let text: ActionText
    private var trace: PerfettoTrace
    private let process: PerfettoTrace.Track
    private let phases: PerfettoTrace.Track
    private let host: PerfettoTrace.Track
    /// Steps that have begun and not ended, in the order in which they began.
    private var open: [OpenStep] = []
    private var phase: Int?
    private var threads: [(actor: TaskPlan.Actor, track: PerfettoTrace.Track)] = []
    private var pages: PageCounters
    /// The leaves that the guest has: an entry may be installed over another.
    private var leaves: Set<Leaf> = []
    /// Under shadow paging many leaves may map one guest frame, and only whether an entry was there says whether one is new.
    private let mapsFramesOnce: Bool
    /// Findings that are still to come, the next one last.
    private var findings: [Finding]
    /// Nanoseconds.
    private var clock: UInt64 = 0

    private struct OpenStep {
        var track: PerfettoTrace.Track
        /// The first event after it.
        var end: Int
        var isInFault = false
        /// What came of its faults, the next one first.
        var stories: ArraySlice<FaultStory?>
    }

    private struct Leaf: Hashable {
        var level: UInt8
        var guest: UInt64
    }

    /// The VM's process, and the host's thread, its first.
    private static let pid: UInt32 = 1
    private static let tick: UInt64 = 1000

    /// Hands the trace's bytes to `sink`, piece by piece.
    public static func write(_ outcome: RunOutcome, to sink: @escaping ([UInt8]) -> Void) {
        var timeline = RunTimeline(outcome, sink)
        timeline.run()
        timeline.trace.finish()
    }

    private init(_ outcome: RunOutcome, _ sink: @escaping ([UInt8]) -> Void) {
        self.outcome = outcome
        text = ActionText(plan: outcome.plan)
        mapsFramesOnce = outcome.architecture != .x86Shadow
        trace = PerfettoTrace(sink: sink)
        process = trace.process(
            Self.pid, name: "\(String(name: outcome.plan.name)) on \(outcome.architecture.name), \(outcome.policy.name)"
        )
        phases = trace.lane("phases", of: process)
        host = trace.thread(Self.pid, of: Self.pid, name: "host")
        pages = PageCounters("guest maps", unit: "pages", of: process)
        findings = outcome.findings.sorted { $0.event > $1.event }
    }

    private mutating func run() {
        let steps = outcome.steps
        let order = steps.indices.sorted { (steps[$0].events.lowerBound, $0) < (steps[$1].events.lowerBound, $1) }
        var next = order[...]
        for index in 0...outcome.events.count {
            close { $0.end <= index }
            while let step = next.first, steps[step].events.lowerBound <= index {
                next.removeFirst()
                begin(steps[step])
                close { $0.end <= index }
            }
            if index < outcome.events.count { place(index, next: next.first.map { steps[$0].events.lowerBound }) }
        }
        if phase != nil { trace.end(on: phases, at: clock) }
        while let finding = findings.popLast() { tell(finding, on: host) }
    }

    private mutating func begin(_ result: StepResult) {
        if result.phase != phase {
            if phase != nil { trace.end(on: phases, at: clock) }
            phase = result.phase
            trace.begin(String(name: outcome.plan.phases[result.phase].name), "phase", on: phases, at: clock)
        }
        let task = outcome.plan.phases[result.phase].tasks[result.task]
        let track = thread(task.actor)
        trace.begin(
            text.describe(task.steps[result.step].action), "step", on: track, at: clock,
            [
                "outcome": .text(result.outcome.text), "as expected": .text(result.expected ? "yes" : "no"),
                "line": .count(UInt64(task.steps[result.step].line)),
            ])
        open.append(
            OpenStep(track: track, end: result.events.upperBound, stories: Self.stories(in: ownEvents(of: result))[...])
        )
    }

    /// For each fault among the events of one step its story; nil for one that has no end there.
    private static func stories(in events: [Event]) -> [FaultStory?] {
        var told = FaultStory.all(in: events[...])[...]
        let marks = events.map(\.kind).filter { $0 == .fault || $0 == .faultResolved }
        return marks.indices.filter { marks[$0] == .fault }.map { index in
            index + 1 < marks.count && marks[index + 1] == .faultResolved ? told.popFirst() : nil
        }
    }

    /// Those that are not another step's that runs while this one waits.
    private func ownEvents(of result: StepResult) -> [Event] {
        let inner = outcome.steps.filter { other in
            result.events.lowerBound <= other.events.lowerBound && other.events.upperBound < result.events.upperBound
        }
        return result.events.filter { index in !inner.contains { $0.events.contains(index) } }
            .map { outcome.events[$0] }
    }

    private mutating func close(where ends: (OpenStep) -> Bool) {
        while let index = open.lastIndex(where: ends) {
            let step = open.remove(at: index)
            clock += Self.tick
            if step.isInFault { trace.end(on: step.track, at: clock) }
            trace.end(on: step.track, at: clock)
        }
    }

    /// An event, in its step; the host's where there is none, until the next step begins.
    private mutating func place(_ index: Int, next: Int?) {
        if open.isEmpty {
            trace.begin(
                index == 0 ? "set up" : next == nil ? "take down" : "meanwhile", "step", on: host, at: clock)
            open.append(OpenStep(track: host, end: next ?? outcome.events.count, stories: []))
        }
        var owner = open.count - 1
        for other in open.indices where open[other].end < open[owner].end { owner = other }
        while let finding = findings.last, finding.event <= index {
            findings.removeLast()
            tell(finding, on: open[owner].track)
        }
        clock += Self.tick
        var step = open[owner]
        take(outcome.events[index], in: &step)
        open[owner] = step
    }

    private mutating func take(_ event: Event, in step: inout OpenStep) {
        switch event.kind {
        case .fault:
            if step.isInFault { trace.end(on: step.track, at: clock) }
            step.isInFault = true
            begin(event, step.stories.popFirst() ?? nil, on: step.track)
        case .faultResolved where step.isInFault:
            trace.end(on: step.track, at: clock)
            step.isInFault = false
        default: instant(event, on: step.track)
        }
        count(event)
    }

    private mutating func thread(_ actor: TaskPlan.Actor) -> PerfettoTrace.Track {
        if actor == .host { return host }
        if let known = threads.first(where: { $0.actor == actor }) { return known.track }
        let (tid, name): (UInt32, String) =
            switch actor {
            case .virtualCPU(let number): (100 + UInt32(number), "vCPU \(number)")
            case .host: (Self.pid, "host")
            case .background(let task): (200 + UInt32(threads.count), "\(task.name)")
            }
        let track = trace.thread(tid, of: Self.pid, name: name)
        threads.append((actor, track))
        return track
    }

    private mutating func begin(_ event: Event, _ story: FaultStory?, on track: PerfettoTrace.Track) {
        trace.begin(
            "fault", "kvm", on: track, at: clock,
            [
                "gfn": .address(event.guest), "vcpu": .count(event.extra),
                "access": .text(AccessKind(rawValue: UInt8(truncatingIfNeeded: event.value)).map { "\($0)" } ?? "?"),
                "story": .text(story?.sentence ?? ""),
            ])
    }

    private mutating func instant(_ event: Event, on track: PerfettoTrace.Track) {
        let size = PageCounters.size(Int(event.level))
        let (name, category): (String, StaticString) =
            switch event.kind {
            case .entryInstalled: ("map \(size)", "kvm")
            case .entryZapped: ("zap \(size)", "kvm")
            case .entryChanged: ("change \(size)", "kvm")
            case .notifierStart: ("invalidate start", "kvm")
            case .notifierEnd: ("invalidate end", "kvm")
            default: (EventText.words(event.kind), "event")
            }
        trace.instant(name, category, on: track, at: clock, ["event": .text(EventText.line(event))])
    }

    private mutating func count(_ event: Event) {
        let leaf = Leaf(level: event.level, guest: event.guest)
        switch event.kind {
        case .entryInstalled where !mapsFramesOnce:
            if !EntryBits.isPresent(event.extra) { pages.add(1, level: Int(event.level), at: clock, to: &trace) }
        case .entryZapped where !mapsFramesOnce:
            pages.add(-1, level: Int(event.level), at: clock, to: &trace)
        // A table in the place of a huge leaf: it is split.
        case .tableLinked where mapsFramesOnce && leaves.remove(leaf) != nil:
            pages.add(-1, level: Int(event.level), at: clock, to: &trace)
            let size = PageLevel(event.level).below.frames
            for i in 0..<512 as Range<UInt64> {
                leaves.insert(Leaf(level: event.level - 1, guest: event.guest + i * size))
            }
            pages.add(512, level: Int(event.level) - 1, at: clock, to: &trace)
        case .entryInstalled where leaves.insert(leaf).inserted:
            pages.add(1, level: Int(event.level), at: clock, to: &trace)
        case .entryZapped where leaves.remove(leaf) != nil:
            pages.add(-1, level: Int(event.level), at: clock, to: &trace)
        default: break
        }
    }

    private mutating func tell(_ finding: Finding, on track: PerfettoTrace.Track) {
        trace.instant(
            finding.invariant.code, "finding", on: track, at: clock,
            [
                "rule": .text("\(finding.invariant.statement)"), "reason": .text("\(finding.reason.text)"),
            ])
    }
}
