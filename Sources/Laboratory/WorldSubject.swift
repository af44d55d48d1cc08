// Laboratory: a scenario's plan under the explorer, the museum of defects, and what comes of a check.

import Audit
import CSchedule
import Explorer
import Frames
import Machine

/// A plan as the explorer's program: each run is a fresh world. The tasks of a phase are the plan's, and after them a
/// hardware task for each vCPU that has one there (speculative walks).
public final class WorldSubject: Subject {
    public let plan: Plan
    public let policy: PolicyName
    public let architecture: Architecture
    /// Whether vCPUs walk speculatively.
    public let speculates: Bool
    /// What the scenario's file says that the policy breaks anyhow: no finding of the check's.
    public var known = KnownDeviations()
    /// Whether journals keep their events: for the story of one run, not for searching.
    public var keepsEvents = false
    private let storage: WorldStorage
    /// The world of the present or last run.
    public private(set) var world: World!
    /// What the last run that was followed to its end with `keepsEvents` gave.
    public private(set) var outcome: RunOutcome?
    private let speculators: [[Int]]

    /// Nil: no room for the arena. The plan must be one that `run` can set up.
    public init?(
        _ plan: Plan, policy: PolicyName = .precise, architecture: Architecture? = nil, speculates: Bool = true
    ) {
        self.plan = plan
        self.policy = policy
        self.architecture = architecture ?? plan.architecture
        self.speculates = speculates
        guard let storage = WorldStorage(for: plan) else { return nil }
        self.storage = storage
        speculators = plan.phases.indices.map { speculates ? World.speculators(plan, $0) : [] }
    }

    public override func begin() {
        outcome = nil
        samples.removeAll(keepingCapacity: true)
        endMarks = [:]
        // The last world gives its storage back before the next takes it.
        world = nil
        do throws(PlanError) {
            world = try World(
                plan, policy: policy, architecture: architecture, storage: storage.memory, keepsEvents: keepsEvents)
        } catch {
            preconditionFailure("the plan can't be set up: \(error)")
        }
    }

    public override var phaseCount: Int { plan.phases.count }

    public override func taskCount(_ phase: Int) -> Int { plan.phases[phase].tasks.count + speculators[phase].count }

    public override func runTask(_ phase: Int, _ task: Int) {
        let count = plan.phases[phase].tasks.count
        if task < count {
            world.runTask(phase, task)
        } else {
            world.speculate(phase, speculators[phase][task - count])
        }
    }

    public override func endPhase(_ phase: Int) {
        if keepsEvents { endMarks[phase] = world.journal.count }
        world.endPhase(phase)
    }

    public override func finish() -> Bool {
        if keepsEvents {
            let result = world.finish()
            outcome = result
            return result.findings.allSatisfy { known.rules.contains($0.invariant) } && result.holdings.isEmpty
                && (known.unexpectedSteps || result.unexpected.isEmpty)
        }
        let clean = world.conclude(ignoring: known)
        // Before the next run: the storage is one world's at a time.
        if clean { world = nil }
        return clean
    }

    public override func mark() -> Int {
        samples.append(watched.flatMap { world.host.memory.inspect($0)?.headReferenceCount })
        return world.journal.count
    }
    /// The page whose count is noted at each point of a recorded run, and the counts.
    var watched: HostFrame?
    private(set) var samples: [Int?] = []
    /// The journal's length at the end of each phase of a run with events.
    private(set) var endMarks: [Int: Int] = [:]

    public override func abandon() {
        // The tasks' stacks still refer to it; it is never ended.
        abandoned = world.map { Unmanaged.passRetained($0) }
        storage.replace()
    }
    private var abandoned: Unmanaged<World>?

    /// The name of a task of a phase, as the story shows it.
    public func taskName(_ phase: Int, _ task: Int) -> String {
        let tasks = plan.phases[phase].tasks
        guard task < tasks.count else { return "cpu\(speculators[phase][task - tasks.count]) walk" }
        switch tasks[task].actor {
        case .virtualCPU(let number): return "vcpu\(number)"
        case .host: return "host"
        case .background(let task): return "\(task.name)"
        }
    }
}
