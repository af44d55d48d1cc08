import Audit
import Explorer
import Frames
import HostMemory
import Machine

/// A run that goes wrong, told: who did what, when, and what came of it.
public struct Story: Sendable {
    /// One transition of which the journal tells something.
    public struct Row: Sendable {
        /// The point's number in the schedule, from 1.
        public var point: Int
        public var task: Int
        public var events: [Event]
        /// The watched page's reference count after the row; nil where no page is watched.
        public var references: Int?
    }

    /// Names of the tasks of the phase that is told, as the schedule's letters.
    public var tasks: [String] = []
    public var phase = 0
    public var rows: [Row] = []
    public var findings: [Finding] = []
    public var unexpected: [StepResult] = []
    /// The page that the first finding names.
    public var page: HostFrame?
    /// The whole run, where it came to an end.
    public var outcome: RunOutcome?
    /// Tasks that could not go on, and what they waited for.
    public var stuck: [String] = []

    /// Runs `run` again, twice: once to learn which page it is about, once to watch it.
    public init(_ run: Explorer.Run, _ subject: WorldSubject, _ explorer: Explorer) {
        subject.keepsEvents = true
        defer {
            subject.keepsEvents = false
            subject.watched = nil
        }
        subject.watched = nil
        _ = explorer.replay(run.schedule)
        page = subject.world.journal.findings.first { !subject.known.rules.contains($0.invariant) }.flatMap {
            $0.frame == Event.none ? nil : HostFrame($0.frame)
        }
        subject.watched = page
        let again = explorer.replay(run.schedule, recording: true)
        outcome = subject.outcome
        findings = subject.world.journal.findings.filter { !subject.known.rules.contains($0.invariant) }
        unexpected = subject.known.unexpectedSteps ? [] : subject.outcome?.unexpected ?? []
        tell(again, subject)
    }

    private mutating func tell(_ run: Explorer.Run, _ subject: WorldSubject) {
        let events = subject.world.journal.events
        phase = phaseToTell(run, events, subject)
        let tasksInPhase = subject.taskCount(phase)
        tasks = (0..<tasksInPhase).map { subject.taskName(phase, $0) }
        let last = findings.map(\.event).min() ?? events.count
        for (i, record) in run.records.enumerated() where record.phase == phase {
            let next = i + 1 < run.records.count ? run.records[i + 1].mark : subject.endMarks[phase] ?? events.count
            let shown = events[record.mark..<max(record.mark, min(next, events.count))].filter(Self.isTold)
            guard !shown.isEmpty else { continue }
            let sample = i + 1 < subject.samples.count ? subject.samples[i + 1] : subject.samples.last ?? nil
            rows.append(
                Row(point: i + 1, task: Int(record.task), events: shown, references: page == nil ? nil : sample))
            if next > last, !findings.isEmpty { break }
        }
        if case .stuck = run.ending { stuck = run.waiting }
    }

    /// The phase in which the first finding was made; else the last in which tasks ran side by side.
    private func phaseToTell(_ run: Explorer.Run, _ events: [Event], _ subject: WorldSubject) -> Int {
        let first = findings.map(\.event).min() ?? events.count
        var chosen = run.records.last?.phase ?? 0
        for record in run.records where record.mark <= first { chosen = record.phase }
        return chosen
    }

    /// Events that only say again what the row's others say are left out.
    private static func isTold(_ event: Event) -> Bool {
        switch event.kind {
        case .referenceTaken, .referenceDropped: event.holder.isKVM
        case .markedAccessed, .pageAllocated, .faultResolved: false
        default: true
        }
    }
}
