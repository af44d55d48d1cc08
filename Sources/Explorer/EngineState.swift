import CFiber
import CSchedule
import Synchrony

/// One task of the running phase. The hooks get a pointer to `base`, which therefore comes first.
struct TaskState {
    var base = fl_task()
    var engine: UnsafeMutablePointer<EngineState>
    var number: UInt32
    var fiber = fl_fiber()
    var finished = true
    /// What it does first when it goes on.
    var pending: UInt32 = 0
    /// The object's index; unused where the operation touches nothing.
    var pendingObject = 0
    var pendingName: UInt64 = 0
    /// For a waiter: the object's version that it has seen, and the event that changed it since.
    var seenVersion: UInt32 = 0
    var enabler: UInt32 = 0

    var pendingAccess: ObjectAccess { ObjectAccess(rawValue: pending & 0xf) ?? .none }
    var isWaiting: Bool { pendingAccess == .wait }
}

/// One object that a transition touched.
struct Touch {
    var object: UInt32
    var access: ObjectAccess

    /// Locks count as words that their operations write: two shared holders commute.
    private var weight: ObjectAccess {
        switch access {
        case .acquire, .release: .write
        case .acquireShared, .releaseShared: .accumulate
        case .wait: .read
        default: access
        }
    }

    func conflicts(with other: Touch) -> Bool {
        guard object == other.object else { return false }
        let (a, b) = (weight, other.weight)
        if a == .none || b == .none { return false }
        return a == .write || b == .write || a != b
    }
}

/// What a run noted of one transition, for the story.
public struct PointRecord: Sendable {
    public var task: UInt8
    public var phase: Int
    public var operation: UInt32
    public var object: UInt64
    /// The subject's mark when the transition began.
    public var mark: Int
}

/// How the tasks of a run came to an end.
public enum RunEnding: Sendable, Equatable {
    /// All tasks ran to their end.
    case finished
    /// Tasks that wait for each other, or for what nobody will do.
    case stuck(StuckKind)
    /// A task went on and on.
    case endless
}

public enum StuckKind: Sendable, Equatable {
    /// Locks in a circle.
    case deadlock
    /// A task sleeps, and whoever should have woken it is gone.
    case lostWakeUp
    /// A task tries again until something changes, and nobody is left to change it.
    case livelock
}

/// Everything that one engine knows, in plain memory: it is read and written on several stacks, never through a class's
/// properties, whose exclusivity checks belong to the thread.
struct EngineState {
    enum Mode: UInt8 {
        /// Follows `forced`, then the default order.
        case replay
        /// Follows the frames, then the default order, and notes which other orders matter.
        case search
        /// Highest priority first.
        case random
    }

    unowned(unsafe) let subject: Subject
    let tasks: UnsafeMutablePointer<TaskState>
    let solo: UnsafeMutablePointer<fl_task>
    var main = fl_fiber()
    var phase = 0
    var taskCount = 0
    var current: UInt32 = 0
    /// The task that ran last in this phase.
    var previous: UInt32?
    /// Whether a task's transition is running.
    var inTransition = false

    var mode = Mode.replay
    /// The run is only driven to its end.
    var draining = false
    var ending = RunEnding.finished
    /// Points after which a run is cut, and how many more it may take to end.
    var depthLimit = 20_000
    static let drainLimit = 200_000

    // The run so far. Event n, from 1, is choice n - 1.
    let choices: UnsafeMutablePointer<UInt8>
    /// More than a run can have. They never move: the trap handler knows the place.
    static let mostChoices = 1 << 20
    var count: UInt64 = 0
    var preemptions = 0
    /// For `replay`: choices to follow. For `search`: the length of the path that is followed again.
    var forced: UnsafeMutablePointer<UInt8>
    var forcedCount = 0
    /// The forced choice that was impossible; -1 if none.
    var misfit = -1

