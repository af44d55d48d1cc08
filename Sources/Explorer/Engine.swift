import CFiber
import CSchedule
import Synchrony

/// Runs a subject once, from its start to its end, as the mode of `EngineState` says.
struct Engine {
    let state: UnsafeMutablePointer<EngineState>

    /// Bytes of a task's stack. Debug builds of the core use large frames.
    static let stackSize = 512 << 10

    init(_ subject: Subject, defects: UInt64 = 0) {
        state = .allocate(capacity: 1)
        state.initialize(to: EngineState(subject, engine: state))
        let ignore: @convention(c) (UnsafeMutablePointer<fl_task>?, UInt32, UInt64) -> Void = { _, _, _ in }
        state.pointee.solo.pointee.point = ignore
        state.pointee.solo.pointee.note = ignore
        state.pointee.solo.pointee.identity = UInt32(Subject.mostTasks)
        state.pointee.solo.pointee.defects = defects
        for i in 0..<Subject.mostTasks {
            let task = state.pointee.tasks + i
            task.pointee.base.point = { passPoint($0!, $1, $2) }
            task.pointee.base.note = { passNote($0!, $1, $2) }
            task.pointee.base.identity = UInt32(i)
            task.pointee.base.defects = defects
        }
    }

    func deallocate() {
        state.pointee.deallocate()
        state.deinitialize(count: 1)
        state.deallocate()
    }

    /// One run. Whether the subject found nothing wrong; not asked when the tasks got stuck.
    func run() -> Bool {
        let state = self.state
        let subject = state.pointee.subject
        state.pointee.start()
        let outer = fl_current()
        fl_reset_identities()
        state.pointee.solo.pointee.objects_made = 0
        state.pointee.solo.pointee.held = fl_held()
        fl_attach(UnsafeMutablePointer(state.pointee.solo))
        defer { fl_attach(outer) }
        subject.begin()
        for phase in 0..<subject.phaseCount {
            let tasks = subject.taskCount(phase)
            precondition(tasks <= Subject.mostTasks, "a phase has at most \(Subject.mostTasks) tasks")
            if tasks == 1 {
                subject.runTask(phase, 0)
            } else if tasks > 1 {
                runTasks(phase, tasks)
                if state.pointee.ending != .finished {
                    subject.abandon()
                    return false
                }
            }
            subject.endPhase(phase)
        }
        return subject.finish()
    }

    /// Runs the tasks of a phase as fibers until all have ended or none can go on.
    private func runTasks(_ phase: Int, _ count: Int) {
        let state = self.state
        state.pointee.beginPhase(phase, count)
        for i in 0..<count {
            let task = state.pointee.tasks + i
            if task.pointee.fiber.stack == nil {
                let error = fl_fiber_map(&task.pointee.fiber, Self.stackSize)
                precondition(error == 0, "no memory for a task's stack: errno \(error)")
            }
            fl_fiber_prepare(&task.pointee.fiber, { startTask($0!) }, task)
        }
        guard let first = state.pointee.chooseNext(from: nil) else { return }
        enter(state, first)
        fl_fiber_switch(&state.pointee.main, &state.pointee.tasks[Int(first)].fiber)
        fl_attach(UnsafeMutablePointer(state.pointee.solo))
    }
}

/// Makes `task` the running one; the caller switches to its fiber.
@inline(__always)
private func enter(_ state: UnsafeMutablePointer<EngineState>, _ task: UInt32) {
    state.pointee.current = task
    fl_attach(UnsafeMutableRawPointer(state.pointee.tasks + Int(task)).assumingMemoryBound(to: fl_task.self))
}

@inline(__always)
private func taskState(_ task: UnsafeMutablePointer<fl_task>) -> UnsafeMutablePointer<TaskState> {
    UnsafeMutableRawPointer(task).assumingMemoryBound(to: TaskState.self)
}

/// The first code on a task's fiber. Never returns: when the task has ended, others go on, at last the main context.
private func startTask(_ argument: UnsafeMutableRawPointer) {
    let task = argument.assumingMemoryBound(to: TaskState.self)
    let state = task.pointee.engine
    state.pointee.beginTransition()
    state.pointee.subject.runTask(state.pointee.phase, Int(task.pointee.number))
    state.pointee.endTransition()
    task.pointee.finished = true
    leave(state, task, state.pointee.chooseNext(from: nil))
    preconditionFailure("a task went on after its end")
}

/// A task arrives at a point: its transition has ended, and the next to run is chosen.
private func passPoint(_ raw: UnsafeMutablePointer<fl_task>, _ operation: UInt32, _ object: UInt64) {
    let task = taskState(raw)
    let state = task.pointee.engine
    state.pointee.arrive(task, operation, object)
    let next = state.pointee.chooseNext(from: task.pointee.number)
    if next != task.pointee.number { leave(state, task, next) }
    state.pointee.beginTransition()
}

private func passNote(_ raw: UnsafeMutablePointer<fl_task>, _ operation: UInt32, _ object: UInt64) {
    let task = taskState(raw)
    task.pointee.engine.pointee.note(operation, object)
}

/// Goes on in `next`, or in the main context where there is none. Returns when the task is chosen again.
private func leave(
    _ state: UnsafeMutablePointer<EngineState>, _ task: UnsafeMutablePointer<TaskState>, _ next: UInt32?
) {
    if let next {
        enter(state, next)
        fl_fiber_switch(&task.pointee.fiber, &state.pointee.tasks[Int(next)].fiber)
    } else {
        fl_fiber_switch(&task.pointee.fiber, &state.pointee.main)
    }
}
