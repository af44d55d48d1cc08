import Audit
import Frames
import Machine

/// A run of the model as a Perfetto trace: a process for the VM, a thread for each vCPU, the host, and each of the host's
/// tasks; a slice for each step and each fault, an instant for every other event, counters of the pages that the guest
/// maps by size, and the findings where they were made.
///
/// Time is counted in events, a microsecond each, as in ``FtraceText``.
public struct RunTimeline {
    private let outcome: RunOutcome
    private let text: ActionText
    private var trace: PerfettoTrace
    private let process: PerfettoTrace.Track
    private let phases: PerfettoTrace.Track
    private let host: PerfettoTrace.Track
    private var threads: [(actor: TaskPlan.Actor, track: PerfettoTrace.Track)] = []
    private var pages: PageCounters
    /// The leaves that the guest has: an entry may be installed over another.
    private var leaves: Set<Leaf> = []
    /// Findings that are still to come, the next one last.
    private var findings: [Finding]
    /// Nanoseconds.
    private var clock: UInt64 = 0

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
        var next = 0
        var phase: Int?
        for result in outcome.steps {
            idle(next..<max(next, result.events.lowerBound), next == 0 ? "set up" : "meanwhile")
            if result.phase != phase {
                if phase != nil { trace.end(on: phases, at: clock) }
                phase = result.phase
                trace.begin(String(name: outcome.plan.phases[result.phase].name), "phase", on: phases, at: clock)
            }
            step(result)
            next = max(next, result.events.upperBound)
        }
        if phase != nil { trace.end(on: phases, at: clock) }
        idle(next..<max(next, outcome.events.count), "take down")
        while let finding = findings.popLast() { tell(finding, on: host) }
    }

    private mutating func step(_ result: StepResult) {
        let task = outcome.plan.phases[result.phase].tasks[result.task]
        let track = thread(task.actor)
        trace.begin(
            text.describe(task.steps[result.step].action), "step", on: track, at: clock,
            [
                "outcome": .text(result.outcome.text), "as expected": .text(result.expected ? "yes" : "no"),
                "line": .count(UInt64(task.steps[result.step].line)),
            ])
        events(result.events, on: track)
        trace.end(on: track, at: clock)
    }

    /// Events that belong to no step: the host's.
    private mutating func idle(_ range: Range<Int>, _ name: String) {
        guard !range.isEmpty else { return }
        trace.begin(name, "step", on: host, at: clock)
        events(range, on: host)
        trace.end(on: host, at: clock)
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

    private mutating func events(_ range: Range<Int>, on track: PerfettoTrace.Track) {
        var stories = FaultStory.all(in: outcome.events[range])[...]
        var isInFault = false
        for index in range {
            while let finding = findings.last, finding.event <= index {
                findings.removeLast()
                tell(finding, on: track)
            }
            let event = outcome.events[index]
            clock += Self.tick
            switch event.kind {
            case .fault:
                if isInFault { trace.end(on: track, at: clock) }
                isInFault = true
                begin(event, isResolved(index, in: range) ? stories.first : nil, on: track)
            case .faultResolved where isInFault:
                trace.end(on: track, at: clock)
                isInFault = false
                stories = stories.dropFirst()
            default: instant(event, on: track)
            }
            count(event)
        }
        clock += Self.tick
        if isInFault { trace.end(on: track, at: clock) }
    }

    /// Whether the fault at `index` has an end in its step: only those have a story.
    private func isResolved(_ index: Int, in range: Range<Int>) -> Bool {
        let next = outcome.events[index + 1..<range.upperBound].first { $0.kind == .fault || $0.kind == .faultResolved }
        return next?.kind == .faultResolved
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