    // Reduction.
    var objects = ObjectTable()
    /// Clock of each task.
    let clocks: Row
    /// Clock of the event that ended each task's wait.
    let wakeClocks: Row
    /// Scratch: what happened before the present event, without and with the releases that it follows, and in all.
    let base: Row
    let afterReleases: Row
    let full: Row
    var touches: UnsafeMutablePointer<Touch>
    var touchCount = 0
    static let mostTouches = 512
    var frames: UnsafeMutablePointer<Frame>
    var frameCapacity: Int
    var frameCount = 0
    /// Where each task's last known transition lies in `pool`, for each frame.
    var places: UnsafeMutablePointer<UInt64>
    /// The clock of each event on the path.
    var eventClocks: Row
    let scratch: Row
    /// Events before the one whose races are looked for.
    var present: UInt32 = 0
    var pool: UnsafeMutablePointer<Touch>
    var poolCapacity: Int
    var poolTop = 0
    var strategy = Strategy()
    /// Something was left out because of a bound, in this search.
    var wasCut = false
    /// A run was longer than the depth limit.
    var wasTooDeep = false

    // Random priorities.
    let priorities: UnsafeMutablePointer<Int32>
    var changePoints: [UInt64] = []
    var lowest: Int32 = 0

    // Records.
    var records: [PointRecord] = []
    var isRecording = false

    init(_ subject: Subject, engine: UnsafeMutablePointer<EngineState>) {
        self.subject = subject
        tasks = .allocate(capacity: Subject.mostTasks)
        for i in 0..<Subject.mostTasks {
            (tasks + i).initialize(to: TaskState(engine: engine, number: UInt32(i)))
        }
        solo = .allocate(capacity: 1)
        solo.initialize(to: fl_task())
        choices = .allocate(capacity: Self.mostChoices)
        forced = .allocate(capacity: 1)
        let rows = Subject.mostTasks * Subject.mostTasks
        clocks = Self.zeros(rows)
        wakeClocks = Self.zeros(rows)
        base = Self.zeros(Subject.mostTasks)
        afterReleases = Self.zeros(Subject.mostTasks)
        full = Self.zeros(Subject.mostTasks)
        touches = .allocate(capacity: Self.mostTouches)
        frameCapacity = 1024
        frames = .allocate(capacity: frameCapacity)
        places = .allocate(capacity: frameCapacity * Subject.mostTasks)
        eventClocks = Self.zeros(frameCapacity * Subject.mostTasks)
        scratch = Self.zeros(Subject.mostTasks)
        poolCapacity = 1 << 14
        pool = .allocate(capacity: poolCapacity)
        priorities = .allocate(capacity: Subject.mostTasks)
        priorities.initialize(repeating: 0, count: Subject.mostTasks)
    }

    private static func zeros(_ count: Int) -> Row {
        let row = Row.allocate(capacity: count)
        row.initialize(repeating: 0, count: count)
        return row
    }

    mutating func deallocate() {
        for i in 0..<Subject.mostTasks { fl_fiber_unmap(&tasks[i].fiber) }
        tasks.deinitialize(count: Subject.mostTasks).deallocate()
        solo.deallocate()
        choices.deallocate()
        forced.deallocate()
        for row in [clocks, wakeClocks, base, afterReleases, full, eventClocks, scratch] { row.deallocate() }
        touches.deallocate()
        frames.deallocate()
        places.deallocate()
        pool.deallocate()
        priorities.deallocate()
        objects.deallocate()
    }

    /// Memory of the search, in bytes; stacks are counted whole.
    var byteCount: Int {
        var stacks = 0
        for i in 0..<Subject.mostTasks where tasks[i].fiber.stack != nil { stacks += tasks[i].fiber.stack_size }
        let path = frameCapacity * (MemoryLayout<Frame>.stride + Subject.mostTasks * 12)
        return stacks + path + poolCapacity * MemoryLayout<Touch>.stride + Self.mostChoices + objects.byteCount
    }

    func clock(_ task: Int) -> Row { clocks + task * Subject.mostTasks }
    func wakeClock(_ task: Int) -> Row { wakeClocks + task * Subject.mostTasks }

    mutating func force(_ wanted: [UInt8]) {
        forced.deallocate()
        forced = .allocate(capacity: max(wanted.count, 1))
        for (i, choice) in wanted.enumerated() { forced[i] = choice }
        forcedCount = wanted.count
    }
}
