// Synchrony: locks, read-side sections and atomic words, each of which passes a *scheduling point*.
//
// It guarantees: with no explorer attached a point is one predictable branch; with one attached, the explorer decides
// there which task goes on. It never keeps hidden process-wide state: what a task holds is kept with the task.
//
// Every access to state that another task may change at the same time is announced, in one of two ways:
// - a *point* stands directly before the access, and other tasks may go first;
// - a *note* only tells, where a switch directly before would show nothing that one at the task's last point does not:
//   releases of locks, and accesses that a lock held already orders.
// An access that is not announced, and that no lock orders, would make the explorer skip orders that matter.
//
// Read `LockOrder.swift` next.

import CSchedule

/// How an operation touches its object: which operations of other tasks it does not commute with.
public enum ObjectAccess: UInt32, Sendable {
    /// Touches nothing; a place to switch.
    case none = 0
    case read = 1
    case write = 2
    /// A change that commutes with others of its kind (a counter going up or down, a bit set).
    case accumulate = 3
    /// Takes a lock for itself, or shared; possible only when the lock is free for it.
    case acquire = 4
    case acquireShared = 5
    case release = 6
    case releaseShared = 7
    /// Reads, and found that another task must change the object first.
    case wait = 8
    /// Holds the lock that it tried to take: the attempt itself was a write.
    case hold = 9
}

/// What the running task is about to do. The raw value is 16 times a number, plus how it touches its object.
public enum SchedulingPoint: UInt32, Sendable, CaseIterable {
    // Locks. The object is the lock.
    case lockAcquire = 0x14
    case lockAcquireShared = 0x25
    case lockTry = 0x32
    case lockTaken = 0x229
    case lockRelease = 0x46
    case lockReleaseShared = 0x57
    // Read-side sections. The object is the domain.
    case readSideEnter = 0x63
    case readSideExit = 0x73
    case gracePeriod = 0x82
    // Waiting. The object is what must change.
    case conditionRead = 0x91
    case wait = 0xa8
    /// Waits to be woken: if nobody is left to do it, a wake-up was lost.
    case sleep = 0x218
    // Words, counters, pointers.
    case atomicLoad = 0xb1
    case atomicStore = 0xc2
    case atomicUpdate = 0xd2
    case atomicAccumulate = 0xe3
    // Page-table entries, host's and guest's. The object is the entry.
    case entryRead = 0xf1
    case entryWrite = 0x102
    // Page frames. The object is the frame.
    case pageGet = 0x113
    case pagePut = 0x122
    case pageAllocate = 0x132
    case pageFree = 0x142
    case pageFlags = 0x152
    case pageUse = 0x161
    // Notifiers: the object is none.
    case notifierStart = 0x170
    case notifierEnd = 0x180
    // Processors. The object is the vCPU or its TLB.
    case guestEnter = 0x192
    case guestExit = 0x1a2
    case requestPost = 0x1b2
    case tlbFill = 0x1c2
    case tlbFlush = 0x1d2
    case tlbRead = 0x1e1
    // Memory's bytes. The object is the 8-byte word's address in the arena.
    case dataRead = 0x1f1
    case dataWrite = 0x202

    @inlinable public var access: ObjectAccess { ObjectAccess(rawValue: rawValue & 0xf) ?? .none }
}

/// Passes a scheduling point, directly before the operation: one branch when no explorer drives the running task.
@inlinable @inline(__always)
public func schedulingPoint(_ operation: SchedulingPoint, _ object: UInt64 = 0) {
    fl_point(operation.rawValue, object)
}

/// Announces an operation without a switch.
@inlinable @inline(__always)
public func schedulingNote(_ operation: SchedulingPoint, _ object: UInt64) {
    fl_note(operation.rawValue, object)
}

/// Whether an explorer drives the running task. Long loops over entries may test it once.
@inlinable @inline(__always)
public var isExplorerAttached: Bool { fl_attached() != 0 }

/// Runs `body` unseen by the explorer: for checks, which are no part of what they check. `body` may take no lock.
@inlinable
public func unobserved<R>(_ body: () -> R) -> R {
    let task = fl_current()
    fl_attach(nil)
    defer { fl_attach(task) }
    return body()
}

/// The name of a shared object, for the explorer. Equal in all runs that make the same objects in the same order.
@frozen
public struct ObjectIdentity: Sendable {
    public let value: UInt64
    @inlinable public init() { value = fl_new_identity() }
    /// The name of a part of the object: one word of a bitmap. `index` < 2^20; further parts share names.
    @inlinable public func part(_ index: Int) -> UInt64 { value | UInt64(truncatingIfNeeded: index) & 0xf_ffff }
}

/// Waits for another task: spins a little, then yields the processor.
@usableFromInline struct Backoff {
    @usableFromInline var rounds: UInt32 = 0
    @inlinable init() {}
    @inlinable mutating func wait(_ object: UInt64, _ operation: SchedulingPoint = .wait) {
        rounds &+= 1
        schedulingPoint(operation, object)
        if rounds & 63 == 0 { fl_yield() } else { fl_pause() }
    }
}

/// Waits until `condition` holds. Everything that can make it true is announced as a write of `object`; the explorer lets
/// the task try again only after such a write. The caller may hold no spinning lock that the condition needs.
@inlinable
public func spinUntil(_ object: UInt64, _ condition: () -> Bool) {
    schedulingPoint(.conditionRead, object)
    var backoff = Backoff()
    while !condition() { backoff.wait(object) }
}

/// Lets other tasks go on, no spinning lock held; with an explorer, nothing. Kernel: `cond_resched`.
public func yieldProcessor() {
    if !isExplorerAttached { fl_yield() }
}
