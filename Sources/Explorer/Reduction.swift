import Synchrony

/// What a search knows of one point on the path of the present run.
struct Frame {
    /// Tasks that could go on here.
    var enabled: UInt16
    /// Those that must be tried, those that have been, and those whose trying would show nothing new.
    var wanted: UInt16
    var tried: UInt16 = 0
    var asleep: UInt16
    var choice: UInt8
    /// The task that ran before; 0xff at the beginning of a phase.
    var previous: UInt8
    var preemptions: UInt16
    /// End of the transitions kept in the pool for this frame and those before it.
    var poolEnd: Int

    /// Preemptions on the path if `task` goes on here.
    func preemptions(choosing task: UInt8) -> Int {
        let isPreemption = previous != 0xff && previous != task && enabled >> UInt16(previous) & 1 == 1
        return Int(preemptions) + (isPreemption ? 1 : 0)
    }
}

/// Which runs a search makes.
public struct Strategy: Sendable {
    /// Dynamic partial-order reduction; without it every order is run.
    public var reduces = true
    /// Only without a bound on preemptions.
    public var usesSleepSets = true
    /// Most preemptions in a run; nil for no bound. A preemption is a switch away from a task that could go on.
    public var preemptionBound: Int?
    public init() {}

    /// Every order, one by one.
    public static var enumeration: Strategy {
        var strategy = Strategy()
        strategy.reduces = false
        strategy.usesSleepSets = false
        return strategy
    }
}

/// Dynamic partial-order reduction: backtracking where races are seen (Flanagan and Godefroid), with source sets, with sleep
/// sets, and, under a bound on preemptions, with the conservative points of Coons, Musuvathi and McKinley.
///
/// Two events are in a race when they touch an object in ways that don't commute, are of different tasks, and neither is
/// forced to come first by what lies between. Then the other order matters, and the later event's task, or one that leads
/// to it, is wanted at the point before the earlier event.
///
/// Under a bound this loses schedules, for the other order may need a preemption more than one that reaches the same state
/// by switching earlier. So the task is also wanted at the beginning of the stretch that the earlier event lies in, where a
/// switch may be free. And no task is ever put to sleep there: an equivalent run that was made before has its switches in
/// other places, so it neither stays within the bound for certain nor asks for the same earlier switches. (Sleep sets that
/// skipped only what had been explored without a cut still lost an end state in one generated program of two thousand.)
extension EngineState {
    // MARK: The path

    mutating func followFrames(_ enabled: UInt16, _ from: UInt32?) -> UInt32 {
        let depth = Int(count)
        if depth < forcedCount {
            precondition(frames[depth].enabled == enabled, "a run is not a function of its schedule")
            preemptions = Int(frames[depth].preemptions)
            return UInt32(frames[depth].choice)
        }
        let asleep = depth == 0 || previous == nil ? 0 : sleepers(after: depth - 1)
        let candidates = enabled & ~asleep
        guard candidates != 0 else {
            draining = true
            return byDefaultInSearch(enabled, from)
        }
        var choice = UInt8(candidates.trailingZeroBitCount)
        if let from, candidates >> UInt16(from) & 1 == 1 { choice = UInt8(from) }
        var frame = Frame(
            enabled: enabled, wanted: strategy.reduces ? 1 << UInt16(choice) : enabled, asleep: asleep, choice: choice,
            previous: previous.map { UInt8($0) } ?? 0xff, preemptions: UInt16(preemptions), poolEnd: poolTop)
        if let bound = strategy.preemptionBound, frame.preemptions(choosing: choice) > bound {
            cutHere()
            draining = true
            return byDefaultInSearch(enabled, from)
        }
        frame.tried = 1 << UInt16(choice)
        push(frame)
        return UInt32(choice)
    }

    private func byDefaultInSearch(_ enabled: UInt16, _ from: UInt32?) -> UInt32 {
        if let from, enabled >> UInt16(from) & 1 == 1 { return from }
        return UInt32(enabled.trailingZeroBitCount)
    }

