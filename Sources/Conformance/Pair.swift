import Audit
import Explanations
import Interface
import IoctlScript
import LinuxKVM
import Report

/// The kernel's side and the model, and one script after another on both.
actor Pair {
    private let real: RealRun
    private let storage: ModelStorage
    private var features: KernelFeatures
    private let rules: [AnswerRule]

    init(
        _ real: sending RealRun, _ features: KernelFeatures, _ rules: [AnswerRule]
    ) throws(RealRun.Unavailable) {
        guard let storage = ModelStorage() else { throw RealRun.Unavailable(reason: "no room for the model's memory") }
        self.real = real
        self.storage = storage
        self.features = features
        self.rules = rules
    }

    /// Runs the scripts of these numbers, up to the first that shows something.
    func round(_ scripts: Range<UInt64>, of seed: UInt64) -> Round {
        var round = Round(tally: Tally(seed: seed, kernel: ""))
        do throws(RealRun.Unavailable) {
            for number in scripts {
                var source = RandomScripts(seed: seed &+ number, features.profile)
                let script = source.script()
                var run = try run(script)
                if run.text != nil, run.isDisturbed, let calm = try settled(script) {
                    round.tally.disturbed += 1
                    run = calm
                }
                round.tally.scripts += 1
                run.add(to: &round.tally)
                if let text = run.text {
                    round.found = (number, try found(script, text, seed: seed &+ number))
                    break
                }
            }
        } catch {
            round.unavailable = error
        }
        return round
    }

    /// The script again, up to three times, after a run in which the kernel's own threads touched processes' memory: what it
    /// comes to where the difference does not come again; nil: it does.
    private func settled(_ script: Script) throws(RealRun.Unavailable) -> ScriptRun? {
        for _ in 0..<3 {
            let again = try run(script)
            if again.text == nil { return again }
            if !again.isDisturbed { return nil }
        }
        return nil
    }

    /// Shrinks what a script has shown. A call that the kernel does not return from is not waited for again and again.
    private func found(
        _ script: Script, _ text: String, seed: UInt64
    ) throws(RealRun.Unavailable) -> Campaign.Found {
        let again = try run(script)
        guard again.text != nil, again.ending == nil else {
            return Campaign.Found(seed: seed, script: script, text: text, isRepeatable: again.text != nil)
        }
        var failure: RealRun.Unavailable?
        let shrunk = script.shrunk { candidate in
            do throws(RealRun.Unavailable) { return try run(candidate).text != nil } catch {
                failure = error
                return false
            }
        }
        if let failure { throw failure }
        let last = try run(shrunk)
        return Campaign.Found(
            seed: seed, script: shrunk.renumbered, text: last.text ?? text, isRepeatable: last.text != nil)
    }

    private func run(_ script: Script) throws(RealRun.Unavailable) -> ScriptRun {
        try features.withSteadySwap { features throws(RealRun.Unavailable) in try run(script, features) }
    }

    private func run(_ script: Script, _ features: KernelFeatures) throws(RealRun.Unavailable) -> ScriptRun {
        let before = disturbances()
        let (answers, end) = try real.answersAndEnd(of: script)
        let ending = end.map { end in
            let line = script.lines[end.index]
            return "\(line.number): \(script.source(of: line)): \(end.reason)"
        }
        let isDisturbed = disturbances() != before
        var executor = ModelExecutor(storage, features: features)
        let model = script.run(on: &executor, beside: answers)
        executor.check()
        executor.finish()
        var run = ScriptRun(script, model: model, kvm: answers, ending: ending, executor.findings, rules)
        run.isDisturbed = isDisturbed
        return run
    }
}

/// One script on both sides.
struct ScriptRun {
    private let script: Script
    private let kvm: [Answer]
    let comparison: IoctlScript.Comparison
    /// The call that the kernel did not return from.
    let ending: String?
    private let findings: [Finding]
    /// Lines that were compared: up to the first difference that a rule explains.
    private let compared: Int
    private let rule: AnswerRule?
    /// The kernel's own threads moved or took pages meanwhile, it may be of the script's processes.
    var isDisturbed = false

    init(
        _ script: Script, model: [Answer], kvm: [Answer], ending: String?, _ findings: [Finding], _ rules: [AnswerRule]
    ) {
        self.script = script
        self.kvm = kvm
        self.ending = ending
        self.findings = findings
        let whole = IoctlScript.Comparison(
            script, ("model", script.comparable(model)), ("kvm", script.comparable(kvm)))
        var (compared, rule) = (kvm.count, AnswerRule?.none)
        if !rules.isEmpty, let first = whole.differences.first,
            let index = script.lines.firstIndex(where: { $0 == first.line })
        {
            rule = rules.first(
                explaining: script, index, model: "\(first.answers[0])", kvm: "\(first.answers[1])")
            if rule != nil { compared = index + 1 }
        }
        self.compared = compared
        self.rule = rule
        comparison = rule == nil ? whole : IoctlScript.Comparison(script, ("model", []), ("kvm", []))
    }

    /// Differences that no rule explains, broken rules, and what the kernel did not return from; nil: nothing.
    var text: String? {
        var parts = findings.map { "model: \($0.invariant.code) \($0.reason.text.description)\n" }
        if let ending { parts.append("kvm: \(ending)\n") }
        if !comparison.differences.isEmpty { parts.append(comparison.text) }
        return parts.isEmpty ? nil : parts.joined()
    }

    func add(to tally: inout Tally) {
        tally.steps += kvm.count
        var shown = ShownMemory()
        for (index, (line, answer)) in zip(script.lines, kvm).enumerated() {
            if shown.isTouched(by: line.step) { tally.touching += 1 }
            shown.note(line.step, answer)
            tally.count(line.step, answer)
            if index < compared, !answer.isNotHere { tally.compared += 1 } else { tally.notCompared += 1 }
        }
        if let rule { tally.explained[rule.name, default: 0] += 1 }
    }
}

extension Script {
    /// Answers as they are compared: statistics without their numbers, since those of the faults that the executor's own
    /// guest code needs are among them, and no two kinds of tables have the same.
    fileprivate func comparable(_ answers: [Answer]) -> [Answer] {
        zip(lines, answers).map { line, answer in answer.comparable(to: line.step) }
    }
}

extension Answer {
    /// Statistics without their numbers.
    func comparable(to step: Step) -> Answer {
        guard case .statistics = step else { return self }
        var answer = self
        for index in answer.fields.indices {
            if case .decimal = answer.fields[index].value { answer.fields[index].value = .word("counted") }
        }
        return answer
    }
}
