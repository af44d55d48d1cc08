import CFiber
import Explorer
import Frames
import Machine

/// How fast the explorer is, on the basic race: a vCPU's first write to a page against its munmap.
public struct ExplorerBenchmark {
    public struct Result: Sendable, Codable {
        /// Nanoseconds to make a world of two tasks on storage that the last one used, and to end it.
        public var worldStart = 0.0
        public var worldEnd = 0.0
        /// Nanoseconds of a whole run with no explorer attached, one task after the other: what no search can beat.
        public var plainRun = 0.0
        public var schedules = 0
        public var points: UInt64 = 0
        /// Seconds of the complete search: median of several.
        public var seconds = 0.0
        /// The shortest of the searches.
        public var shortest = 0.0
        public var isComplete = false
        /// Bytes of the search itself and of the world.
        public var bytes = 0
        /// Bytes of the process, at the highest, when everything had been measured.
        public var peakMemory = 0
        public var defects: [Found] = []
        public var schedulesPerSecond: Double { Double(schedules) / seconds }
        public var pointsPerSecond: Double { Double(points) / seconds }
    }

    public struct Found: Sendable, Codable {
        public var defect: String
        public var scenario: String
        public var preemptions: Int
        public var runs: Int
        public var seconds: Double
    }

    /// The plan of the basic race.
    public static var basicRace: Plan {
        var plan = Plan()
        plan.name = Array("basic race".utf8)
        plan.ramFrames = 256
        var region = RegionPlan()
        region.name = Array("ram".utf8)
        region.address = UserAddress(0x7f00_0000_0000)
        region.size = 4096
        plan.regions = [region]
        var slot = SlotPlan()
        slot.size = 4096
        plan.slots = [slot]
        var guest = TaskPlan()
        guest.actor = .virtualCPU(0)
        var write = StepPlan(.guest(.write, at: GuestAddress(0), count: 1, stride: 0, value: 1))
        write.expectation = .anything
        guest.steps = [write]
        var host = TaskPlan()
        host.steps = [StepPlan(.munmap(region: 0, offset: 0, length: 4096))]
        var phase = PhasePlan()
        phase.name = Array("fault against munmap".utf8)
        phase.tasks = [guest, host]
        plan.phases = [phase]
        return plan
    }

    /// Nil: no room for the world.
    public static func run(quick: Bool) -> Result? {
        guard let subject = WorldSubject(basicRace, speculates: false) else { return nil }
        var result = Result()
        let rounds = quick ? 100 : 20_000
        (result.worldStart, result.worldEnd) = subject.timeWorlds(rounds)
        result.plainRun = subject.timePlainRuns(rounds)
        let explorer = Explorer(subject)
        // The same search again and again: other work on the machine makes single ones as slow as half.
        var coverage = Explorer.Coverage()
        var times: [Double] = []
        for _ in 0..<(quick ? 1 : 15) {
            let start = fl_nanoseconds()
            coverage = explorer.search(Strategy(), runLimit: quick ? 200 : .max) { _ in true }
            times.append(Double(fl_nanoseconds() - start) / 1e9)
        }
        times.sort()
        result.seconds = times[times.count / 2]
        result.shortest = times[0]
        result.schedules = coverage.runs
        result.points = coverage.points
        result.isComplete = coverage.isComplete
        result.bytes = coverage.bytes + World.arenaSize(for: basicRace)
        return result
    }

    /// Looks for a defect in a plan, as `check` does; nil if it isn't found.
    public static func find(_ exhibit: Exhibit, _ scenario: String, _ plan: Plan, _ known: KnownDeviations) -> Found? {
        guard
            let subject = WorldSubject(
                plan, policy: exhibit.policy ?? .precise, architecture: exhibit.architecture)
        else { return nil }
        subject.known = known
        let start = fl_nanoseconds()
        let report = Checker(Explorer(subject, defects: 1 << UInt64(exhibit.defect.rawValue))).check()
        guard let run = report.finding else { return nil }
        return Found(
            defect: exhibit.name, scenario: scenario, preemptions: run.preemptions, runs: report.runs,
            seconds: Double(fl_nanoseconds() - start) / 1e9)
    }
}

extension WorldSubject {
    /// Nanoseconds of a run without an explorer: median.
    func timePlainRuns(_ rounds: Int) -> Double {
        var times: [UInt64] = []
        for _ in 0..<rounds {
            let start = fl_nanoseconds()
            begin()
            for task in 0..<taskCount(0) { runTask(0, task) }
            endPhase(0)
            _ = finish()
            times.append(fl_nanoseconds() - start)
        }
        times.sort()
        return Double(times[rounds / 2])
    }

    /// Nanoseconds to make and to end a world that nothing ran in: medians.
    func timeWorlds(_ rounds: Int) -> (start: Double, end: Double) {
        var starts: [UInt64] = []
        var ends: [UInt64] = []
        for _ in 0..<rounds {
            let a = fl_nanoseconds()
            begin()
            let b = fl_nanoseconds()
            _ = finish()
            let c = fl_nanoseconds()
            starts.append(b - a)
            ends.append(c - b)
        }
        starts.sort()
        ends.sort()
        return (Double(starts[rounds / 2]), Double(ends[rounds / 2]))
    }
}
