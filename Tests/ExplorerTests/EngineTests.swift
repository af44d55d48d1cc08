import Audit
import Explorer
import Foundation
import Frames
import HostMemory
import Machine
import Synchrony
import Testing

@testable import Laboratory

/// A run is a function of its schedule, and what can't end is said.
@Suite struct RunsAndSchedules {
    private final class Two: Subject {
        let body: (Two, Int) -> Void
        var words: [ObjectIdentity] = []
        var values = [0, 0]
        var locks: [SpinLock] = []
        var queue = SleepQueue()
        var order: [Int] = []
        var abandoned = 0
        init(_ body: @escaping (Two, Int) -> Void) { self.body = body }
        override func begin() {
            words = [ObjectIdentity(), ObjectIdentity()]
            values = [0, 0]
            locks = [SpinLock(.pageTable), SpinLock(.zone)]
            queue = SleepQueue()
            order = []
        }
        override func taskCount(_ phase: Int) -> Int { 2 }
        override func runTask(_ phase: Int, _ task: Int) { body(self, task) }
        override func abandon() { abandoned += 1 }
        func point(_ word: Int) { schedulingPoint(.atomicUpdate, words[word].value) }
    }

    @Test func `the same schedule gives the same run, and an impossible one is refused where it is impossible`() {
        let subject = Two { two, task in
            for _ in 0..<3 {
                two.point(0)
                two.order.append(task)
            }
        }
        let explorer = Explorer(subject)
        let run = explorer.replay(Schedule([0, 0, 1, 1, 0, 1]))
        #expect(run.misfit == nil && run.isClean)
        #expect(subject.order == [0, 1, 0, 1, 0, 1].map { $0 } || subject.order.count == 6)
        let order = subject.order
        #expect(explorer.replay(run.schedule).schedule == run.schedule)
        #expect(subject.order == order)
        #expect(explorer.replay(Schedule([0, 0, 2])).misfit == 2)
        #expect(explorer.replay(Schedule([UInt8](repeating: 0, count: 5))).misfit == 4)
        #expect(explorer.replay(Schedule(run.schedule.choices + [0])).unused == 1)
    }

