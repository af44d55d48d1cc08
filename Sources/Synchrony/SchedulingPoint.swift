// Synchrony: locks, read-side sections and atomic words, each of which passes a *scheduling point*.
//
// It guarantees: with no explorer attached a point is one predictable branch; with one attached, the explorer decides
// there which task goes on. It never keeps hidden process-wide state: what a task holds is kept with the task.
// Read `LockOrder.swift` next.

import CSchedule

/// What the running task is about to do, for the explorer to weigh.
public enum SchedulingPoint: UInt32, Sendable {
    case lockAcquire, lockRelease, lockWait
    case readSideEnter, readSideExit, gracePeriod
    case atomicLoad, atomicStore, atomicUpdate
    case entryRead, entryWrite
    case notifierStart, notifierEnd
    case tlbFill, tlbFlush, guestEnter, guestExit
    case userCopy, pageFree
}

/// Passes a scheduling point: one branch when no explorer drives the running task.
@inlinable @inline(__always)
public func schedulingPoint(_ kind: SchedulingPoint, _ object: UInt = 0) {
    fl_point(kind.rawValue, object)
}

/// Whether an explorer drives the running task. Long loops over entries may test it once.
@inlinable @inline(__always)
public var isExplorerAttached: Bool { fl_attached() != 0 }

/// Waits for another task: spins a little, then yields the processor. With an explorer attached, the point hands over.
@usableFromInline struct Backoff {
    @usableFromInline var rounds: UInt32 = 0
    @inlinable init() {}
    @inlinable mutating func wait(_ object: UInt) {
        rounds &+= 1
        schedulingPoint(.lockWait, object)
        if rounds & 63 == 0 { fl_yield() } else { fl_pause() }
    }
}

/// Waits until `condition` holds, passing scheduling points. The caller may hold no spinning lock that the condition
/// needs.
@inlinable
public func spinUntil(_ object: UInt = 0, _ condition: () -> Bool) {
    var backoff = Backoff()
    while !condition() { backoff.wait(object) }
}

/// Lets other tasks go on, no spinning lock held. Kernel: `cond_resched`.
public func yieldProcessor(_ object: UInt = 0) {
    schedulingPoint(.lockWait, object)
    fl_yield()
}