    private mutating func push(_ frame: Frame) {
        if frameCount == frameCapacity {
            let largerFrames = UnsafeMutablePointer<Frame>.allocate(capacity: frameCapacity * 2)
            largerFrames.moveInitialize(from: frames, count: frameCount)
            let largerPlaces = UnsafeMutablePointer<UInt64>.allocate(capacity: frameCapacity * 2 * Subject.mostTasks)
            largerPlaces.moveInitialize(from: places, count: frameCapacity * Subject.mostTasks)
            let largerClocks = Row.allocate(capacity: frameCapacity * 2 * Subject.mostTasks)
            largerClocks.moveInitialize(from: eventClocks, count: frameCapacity * Subject.mostTasks)
            frames.deallocate()
            places.deallocate()
            eventClocks.deallocate()
            (frames, places, eventClocks) = (largerFrames, largerPlaces, largerClocks)
            frameCapacity *= 2
        }
        (frames + frameCount).initialize(to: frame)
        let row = places + frameCount * Subject.mostTasks
        if frame.asleep != 0 {
            row.update(from: row - Subject.mostTasks, count: Subject.mostTasks)
        }
        frameCount += 1
    }

    /// The run goes no further on this path because of a bound: what lies beyond stays unknown.
    mutating func cutHere() {
        wasCut = true
    }

    // MARK: Sleep

    /// Tasks asleep after the event of frame `depth`: those asleep or tried there whose next transition commutes with it.
    private func sleepers(after depth: Int) -> UInt16 {
        guard strategy.usesSleepSets, strategy.preemptionBound == nil else { return 0 }
        let frame = frames + depth
        var asleep = (frame.pointee.asleep | frame.pointee.tried) & ~(1 << UInt16(frame.pointee.choice))
        guard asleep != 0 else { return 0 }
        let row = places + depth * Subject.mostTasks
        for task in 0..<taskCount where asleep >> UInt16(task) & 1 == 1 {
            if conflict(row[task], row[Int(frame.pointee.choice)]) { asleep &= ~(1 << UInt16(task)) }
        }
        return asleep
    }

    /// Whether two kept transitions touch an object in ways that don't commute.
    private func conflict(_ a: UInt64, _ b: UInt64) -> Bool {
        let (firstA, countA) = (Int(a >> 16), Int(a & 0xffff))
        let (firstB, countB) = (Int(b >> 16), Int(b & 0xffff))
        for i in 0..<countA {
            for j in 0..<countB where pool[firstA + i].conflicts(with: pool[firstB + j]) { return true }
        }
        return false
    }

    private mutating func keepTransition(at depth: Int) {
        if poolTop + touchCount > poolCapacity {
            let capacity = max(poolCapacity * 2, poolTop + touchCount)
            let larger = UnsafeMutablePointer<Touch>.allocate(capacity: capacity)
            larger.moveInitialize(from: pool, count: poolTop)
            pool.deallocate()
            (pool, poolCapacity) = (larger, capacity)
        }
        (pool + poolTop).initialize(from: touches, count: touchCount)
        let task = Int(frames[depth].choice)
        places[depth * Subject.mostTasks + task] = UInt64(poolTop) << 16 | UInt64(touchCount)
        poolTop += touchCount
        frames[depth].poolEnd = poolTop
    }

    // MARK: Races

    /// A row is a few words: a loop is faster than a call that moves memory.
    func copy(_ row: Row, from other: Row) {
        for i in 0..<taskCount { row[i] = other[i] }
    }

    func join(_ clock: Row, _ other: Row) {
        for i in 0..<taskCount where other[i] > clock[i] { clock[i] = other[i] }
    }

    /// The running task's transition has ended: finds its races, if this is the first time on this path, and brings the
    /// clocks up to date.
    mutating func weigh() {
        let depth = Int(count) - 1
        let task = Int(current)
        let isNew = depth >= forcedCount - 1
        let clock = clock(task)
        copy(base, from: clock)
        copy(afterReleases, from: base)
        for i in 0..<touchCount {
            // Shared holders don't wait for each other.
            switch touches[i].access {
            case .acquire: join(afterReleases, objects.row(Int(touches[i].object), .releaseClock))
            case .acquireShared: join(afterReleases, objects.row(Int(touches[i].object), .writeClock))
            default: break
            }
        }
        copy(full, from: afterReleases)
        for i in 0..<touchCount { joinBefore(touches[i]) }
        if isNew {
            keepTransition(at: depth)
            present = UInt32(depth)
            for i in 0..<touchCount { findRaces(of: touches[i], task) }
        }
        full[task] = UInt32(count)
        copy(eventClocks + depth * Subject.mostTasks, from: full)
        copy(clock, from: full)
        for i in 0..<touchCount { publish(touches[i], task) }
        for i in 0..<taskCount where tasks[i].enabler == UInt32(count) && tasks[i].isWaiting {
            copy(wakeClock(i), from: full)
        }
    }

