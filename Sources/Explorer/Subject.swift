// Explorer: runs a small concurrent program in every relevant order.
//
// It guarantees: a run is a pure function of the program and the schedule. What it reports as complete is complete under
// sequential consistency and the bounds that it prints. A run that is cut is driven to its end, never abandoned.
// It knows nothing of memory: it sees tasks, points and objects. `WorldSubject` makes a scenario into a program.
//
// Read next: `Schedule` (what a run is determined by), `Run` (one run), `Search` (which runs), `Reduction` (why not all).

/// A concurrent program that can be run again and again from the same start.
///
/// Its phases run one after another. In a phase with several tasks these are fibers on one thread, switched at the
/// scheduling points that they pass; a phase with one task runs straight through.
open class Subject {
    public init() {}

    /// Makes a fresh start: nothing of an earlier run may be left.
    open func begin() {}

    public static let mostTasks = 16

    /// Phases of a run.
    open var phaseCount: Int { 1 }

    /// Tasks of a phase, at most `mostTasks`. The same in every run.
    open func taskCount(_ phase: Int) -> Int { 0 }

    /// Runs one task to its end. Called on the task's fiber.
    open func runTask(_ phase: Int, _ task: Int) {}

    /// Every task of the phase has ended.
    open func endPhase(_ phase: Int) {}

    /// Ends the run; whether nothing was wrong with it.
    open func finish() -> Bool { true }

    /// Where the subject's own record of the run stands now, for the story.
    open func mark() -> Int { 0 }

    /// The run came to a stop with tasks that can't go on. Whatever they hold is lost: the subject must forget the state
    /// of this run without touching it, and `begin` starts anew.
    open func abandon() {}
}
