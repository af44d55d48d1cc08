import CSchedule
import Synchrony

/// The steps of a run: a transition is the code from one point to the next, and counts as one event.
extension EngineState {
    mutating func start() {
        count = 0
        preemptions = 0
        misfit = -1
        draining = false
        inTransition = false
        ending = .finished
        records.removeAll(keepingCapacity: true)
    }

    mutating func beginPhase(_ number: Int, _ tasksInPhase: Int) {
        phase = number
        taskCount = tasksInPhase
        objects.epoch += 1
        objects.taskCount = tasksInPhase
        previous = nil
        for i in 0..<tasksInPhase {
            tasks[i].finished = false
            tasks[i].pending = 0
            tasks[i].enabler = 0
            tasks[i].base.objects_made = UInt32(number) << 16
            tasks[i].base.held = fl_held()
            clock(i).update(repeating: 0, count: tasksInPhase)
        }
    }

    /// Whether the present transitions are weighed: their clocks kept, races looked for.
    private var isWeighing: Bool { mode == .search && !draining && strategy.reduces }

    /// The running task goes on: what it announced happens.
    mutating func beginTransition() {
        inTransition = true
        touchCount = 0
        let task = tasks + Int(current)
        if isRecording {
            records.append(
                PointRecord(
                    task: UInt8(current), phase: phase, operation: task.pointee.pending,
                    object: task.pointee.pendingName,
                    mark: subject.mark()))
        }
        let access = task.pointee.pendingAccess
        if access == .wait, task.pointee.enabler > 0 {
            if isWeighing { join(clock(Int(current)), wakeClock(Int(current))) }
            task.pointee.enabler = 0
        }
        if access != .none { touch(task.pointee.pendingObject, access) }
    }

    /// The running task announces an operation without a point.
    mutating func note(_ operation: UInt32, _ name: UInt64) {
        let access = ObjectAccess(rawValue: operation & 0xf) ?? .none
        if access != .none { touch(objects.index(of: name), access) }
    }

    /// The running task's transition has ended, and this is what it will do next.
    mutating func arrive(_ task: UnsafeMutablePointer<TaskState>, _ operation: UInt32, _ name: UInt64) {
        endTransition()
        task.pointee.pending = operation
        task.pointee.pendingName = name
        let access = ObjectAccess(rawValue: operation & 0xf) ?? .none
        guard access != .none else { return }
        let index = objects.index(of: name)
        task.pointee.pendingObject = index
        if access == .wait {
            task.pointee.seenVersion = objects.states[index].version
            task.pointee.enabler = 0
        }
    }

    mutating func endTransition() {
        guard inTransition else { return }
        inTransition = false
        if isWeighing { weigh() }
    }

    /// What the access does to the object as others see it.
    private mutating func touch(_ index: Int, _ access: ObjectAccess) {
        let object = objects.states + index
        switch access {
        case .none, .read, .wait: break
        case .acquire: object.pointee.owner = UInt8(current) + 1
        case .hold:
            object.pointee.owner = UInt8(current) + 1
            return
        case .acquireShared: object.pointee.shared += 1
        case .release:
            object.pointee.owner = 0
            changed(index)
        case .releaseShared:
            object.pointee.shared -= 1
            changed(index)
        case .write, .accumulate: changed(index)
        }
        guard isWeighing else { return }
        // A transition that touches more than fits is taken to be long past its use: it is never put to sleep.
        if touchCount < Self.mostTouches {
            if touchCount > 0, touches[touchCount - 1].object == UInt32(index), touches[touchCount - 1].access == access
            {
                return
            }
            touches[touchCount] = Touch(object: UInt32(index), access: access)
            touchCount += 1
        } else {
            preconditionFailure(
                "a transition touches more than \(Self.mostTouches) objects: it needs a scheduling point")
        }
    }

    /// The object has changed: whoever waits for that can go on.
    private mutating func changed(_ index: Int) {
        objects.states[index].version &+= 1
        for i in 0..<taskCount where i != Int(current) {
            let task = tasks + i
            if !task.pointee.finished, task.pointee.isWaiting, task.pointee.pendingObject == index,
                task.pointee.enabler == 0
            {
                task.pointee.enabler = UInt32(count)
            }
        }
    }

    /// Tasks that have not ended, by letter, with what they wait for.
    func waitingTasks() -> [String] {
        guard ending != .finished else { return [] }
        var tasksLeft: [String] = []
        for i in 0..<taskCount where !tasks[i].finished {
            let what = SchedulingPoint(rawValue: tasks[i].pending).map { "\($0)" } ?? "its first step"
            tasksLeft.append("\(Schedule.letter(UInt8(i))): \(what)")
        }
        return tasksLeft
    }

    /// Tasks that can go on, a bit each.
    func enabledTasks() -> UInt16 {
        var mask: UInt16 = 0
        for i in 0..<taskCount where !tasks[i].finished && isEnabled(tasks + i) { mask |= 1 << UInt16(i) }
        return mask
    }

    private func isEnabled(_ task: UnsafeMutablePointer<TaskState>) -> Bool {
        switch task.pointee.pendingAccess {
        case .acquire:
            let object = objects.states + task.pointee.pendingObject
            return object.pointee.owner == 0 && object.pointee.shared == 0
        case .acquireShared: return objects.states[task.pointee.pendingObject].owner == 0
        case .wait: return objects.states[task.pointee.pendingObject].version != task.pointee.seenVersion
        default: return true
        }
    }
}