    @Test func `a schedule's text reads back, and what is none says where`() throws {
        for choices in [[], [0], [0, 0, 1], [2, 1, 1, 1, 15]] as [[UInt8]] {
            #expect(try Schedule(parsing: Schedule(choices).description) == Schedule(choices))
        }
        for (text, position) in [("", 0), ("A", 0), ("A1..B2", 3), ("A1.B-2", 3), ("A1.b2", 3), ("A9999999", 0)] {
            #expect(throws: ScheduleError.self) { try Schedule(parsing: text) }
            do { _ = try Schedule(parsing: text) } catch { #expect(error.position == position, "\(text)") }
        }
    }

    @Test func `locks in a circle are a deadlock`() {
        let subject = Two { two, task in
            two.locks[task].lock()
            two.locks[1 - task].lock()
            two.locks[1 - task].unlock()
            two.locks[task].unlock()
        }
        var endings: [RunEnding] = []
        let coverage = Explorer(subject).search(Strategy()) { run in
            endings.append(run.ending)
            return true
        }
        #expect(coverage.isComplete)
        #expect(!endings.isEmpty && endings.allSatisfy { $0 == .stuck(.deadlock) })
        #expect(subject.abandoned == endings.count)
    }

    @Test func `a wake-up before the sleep that nobody repeats is a lost one`() {
        let subject = Two { two, task in
            if task == 0 {
                // The condition is looked at before the sleeper is announced.
                two.point(0)
                if two.values[0] == 0 { two.queue.wait { two.values[1] == 1 } }
            } else {
                two.point(0)
                two.values[0] = 1
                two.queue.wake()
            }
        }
        var endings: Set<String> = []
        _ = Explorer(subject).search(Strategy()) { run in
            endings.insert("\(run.ending)")
            return true
        }
        #expect(endings == ["stuck(Explorer.StuckKind.lostWakeUp)"])
    }

    @Test func `waiting for what nobody will do is a livelock, and so is a run without an end`() {
        let waits = Two { two, task in
            if task == 0 { spinUntil(two.words[1].value) { two.values[1] == 1 } }
        }
        #expect(Explorer(waits).replay(Schedule()).ending == .stuck(.livelock))
        let spins = Two { two, task in
            if task == 0 { while two.values[1] == 0 { two.point(0) } }
        }
        let explorer = Explorer(spins)
        explorer.depthLimit = 100
        #expect(explorer.replay(Schedule()).ending == .endless)
    }

    @Test func `a task that is starved is no livelock: every task gets its turn in the end`() {
        let subject = Two { two, task in
            if task == 0 { while two.values[1] == 0 { two.point(0) } } else { two.values[1] = 1 }
        }
        let explorer = Explorer(subject)
        explorer.depthLimit = 100
        #expect(explorer.replay(Schedule()).ending == .finished)
    }

    @Test func `random walks find what needs one ordered pair, the same with the same seed`() {
        func lost(_ seed: UInt64) -> String? {
            let subject = Two { two, task in
                two.point(0)
                let old = two.values[0]
                two.point(0)
                two.values[0] = old + 1
            }
            final class Wrong { var schedule: String? }
            let wrong = Wrong()
            let checked = Checked(subject)
            _ = Explorer(checked).walk(runs: 500, changes: 2, points: 6, seed: seed) { run in
                wrong.schedule = "\(run.schedule)"
                return false
            }
            return wrong.schedule
        }
        #expect(lost(1) != nil && lost(1) == lost(1))
    }

    /// Wrong if an update was lost.
    private final class Checked: Subject {
        let inner: Two
        init(_ inner: Two) { self.inner = inner }
        override func begin() { inner.begin() }
        override func taskCount(_ phase: Int) -> Int { 2 }
        override func runTask(_ phase: Int, _ task: Int) { inner.runTask(phase, task) }
        override func finish() -> Bool { inner.values[0] == 2 }
    }

    // MARK: Traps

    /// Task B divides by what task A has made zero meanwhile.
    private static func trapping() -> Subject {
        Two { two, task in
            two.point(0)
            if task == 0 {
                two.values[0] = 1
                two.point(0)
                two.values[0] = 0
            } else if two.values[0] == 1 {
                two.point(0)
                two.values[1] = 1 / two.values[0]
            }
        }
    }

    @Test func `a trap in the code under test is a finding: it prints task and schedule, and ends with 1`() async throws
    {
        let result = try #require(
            await #expect(processExitsWith: .exitCode(1), observing: [\.standardOutputContent]) {
                let explorer = Explorer(RunsAndSchedules.trapping())
                "faultline check \"x\".yaml".withCString { command in
                    explorer.trapReport(command: command, json: false).install()
                    _ = explorer.search(Strategy()) { _ in true }
                }
            })
        let lines = String(decoding: result.standardOutputContent, as: UTF8.self).split(separator: "\n")
        let found = try #require(lines.firstIndex { $0.hasPrefix("found: the core trapped (SIG") })
        #expect(lines[found].contains("in task B"))
        let schedule = try #require(lines.first { $0.hasPrefix("schedule: ") }).dropFirst(10)
        #expect(lines.contains("reproduce: faultline check \"x\".yaml --schedule \(schedule)"))
        // The schedule is one that traps: B looks, A changes its mind, B divides.
        let choices = try Schedule(parsing: String(schedule)).choices
        #expect(choices.last == 1 && choices.contains(0))
    }

    @Test func `and so it does as JSON`() async throws {
        let result = try #require(
            await #expect(processExitsWith: .exitCode(1), observing: [\.standardOutputContent]) {
                let explorer = Explorer(RunsAndSchedules.trapping())
                "faultline check \"x\".yaml --json".withCString { command in
                    explorer.trapReport(command: command, json: true).install()
                    _ = explorer.search(Strategy()) { _ in true }
                }
            })
        let output = String(decoding: result.standardOutputContent, as: UTF8.self)
        let line = try #require(output.split(separator: "\n").first { $0.hasPrefix("{") })
        let report = try #require(try JSONSerialization.jsonObject(with: Data(line.utf8)) as? [String: String])
        #expect(report["verdict"] == "trap" && report["task"] == "B")
        #expect(report["reproduce"]?.hasPrefix("faultline check \"x\".yaml --json --schedule ") == true)
    }

    // MARK: Fresh worlds

    @Test(arguments: ["race-dirty-log", "race-buffer-move", "race-slot-delete", "race-fork-write", "anonymous"])
    func `a world on storage that another used is the same world`(_ name: String) throws {
        let plan = try shippedScenario(name).plan
        func outcome(_ subject: WorldSubject) throws -> RunOutcome {
            subject.keepsEvents = true
            #expect(Explorer(subject).replay(Schedule()).misfit == nil)
            return try #require(subject.outcome)
        }
        let used = try #require(WorldSubject(plan))
        // A few hundred worlds, each interrupted elsewhere, leave what they leave.
        _ = Explorer(used).walk(runs: 300, changes: 4, points: 60, seed: 7) { _ in true }
        let late = try outcome(used)
        let fresh = try outcome(try #require(WorldSubject(plan)))
        #expect(!fresh.events.isEmpty && late.events == fresh.events)
        #expect(late.steps == fresh.steps && late.regions == fresh.regions)
    }

    @Test(arguments: PolicyName.allCases, Architecture.allCases)
    func `nothing of a world is left after its end`(_ policy: PolicyName, _ architecture: Architecture) throws {
        let plan = try shippedScenario("race-dirty-log").plan
        let subject = try #require(WorldSubject(plan, policy: policy, architecture: architecture))
        weak var memory: PhysicalMemory?
        weak var world: World?
        subject.begin()
        (memory, world) = (subject.world.host.memory, subject.world)
        #expect(memory != nil && world != nil)
        for phase in 0..<subject.phaseCount {
            for task in 0..<subject.taskCount(phase) { subject.runTask(phase, task) }
            subject.endPhase(phase)
        }
        _ = subject.finish()
        // What went wrong stays until the next world.
        subject.begin()
        #expect(memory == nil && world == nil)
    }

    @Test func `no byte of an earlier world shows in a later one`() throws {
        var plan = ExplorerBenchmark.basicRace
        plan.regions[0].size = 16 * 4096
        plan.slots[0].size = 16 * 4096
        var guest = plan.phases[0].tasks[0]
        // The first word gets the page its frame; the second must be zero, and is not left so.
        let fill = StepPlan(.guest(.write, at: GuestAddress(0), count: 16, stride: 4096, value: .max))
        var look = StepPlan(.guest(.read, at: GuestAddress(8), count: 16, stride: 4096, value: 0))
        look.expectation = .value(0)
        let spoil = StepPlan(.guest(.write, at: GuestAddress(8), count: 16, stride: 4096, value: .max))
        guest.steps = [fill, look, spoil]
        plan.phases[0].tasks = [guest]
        let explorer = Explorer(try #require(WorldSubject(plan)))
        for _ in 0..<3 { #expect(explorer.replay(Schedule()).isClean) }
    }

    @Test func `the basic race is explored completely, without a finding, from a fresh world each time`() throws {
        let subject = try #require(WorldSubject(ExplorerBenchmark.basicRace, speculates: false))
        let explorer = Explorer(subject)
        let coverage = explorer.search(Strategy()) { run in
            Issue.record("\(run.schedule)")
            return false
        }
        #expect(coverage.isComplete && coverage.runs > 100)
    }
}
