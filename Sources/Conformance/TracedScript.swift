import Audit
import Interface
import IoctlScript
import LinuxKVM
import Replay
import TraceAudit

/// A script on this machine's kernel, with what KVM's trace events told meanwhile, beside what the model tells of the same
/// calls: entries with every bit but the frame, levels, shadow pages with their roles, walks of the guest's tables, zaps and
/// invalidated ranges, line by line and in order.
///
/// The kernel's guest has page tables of its own; so has the model's here, with the same bytes in the same places.
public struct TracedScript: Sendable {
    public let kernel: String
    public internal(set) var report: ReplayReport

    init(
        _ script: Script, name: String, kernel: String, _ recording: LineRecording, _ answers: [Answer],
        _ model: ModelLines, findings: [String], _ layout: GuestLayout, _ rules: TraceRules
    ) {
        self.kernel = kernel
        var renaming = FrameRenaming()
        var shown = ShownPages()
        var steps: [ReplayStep] = []
        var leftOut: [String] = []
        for (index, answer) in answers.enumerated() {
            let line = script.lines[index]
            let (theirAnswer, ourAnswer) = (
                "\(answer.comparable(to: line.step))", "\(model.answers[index].comparable(to: line.step))"
            )
            if theirAnswer != ourAnswer,
                let rule = rules.answers.first(explaining: script, index, model: ourAnswer, kvm: theirAnswer)
            {
                // The two are not in the same state from here on.
                leftOut.append("from line \(index + 1) on, whose answer is explained: \(rule.name)")
                break
            }
            func compared(_ told: [ReplayObservation]) -> [ReplayObservation] {
                let shown = told.filter(\.isOfScript).withOrderedRanges
                return line.step.executesUnknownCode ? shown.withoutWalks(in: layout) : shown
            }
            let theirs = compared(recording.told[index])
            // What is taken away may come back under any name.
            for range in theirs.compactMap(\.range) { renaming.forget { shown.contains($0, range) } }
            for guest in shown.note(line.step, answer) { renaming.forget { guest.contains($0) } }
            var comparison = Comparison()
            comparison.compare("answer", recorded: theirAnswer, model: ourAnswer)
            comparison.compare(theirs, compared(model.told[index]), &renaming)
            steps.append(
                ReplayStep(
                    name: "\(index + 1) \(script.source(of: line))", compared: comparison.compared,
                    differences: comparison.differences))
        }
        report = ReplayReport(file: name, steps: steps, findings: findings, leftOut: leftOut)
        report.explain(rules.events)
    }

    public var text: String {
        ReplayText.render(report, heading: "recorded on Linux \(kernel), beside the model's shadow MMU", show: 5)
    }
}

/// Why a difference is none: of events, and of answers.
struct TraceRules {
    var events: [Explanation]
    var answers: [AnswerRule]
}

/// Which pages of the VM's process its slots show where.
private struct ShownPages {
    private var slots: [UInt64: Region] = [:]

    /// Whether the guest frame shows an address of the range.
    func contains(_ frame: UInt64, _ range: Range<UInt64>) -> Bool {
        slots.values.contains { slot in
            guard slot.frames.contains(frame) else { return false }
            let address = slot.userAddress.address + (frame << 12 - slot.guestAddress)
            return range.overlaps(address..<address + 4096)
        }
    }

    /// Guest frames whose slot is not what it was.
    mutating func note(_ step: Step, _ answer: Answer) -> [Range<UInt64>] {
        guard case .setRegion(_, let region, _) = step, answer.outcome == .returned(0) else { return [] }
        let old = slots.updateValue(region, forKey: region.slot)
        if region.size == 0 { slots[region.slot] = nil }
        guard let old, old.guestAddress != region.guestAddress || old.size != region.size else { return [] }
        return [old.frames]
    }
}

extension Region {
    fileprivate var frames: Range<UInt64> { guestAddress >> 12..<(guestAddress + size) >> 12 }
}

/// What was told between the marks of each line.
final class LineRecording: RecordingFollower {
    var told: [[ReplayObservation]]
    private var line: Int?
    /// Of a recorded event, for tests; nil: it is left out.
    private let change: (ReplayObservation) -> ReplayObservation?

    init(lines: Int, _ change: @escaping (ReplayObservation) -> ReplayObservation?) {
        self.change = change
        told = Array(repeating: [], count: lines)
    }

    func follow(_ event: RecordedEvent) {
        if case .mark(.line(let number, let isDone)) = event.body {
            line = isDone || !told.indices.contains(number) ? nil : number
        } else if let line, let observation = ReplayObservation(event.body).flatMap(change) {
            told[line].append(observation)
        }
    }

    func pass(_ name: String, thread: UInt32, time: UInt64) {}
    func restart() {}
}

/// The same lines on the model, and what it told of each.
struct ModelLines {
    private(set) var answers: [Answer] = []
    private(set) var told: [[ReplayObservation]] = []
    let findings: [String]

    init(
        _ script: Script, _ theirs: [Answer], _ features: KernelFeatures, _ layout: GuestLayout
    ) throws(PlayError) {
        var features = features
        features.guest = layout
        guard let executor = ModelExecutor(features: features) else {
            throw .unavailable(RealRun.Unavailable(reason: "no room for the model's memory"))
        }
        let listener = Listener()
        executor.journal.observer = listener
        for (line, answer) in zip(script.lines, theirs) {
            answers.append(answer.isNotHere ? answer : executor.perform(line.step, process: line.process))
            told.append(listener.told)
            listener.told = []
        }
        executor.check()
        executor.finish()
        findings = executor.findings.map { "the model, \($0.invariant.code): \($0.reason.text.description)" }
    }

    private final class Listener: EventObserver {
        var told: [ReplayObservation] = []
        override func observe(_ event: Event) {
            // Whether a VM hears of it, the event does not say.
            guard event.kind != .notifierStart, let observation = ReplayObservation(event) else { return }
            told.append(observation)
        }
        override func invalidationStarted(_ first: UInt64, _ count: UInt64) {
            told.append(ReplayObservation(invalidated: first << 12..<(first + count) << 12))
        }
    }
}

extension Step {
    /// What it does beside being fetched, and how it ends, only the processor knows.
    fileprivate var executesUnknownCode: Bool {
        if case .guest(_, let access) = self { access.kind == .exec } else { false }
    }
}

extension ReplayObservation {
    /// Ranges count where scripts have memory.
    fileprivate var isOfScript: Bool { range?.overlaps(HostPlace.regions) ?? true }
}

extension [ReplayObservation] {
    /// The areas that show an object hear of a change to it in no certain order.
    fileprivate var withOrderedRanges: [ReplayObservation] {
        var (ordered, ranges) = ([ReplayObservation](), [ReplayObservation]())
        func flush() {
            ordered += ranges.sorted { ($0.range?.lowerBound ?? 0) < ($1.range?.lowerBound ?? 0) }
            ranges = []
        }
        for observation in self {
            guard observation.range == nil else {
                ranges.append(observation)
                continue
            }
            flush()
            ordered.append(observation)
        }
        flush()
        return ordered
    }

    /// Without what concerns the executor's own slot.
    fileprivate func withoutWalks(in layout: GuestLayout) -> [ReplayObservation] {
        var isOwn = false
        return filter { observation in
            if case .walk(let address, _) = observation.event { isOwn = layout.contains(address) }
            return !isOwn
        }
    }
}
