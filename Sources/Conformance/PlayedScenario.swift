import Interface
import IoctlScript
import JSONOutput
import LinuxKVM
import Machine
import Report

/// A scenario on this machine's kernel: what came of each step, and whether it is what the scenario says.
public struct PlayedScenario: Sendable {
    public struct Step: Sendable, Equatable {
        public var phase: Int
        public var actor: String
        public var action: String
        /// The last access of a step, or the first that was not as expected.
        public var outcome: StepOutcome
        public var isExpected: Bool
    }
    public let name: String
    public let kernel: String
    public let steps: [Step]
    /// What ended the run early, or what could not be prepared; nil: nothing.
    public let failure: String?
    /// The same script's answers on the model and on the kernel, where both were asked.
    public let comparison: IoctlScript.Comparison?
    private let phases: [String]

    /// Whether every step was as the scenario says, and both sides answered alike.
    public var isClean: Bool {
        failure == nil && steps.allSatisfy(\.isExpected) && comparison?.differences.isEmpty ?? true
    }

    /// Plays `plan` in the processes of `run`.
    /// - Parameter compares: the model plays the same script beside it.
    public init(_ plan: Plan, on run: RealRun, comparing compares: Bool) throws(PlayError) {
        let played: PlanScript
        do throws(PlanScript.Unplayable) { played = try PlanScript(plan) } catch { throw .unplayable(error) }
        let script = played.script
        let description: KernelDescription
        var answers: [Answer] = []
        var failure: String?
        do throws(RealRun.Unavailable) {
            description = try KernelDescription(run)
            let end: RealRun.Finding?
            (answers, end) = try run.answersAndEnd(of: script)
            failure = end.map { "\(script.source(of: script.lines[$0.index])): \($0.reason)" }
        } catch {
            throw .unavailable(error)
        }
        for (line, answer) in zip(script.lines, answers).prefix(played.preparation) where failure == nil {
            if answer.outcome != .returned(0) { failure = "\(script.source(of: line)): \(answer)" }
        }
        name = String(decoding: plan.name, as: UTF8.self)
        phases = plan.phases.map { String(decoding: $0.name, as: UTF8.self) }
        kernel = description.release
        self.failure = failure
        let architecture: Architecture = description.features.isTwoStage ? .x86TDP : .x86Shadow
        steps = failure == nil ? Self.steps(played, answers, architecture) : []
        comparison = compares ? Self.compare(script, answers, description.features) : nil
    }

    private static func compare(
        _ script: Script, _ answers: [Answer], _ features: KernelFeatures
    ) -> IoctlScript.Comparison? {
        guard var executor = ModelExecutor(features: features) else { return nil }
        defer { executor.finish() }
        return IoctlScript.Comparison(
            script, ("model", script.run(on: &executor, beside: answers)), ("kvm", answers))
    }

    private static func steps(_ played: PlanScript, _ answers: [Answer], _ architecture: Architecture) -> [Step] {
        let text = ActionText(plan: played.plan)
        return played.places.map { place in
            let task = played.plan.phases[place.phase].tasks[place.task]
            let step = task.steps[place.step]
            let expectation = step.expectation(on: architecture)
            var outcome = StepOutcome.done
            var isExpected = true
            for (repetition, line) in place.lines.enumerated() where isExpected {
                outcome = played.outcome(line, answers[line])
                isExpected = expectation.accepts(outcome, repetition: repetition)
            }
            return Step(
                phase: place.phase, actor: task.actor.text, action: text.describe(step.action), outcome: outcome,
                isExpected: isExpected)
        }
    }

    public var text: String {
        var text = "\(name)  on Linux \(kernel)\n"
        var phase = -1
        for step in steps {
            if step.phase != phase {
                phase = step.phase
                text += "\n\(phases[phase])\n"
            }
            let action = step.action + String(repeating: " ", count: max(0, 52 - step.action.count))
            text += "  " + step.actor + String(repeating: " ", count: max(0, 7 - step.actor.count)) + action
            text += "  \(step.outcome.text)" + (step.isExpected ? "" : "  NOT as the scenario says") + "\n"
        }
        text += "\n"
        if let failure { text += "failed: \(failure)\n" }
        if let comparison, !comparison.differences.isEmpty { text += comparison.text }
        let wrong = steps.filter { !$0.isExpected }.count
        if isClean {
            text += "ok: \(steps.count) steps as the scenario says"
            text += comparison == nil ? "\n" : ", and as on the model\n"
        } else {
            text += "not ok: \(wrong) of \(steps.count) steps are not as the scenario says\n"
        }
        return text
    }

    public var json: String {
        struct Line: Encodable {
            var actor: String
            var action: String
            var outcome: String
            var expected: Bool
        }
        struct Played: Encodable {
            var scenario: String
            var kernel: String
            var steps: [Line]
            var failure: String?
            var differences: Int?
            var clean: Bool
        }
        return jsonText(
            Played(
                scenario: name, kernel: kernel,
                steps: steps.map {
                    Line(actor: $0.actor, action: $0.action, outcome: $0.outcome.text, expected: $0.isExpected)
                }, failure: failure, differences: comparison?.differences.count, clean: isClean))
    }
}

/// Why a scenario was not played.
public enum PlayError: Error, Equatable {
    case unplayable(PlanScript.Unplayable)
    case unavailable(RealRun.Unavailable)
}
