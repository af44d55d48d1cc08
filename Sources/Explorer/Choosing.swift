import CSchedule
import Synchrony

/// Who goes on at a point.
extension EngineState {
    /// Chooses the next task and counts the event; nil when the phase is over. `from` is the task that stands at the
    /// point, nil where it has ended or none has begun.
    mutating func chooseNext(from: UInt32?) -> UInt32? {
        let enabled = enabledTasks()
        guard enabled != 0 else {
            noteEnd()
            return nil
        }
        if Int(count) >= depthLimit, !pastTheDepth() { return nil }
        let next = draining ? byDefault(enabled, from) : choose(enabled, from)
        if let from, next != from, enabled >> UInt16(from) & 1 == 1 { preemptions += 1 }
        choices[Int(count)] = UInt8(next)
        count += 1
        previous = next
        return next
    }

    /// Nobody can go on: all have ended, or some are stuck.
    private mutating func noteEnd() {
        var sleeps = false
        var locks = false
        var waits = false
        for i in 0..<taskCount where !tasks[i].finished {
            switch tasks[i].pendingAccess {
            case .acquire, .acquireShared: locks = true
            default:
                if tasks[i].pending == SchedulingPoint.sleep.rawValue { sleeps = true } else { waits = true }
            }
        }
        if mode == .search, !draining, strategy.reduces { weighStuckTasks() }
        if sleeps {
            ending = .stuck(.lostWakeUp)
        } else if locks {
            ending = .stuck(.deadlock)
        } else if waits {
            ending = .stuck(.livelock)
        } else {
            // It ended after all: only an unfair order kept it from that.
            ending = .finished
        }
    }

    /// The run is longer than the bound. It is driven to its end; what does not end even when every task gets its turn is
    /// given up. Returns whether to go on.
    private mutating func pastTheDepth() -> Bool {
        if !draining {
            draining = true
            wasTooDeep = true
            if mode == .search { cutHere() }
        }
        if Int(count) >= depthLimit + Self.drainLimit { ending = .endless }
        return Int(count) < depthLimit + 2 * Self.drainLimit
    }

    private func byDefault(_ enabled: UInt16, _ from: UInt32?) -> UInt32 {
        // A run that does not end gives every task its turn, lest one be starved and look guilty.
        if case .endless = ending { return fairly(enabled) }
        if let from, enabled >> UInt16(from) & 1 == 1 { return from }
        return UInt32(enabled.trailingZeroBitCount)
    }

    private func fairly(_ enabled: UInt16) -> UInt32 {
        for step in 1...taskCount {
            let task = (Int(current) + step) % taskCount
            if enabled >> UInt16(task) & 1 == 1 { return UInt32(task) }
        }
        return UInt32(enabled.trailingZeroBitCount)
    }

    private mutating func choose(_ enabled: UInt16, _ from: UInt32?) -> UInt32 {
        switch mode {
        case .replay: return followForced(enabled, from)
        case .search: return followFrames(enabled, from)
        case .random: return byPriority(enabled)
        }
    }

    private mutating func followForced(_ enabled: UInt16, _ from: UInt32?) -> UInt32 {
        guard Int(count) < forcedCount else { return byDefault(enabled, from) }
        let wanted = forced[Int(count)]
        if Int(wanted) < taskCount, enabled >> UInt16(wanted) & 1 == 1 { return UInt32(wanted) }
        misfit = Int(count)
        draining = true
        return byDefault(enabled, from)
    }

    /// Probabilistic concurrency testing: the highest priority runs; at d - 1 points chosen beforehand the running task
    /// falls below all others.
    private mutating func byPriority(_ enabled: UInt16) -> UInt32 {
        if changePoints.contains(count), let previous {
            lowest -= 1
            priorities[Int(previous)] = lowest
        }
        var best = enabled.trailingZeroBitCount
        for task in 0..<taskCount where enabled >> UInt16(task) & 1 == 1 && priorities[task] > priorities[best] {
            best = task
        }
        return UInt32(best)
    }
}
