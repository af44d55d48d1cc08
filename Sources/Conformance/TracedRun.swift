import CKVMInterface
import Explanations
import Interface
import IoctlScript
import LinuxKVM
import Replay
import TraceAudit

/// This machine's kernel, recorded: scripts run on it one after another, each beside the model.
public final class TracedRun {
    private let run: RealRun
    private let description: KernelDescription
    var features: KernelFeatures { description.features }

    private let rules: TraceRules

    /// - Parameters:
    ///   - options: of the run; it records, whatever they say.
    ///   - rules: beside those that this project knows.
    public init(_ options: RealRun.Options, rules: [Explanation] = []) throws(RealRun.Unavailable) {
        self.rules = TraceRules(events: Self.known.events + rules, answers: Self.known.answers)
        var options = options
        options.records = true
        run = try RealRun(options)
        description = try KernelDescription(run)
        guard !description.features.isTwoStage else {
            throw RealRun.Unavailable(
                reason: "this kernel translates in two stages, whose events are not compared: only those of shadow "
                    + "paging are")
        }
    }

    /// Those that are part of the program: of events Rules/traced.yaml.
    static let known: TraceRules = {
        do throws(ExplanationError) {
            let text = String(decoding: PackageResources.traced_yaml, as: UTF8.self)
            return TraceRules(
                events: try ExplanationFile(text: text, file: "traced.yaml").rules, answers: try AnswerRule.known())
        } catch { preconditionFailure("\(error)") }
    }()

    /// Runs a script of one VM, whose guest makes accesses of whole words, and compares. Throws `PlayError` and
    /// `AuditInputError`, and what `copy` throws.
    /// - Parameter copy: is given the recording's path: the file is there until the next script.
    public func compare(
        _ script: Script, name: String, copying copy: (String) throws -> Void = { _ in }
    ) throws -> TracedScript {
        try compare(script, name: name, copying: copy) { $0 }
    }

    /// - Parameter change: of a recorded event; nil: it is left out.
    func compare(
        _ script: Script, name: String, copying copy: (String) throws -> Void = { _ in },
        _ change: @escaping (ReplayObservation) -> ReplayObservation?
    ) throws -> TracedScript {
        var features = features
        let forks = script.lines.contains { if case .fork = $0.step { true } else { false } }
        for _ in 0..<5 {
            let before = disturbances()
            let result = try features.withSteadySwap { try compare(script, name: name, $0, copying: copy, change) }
            // What the kernel's own threads do to pages, KVM hears of as well. And a page whose other owner has ended is
            // copied, not reused, while anybody else in the kernel looks at it.
            if result.report.isFaithful || (!forks && disturbances() == before) { return result }
        }
        return try features.withSteadySwap { try compare(script, name: name, $0, copying: copy, change) }
    }

    private func compare(
        _ script: Script, name: String, _ features: KernelFeatures, copying copy: (String) throws -> Void,
        _ change: @escaping (ReplayObservation) -> ReplayObservation?
    ) throws -> TracedScript {
        if let line = script.lines.first(where: { $0.step.whyUntraceable != nil }), let why = line.step.whyUntraceable {
            throw PlayError.unplayable(PlanScript.Unplayable(description: "\(script.source(of: line)): \(why)"))
        }
        let (answers, end): ([Answer], RealRun.Finding?)
        do throws(RealRun.Unavailable) { (answers, end) = try run.answersAndEnd(of: script) } catch {
            throw PlayError.unavailable(error)
        }
        let layout = run.guestLayout
        run.finish()
        guard let path = run.recordingPath else {
            throw PlayError.unavailable(RealRun.Unavailable(reason: "the child that records has ended"))
        }
        try copy(path)
        let recording = LineRecording(lines: script.lines.count, change)
        let audited = try auditText(path: path, follower: recording)
        let model = try ModelLines(script, answers, features, layout)
        var findings = model.findings
        if let end { findings.append("\(script.source(of: script.lines[end.index])): \(end.reason)") }
        if audited.lostEvents > 0 { findings.append("the kernel lost \(audited.lostEvents) events") }
        findings += audited.findings.map { "the recording, \($0.rule): \($0.text)" }
        return TracedScript(
            script, name: name, kernel: description.release, recording, answers, model, findings: findings, layout,
            rules)
    }
}

extension Step {
    /// Nil: the model's guest can do it on page tables of its own.
    fileprivate var whyUntraceable: String? {
        switch self {
        case .guest(_, let access) where access.size != 8 || access.address % 8 != 0 || access.emulated:
            "only accesses of whole words, by the processor, are traced"
        case .createVM(let vm, _) where vm > 0: "one VM is traced, the first"
        case .enableCapability(_, UInt64(KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP), _, _):
            "the executor's own slot is in the way"
        default: nil
        }
    }
}
