import Synchronization

/// A spinning mutual-exclusion lock. Kernel: `spinlock_t`.
public final class SpinLock: Sendable {
    let state = Atomic<UInt32>(0)
    public let rank: LockRank
    public let identity = ObjectIdentity()
    public init(_ rank: LockRank) { self.rank = rank }

    public func lock() {
        schedulingPoint(.lockAcquire, identity.value)
        var backoff = Backoff()
        while !state.compareExchange(expected: 0, desired: 1, ordering: .acquiring).exchanged {
            backoff.wait(identity.value)
        }
        noteAcquire(rank, spinning: true)
    }

    public func unlock() {
        noteRelease(rank, spinning: true)
        schedulingNote(.lockRelease, identity.value)
        state.store(0, ordering: .releasing)
    }
}

/// A lock whose holder may sleep. Kernel: `struct mutex`. Here it waits by yielding the processor.
public final class SleepingLock: Sendable {
    let state = Atomic<UInt32>(0)
    public let rank: LockRank
    public let identity = ObjectIdentity()
    public init(_ rank: LockRank) { self.rank = rank }

    public func lock() {
        schedulingPoint(.lockAcquire, identity.value)
        noteAcquire(rank, spinning: false)
        var backoff = Backoff()
        while !state.compareExchange(expected: 0, desired: 1, ordering: .acquiring).exchanged {
            backoff.wait(identity.value)
        }
    }

    /// Takes the lock if nobody has it. Kernel: `mutex_trylock`.
    public func tryLock() -> Bool {
        schedulingPoint(.lockTry, identity.value)
        guard state.compareExchange(expected: 0, desired: 1, ordering: .acquiring).exchanged else { return false }
        schedulingNote(.lockTaken, identity.value)
        noteAcquire(rank, spinning: false)
        return true
    }

    public func unlock() {
        noteRelease(rank, spinning: false)
        schedulingNote(.lockRelease, identity.value)
        state.store(0, ordering: .releasing)
    }
}

/// Many readers or one writer. `spinning` makes it Kernel: `rwlock_t` (mmu_lock), else `rw_semaphore` (mmap_lock).
/// A waiting writer does not hold back new readers.
public final class ReadWriteLock: Sendable {
    /// Bit 31: a writer; below: the number of readers.
    let state = Atomic<UInt32>(0)
    static let writer: UInt32 = 1 << 31
    public let rank: LockRank
    public let spinning: Bool
    public let identity = ObjectIdentity()
    public init(_ rank: LockRank, spinning: Bool) {
        self.rank = rank
        self.spinning = spinning
    }

    public func lockForRead() {
        schedulingPoint(.lockAcquireShared, identity.value)
        noteAcquire(rank, spinning: spinning)
        var backoff = Backoff()
        while true {
            let old = state.load(ordering: .relaxed)
            if old & Self.writer != 0 {
                backoff.wait(identity.value)
            } else if state.compareExchange(expected: old, desired: old + 1, ordering: .acquiring).exchanged {
                return
            }
        }
    }

    /// Takes the lock for reading if no writer has it. Kernel: `mmap_read_trylock`.
    public func tryLockForRead() -> Bool {
        schedulingPoint(.lockTry, identity.value)
        var old = state.load(ordering: .relaxed)
        while old & Self.writer == 0 {
            let (done, seen) = state.compareExchange(expected: old, desired: old + 1, ordering: .acquiring)
            if done {
                schedulingNote(.lockAcquireShared, identity.value)
                noteAcquire(rank, spinning: spinning)
                return true
            }
            old = seen
        }
        return false
    }

    public func unlockRead() {
        noteRelease(rank, spinning: spinning)
        schedulingNote(.lockReleaseShared, identity.value)
        state.subtract(1, ordering: .releasing)
    }

    public func lockForWrite() {
        schedulingPoint(.lockAcquire, identity.value)
        noteAcquire(rank, spinning: spinning)
        var backoff = Backoff()
        while !state.compareExchange(expected: 0, desired: Self.writer, ordering: .acquiring).exchanged {
            backoff.wait(identity.value)
        }
    }

    public func unlockWrite() {
        noteRelease(rank, spinning: spinning)
        schedulingNote(.lockRelease, identity.value)
        state.store(0, ordering: .releasing)
    }

    public var isWriteLocked: Bool { state.load(ordering: .relaxed) & Self.writer != 0 }
    public var isLocked: Bool { state.load(ordering: .relaxed) != 0 }
}