    /// The tasks are stuck: what they wait for could have gone another way, although it was never done.
    mutating func weighStuckTasks() {
        for task in 0..<taskCount where !tasks[task].finished {
            copy(base, from: clock(task))
            copy(afterReleases, from: base)
            copy(full, from: base)
            present = UInt32(count)
            findRaces(of: Touch(object: UInt32(tasks[task].pendingObject), access: tasks[task].pendingAccess), task)
        }
    }

    /// What of the object's past comes before an access of this kind.
    private func joinBefore(_ touch: Touch) {
        let object = Int(touch.object)
        switch touch.access {
        case .none, .hold: break
        case .read, .wait:
            join(full, objects.row(object, .writeClock))
            join(full, objects.row(object, .accumulateClock))
        case .accumulate, .acquireShared, .releaseShared:
            join(full, objects.row(object, .writeClock))
            join(full, objects.row(object, .readClock))
        case .write, .acquire, .release:
            join(full, objects.row(object, .writeClock))
            join(full, objects.row(object, .readClock))
            join(full, objects.row(object, .accumulateClock))
            join(full, objects.row(object, .releaseClock))
        }
    }

    private func publish(_ touch: Touch, _ task: Int) {
        let object = Int(touch.object)
        let state = objects.states + object
        switch touch.access {
        case .none, .hold: break
        case .read, .wait:
            objects.row(object, .reads)[task] = UInt32(count)
            join(objects.row(object, .readClock), full)
        case .accumulate, .acquireShared:
            objects.row(object, .accumulations)[task] = UInt32(count)
            join(objects.row(object, .accumulateClock), full)
        case .releaseShared:
            join(objects.row(object, .accumulateClock), full)
            join(objects.row(object, .releaseClock), full)
        case .write:
            (state.pointee.lastWrite, state.pointee.lastWriter) = (UInt32(count), UInt8(task))
            join(objects.row(object, .writeClock), full)
        case .acquire:
            (state.pointee.lastAcquire, state.pointee.lastAcquirer) = (UInt32(count), UInt8(task))
            join(objects.row(object, .writeClock), full)
        case .release:
            (state.pointee.lastRelease, state.pointee.lastReleaser) = (UInt32(count), UInt8(task))
            join(objects.row(object, .writeClock), full)
            join(objects.row(object, .releaseClock), full)
        }
    }

    private mutating func findRaces(of touch: Touch, _ task: Int) {
        let object = Int(touch.object)
        let past = objects.states[object]
        switch touch.access {
        case .none, .hold: break
        case .read, .wait:
            race(past.lastWrite, Int(past.lastWriter), task, afterReleases)
            raceWithEach(objects.row(object, .accumulations), task, afterReleases)
        case .accumulate:
            race(past.lastWrite, Int(past.lastWriter), task, afterReleases)
            raceWithEach(objects.row(object, .reads), task, afterReleases)
        case .write:
            race(past.lastWrite, Int(past.lastWriter), task, afterReleases)
            race(past.lastAcquire, Int(past.lastAcquirer), task, afterReleases)
            race(past.lastRelease, Int(past.lastReleaser), task, afterReleases)
            raceWithEach(objects.row(object, .reads), task, afterReleases)
            raceWithEach(objects.row(object, .accumulations), task, afterReleases)
        case .acquire:
            // Against the release before it there is no other order; against the acquisition before that there is.
            race(past.lastWrite, Int(past.lastWriter), task, base)
            race(past.lastAcquire, Int(past.lastAcquirer), task, base)
            raceWithEach(objects.row(object, .accumulations), task, base)
        case .acquireShared:
            race(past.lastWrite, Int(past.lastWriter), task, base)
            race(past.lastAcquire, Int(past.lastAcquirer), task, base)
        case .release, .releaseShared:
            race(past.lastWrite, Int(past.lastWriter), task, afterReleases)
        }
    }

