import CFiber
import CSchedule
import SeededRandom

/// Runs a subject in many orders. Not to be shared between threads; several explorers can work on several threads.
public final class Explorer {
    private let engine: Engine
    public let subject: Subject

    /// - Parameter defects: bit n switches defect n of the museum on, in every run.
    public init(_ subject: Subject, defects: UInt64 = 0) {
        self.subject = subject
        engine = Engine(subject, defects: defects)
    }

    deinit { engine.deallocate() }

    /// One run.
    public struct Run: Sendable {
        /// Who went on at each point.
        public var schedule: Schedule
        /// The beginning of it that must be asked for: the default order gives the rest. Nil: not looked for.
        public var asked: Schedule?
        public var preemptions: Int
        public var ending: RunEnding
        /// Whether all tasks ended and the subject found nothing wrong.
        public var isClean: Bool
        /// The point at which the schedule asked for a task that could not go on; nil if it fits.
        public var misfit: Int?
        /// Choices of the schedule that were not asked for, since the run was over before.
        public var unused: Int
        /// What each transition did, if asked for.
        public var records: [PointRecord]
        /// Of a run that got stuck: each task that could not go on, and what it waited for.
        public var waiting: [String]
    }

    /// Points after which a run is cut: it is driven to its end in the default order, and what lies beyond is not known.
    public var depthLimit: Int {
        get { engine.state.pointee.depthLimit }
        set {
            precondition(newValue > 0 && newValue <= Self.greatestDepth)
            engine.state.pointee.depthLimit = newValue
        }
    }

    public static let greatestDepth = 500_000

    /// Follows `schedule`, then the default order.
    public func replay(_ schedule: Schedule, recording: Bool = false) -> Run {
        engine.state.pointee.mode = .replay
        engine.state.pointee.force(schedule.choices)
        engine.state.pointee.isRecording = recording
        defer { engine.state.pointee.isRecording = false }
        let clean = engine.run()
        return result(clean, wanted: schedule.choices.count)
    }

    private func result(_ clean: Bool, wanted: Int = 0) -> Run {
        let state = engine.state
        let count = Int(state.pointee.count)
        return Run(
            schedule: Schedule(Array(UnsafeBufferPointer(start: state.pointee.choices, count: count))),
            preemptions: state.pointee.preemptions, ending: state.pointee.ending,
            isClean: clean && state.pointee.ending == .finished,
            misfit: state.pointee.misfit < 0 ? nil : state.pointee.misfit, unused: max(wanted - count, 0),
            records: state.pointee.records, waiting: state.pointee.waitingTasks())
    }

    /// What a search did.
    public struct Coverage: Sendable, Equatable {
        public var runs = 0
        public var points: UInt64 = 0
        /// Nothing was left out because of a bound or the limit of runs: every order is known.
        public var isComplete = false
        /// Within the bound on preemptions nothing was left out.
        public var isCompleteWithinBound = false
        public var wasTooDeep = false
        /// Memory of the search itself, in bytes.
        public var bytes = 0
        public init(runs: Int = 0, points: UInt64 = 0) {
            self.runs = runs
            self.points = points
        }
    }

    /// Makes every run that `strategy` asks for, at most `runLimit`, and shows each that is not clean to `found`, which
    /// says whether to go on.
    /// - Parameter each: called after every run that was not cut short by the reduction.
    public func search(
        _ strategy: Strategy, runLimit: Int = .max, each: (() -> Void)? = nil, found: (Run) -> Bool
    ) -> Coverage {
        let state = engine.state
        state.pointee.mode = .search
        state.pointee.strategy = strategy
        state.pointee.frameCount = 0
        state.pointee.forcedCount = 0
        state.pointee.poolTop = 0
        state.pointee.wasCut = false
        state.pointee.wasTooDeep = false
        var coverage = Coverage()
        var goesOn = true
        while goesOn {
            let clean = engine.run()
            coverage.runs += 1
            coverage.points += state.pointee.count
            if clean, state.pointee.ending == .finished {
                if let each, !state.pointee.draining { each() }
            } else {
                goesOn = found(result(clean))
            }
            guard goesOn else { break }
            guard state.pointee.backtrack() else {
                coverage.isCompleteWithinBound = !state.pointee.wasTooDeep
                coverage.isComplete = !state.pointee.wasCut
                break
            }
            if coverage.runs >= runLimit { break }
        }
        coverage.wasTooDeep = state.pointee.wasTooDeep
        coverage.bytes = state.pointee.byteCount
        return coverage
    }

    /// Runs with random priorities that change at `changes` random points: a fault that needs as many ordered events is
    /// found in each run with a probability of at least 1 / (tasks * points^(changes - 1)).
    /// Source: Burckhardt and others, "A randomized scheduler with probabilistic guarantees of finding bugs".
    public func walk(runs: Int, changes: Int, points: Int, seed: UInt64, found: (Run) -> Bool) -> Coverage {
        let state = engine.state
        state.pointee.mode = .random
        var random = SplitMix(seed: seed)
        var coverage = Coverage()
        for _ in 0..<runs {
            for task in 0..<Subject.mostTasks {
                state.pointee.priorities[task] = Int32(truncatingIfNeeded: random.next() >> 33)
            }
            state.pointee.lowest = 0
            state.pointee.changePoints = (0..<changes).map { _ in
                UInt64.random(in: 1...UInt64(max(points, 1)), using: &random)
            }
            let clean = engine.run()
            coverage.runs += 1
            coverage.points += state.pointee.count
            if !(clean && state.pointee.ending == .finished), !found(result(clean)) { break }
        }
        return coverage
    }

    /// What a trap handler needs to know of the run that is under way. Valid as long as the explorer.
    public func trapReport(command: UnsafePointer<CChar>, json: Bool) -> TrapReport {
        TrapReport(engine.state, command, json)
    }
}

/// The handler of traps in the code under test: prints task and schedule, and ends the process with status 1.
public struct TrapReport {
    private let report: UnsafeMutablePointer<fl_trap_report>

    init(_ state: UnsafeMutablePointer<EngineState>, _ command: UnsafePointer<CChar>, _ json: Bool) {
        report = .allocate(capacity: 1)
        report.initialize(to: fl_trap_report())
        report.pointee.choices = UnsafePointer(state.pointee.choices)
        report.pointee.command = command
        report.pointee.json = json ? 1 : 0
        let raw = UnsafeMutableRawPointer(state)
        report.pointee.count = UnsafePointer(
            (raw + MemoryLayout<EngineState>.offset(of: \EngineState.count)!).assumingMemoryBound(to: UInt64.self))
        report.pointee.running = UnsafePointer(
            (raw + MemoryLayout<EngineState>.offset(of: \EngineState.current)!).assumingMemoryBound(to: UInt32.self))
    }

    public func install() { fl_trap_install(report) }

    public func remove() {
        fl_trap_install(nil)
        report.deallocate()
    }
}