    private mutating func raceWithEach(_ events: Row, _ task: Int, _ before: Row) {
        for other in 0..<taskCount { race(events[other], other, task, before) }
    }

    /// If event `event` of `other` need not come before the present event of `task`, the other order is wanted.
    private mutating func race(_ event: UInt32, _ other: Int, _ task: Int, _ before: Row) {
        guard event > 0, other != task, event > before[other] else { return }
        if strategy.preemptionBound != nil {
            wantConservatively(task, at: Int(event) - 1)
            var start = Int(event) - 1
            while frames[start].previous == frames[start].choice { start -= 1 }
            if start != Int(event) - 1 { wantConservatively(task, at: start) }
        } else {
            want(task, before: event)
        }
    }

    private func wantConservatively(_ task: Int, at depth: Int) {
        let frame = frames + depth
        let bit: UInt16 = 1 << UInt16(task)
        frame.pointee.wanted |= frame.pointee.enabled & bit != 0 ? bit : frame.pointee.enabled
    }

    /// Wants, before event `event`, a task that can begin with what need not come after it: the later events that don't
    /// depend on it, and the present one. One such task is enough (a source set: Abdulla, Aronis, Jonsson, Sagonas).
    private func want(_ task: Int, before event: UInt32) {
        let frame = frames + Int(event) - 1
        let initials = initials(task, after: event) & frame.pointee.enabled
        if initials & (frame.pointee.wanted | frame.pointee.asleep) != 0 { return }
        let bit: UInt16 = 1 << UInt16(task)
        if initials == 0 {
            frame.pointee.wanted |= frame.pointee.enabled
        } else {
            frame.pointee.wanted |= initials & bit != 0 ? bit : initials & ~(initials - 1)
        }
    }

    /// Tasks whose first event among those after `event` that don't depend on it, and the present event of `task`, depends
    /// on none of the others.
    private func initials(_ task: Int, after event: UInt32) -> UInt16 {
        let racing = Int(frames[Int(event) - 1].choice)
        var seen: UInt16 = 0
        var initials: UInt16 = 0
        let firsts = scratch
        for later in event..<present {
            let clock = eventClocks + Int(later) * Subject.mostTasks
            guard clock[racing] < event else { continue }
            let owner = Int(frames[Int(later)].choice)
            guard seen >> UInt16(owner) & 1 == 0 else { continue }
            if isFirst(clock, firsts, seen) { initials |= 1 << UInt16(owner) }
            firsts[owner] = later + 1
            seen |= 1 << UInt16(owner)
        }
        if seen >> UInt16(task) & 1 == 0, isFirst(full, firsts, seen) { initials |= 1 << UInt16(task) }
        return initials
    }

    private func isFirst(_ clock: Row, _ firsts: Row, _ seen: UInt16) -> Bool {
        for other in 0..<taskCount where seen >> UInt16(other) & 1 == 1 && clock[other] >= firsts[other] {
            return false
        }
        return true
    }

    // MARK: The next run

    /// Prepares the next run; false when there is none left within the bounds.
    mutating func backtrack() -> Bool {
        while frameCount > 0 {
            let frame = frames + (frameCount - 1)
            poolTop = frame.pointee.poolEnd
            if let next = nextChoice(frame) {
                frame.pointee.choice = next
                frame.pointee.tried |= 1 << UInt16(next)
                forcedCount = frameCount
                return true
            }
            frameCount -= 1
        }
        return false
    }

    private mutating func nextChoice(_ frame: UnsafeMutablePointer<Frame>) -> UInt8? {
        var left = frame.pointee.wanted & ~frame.pointee.tried & ~frame.pointee.asleep
        while left != 0 {
            let task = UInt8(left.trailingZeroBitCount)
            left &= left - 1
            if let bound = strategy.preemptionBound, frame.pointee.preemptions(choosing: task) > bound {
                wasCut = true
                frame.pointee.tried |= 1 << UInt16(task)
                continue
            }
            return task
        }
        return nil
    }
}
