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
///
/// Who comes announces himself, then looks for the other side; so of two that come at the same time at least one sees the
/// other. A reader that sees a writer steps back. A writer that sees readers steps back too, so that it does not hold back
/// new readers while it waits: of mmap_lock, a reader may wait for another. Only where readers are spread, of mmu_lock,
/// under which nobody waits, does it stay, and they wait for it. A task that holds the lock for reading may not take it
/// again.
public final class ReadWriteLock: Sendable {
    @usableFromInline let writer = Atomic<UInt32>(0)
    @usableFromInline let readers: ReaderLines
    public let rank: LockRank
    public let spinning: Bool
    public let identity = ObjectIdentity()

    /// - Parameter spread: readers are many, and shall not write one line all of them. Kernel: `percpu_rw_semaphore`.
    public init(_ rank: LockRank, spinning: Bool, spread: Bool = false) {
        self.rank = rank
        self.spinning = spinning
        readers = ReaderLines(isSpread: spread)
    }

    deinit { readers.deallocate() }

    /// Sequentially consistent, both, as the writer's are: else each could miss the other.
    @inlinable @inline(__always)
    func enters() -> Bool {
        let line = readers.own
        readers.enter(0, line: line)
        if writer.load(ordering: .sequentiallyConsistent) == 0 { return true }
        readers.leave(0, line: line)
        return false
    }

    @inlinable @inline(__always)
    public func lockForRead() {
        schedulingPoint(.lockAcquireShared, identity.value)
        noteAcquire(rank, spinning: spinning)
        if !enters() { waitToEnter() }
    }

    @inline(never) @usableFromInline
    func waitToEnter() {
        var backoff = Backoff()
        repeat {
            while writer.load(ordering: .relaxed) != 0 { backoff.wait(identity.value) }
        } while !enters()
    }

    /// Takes the lock for reading if no writer has it, or is about to. Kernel: `mmap_read_trylock`.
    public func tryLockForRead() -> Bool {
        schedulingPoint(.lockTry, identity.value)
        guard enters() else { return false }
        schedulingNote(.lockAcquireShared, identity.value)
        noteAcquire(rank, spinning: spinning)
        return true
    }

    @inlinable @inline(__always)
    public func unlockRead() {
        noteRelease(rank, spinning: spinning)
        schedulingNote(.lockReleaseShared, identity.value)
        readers.leave(0, line: readers.own)
    }

    public func lockForWrite() {
        schedulingPoint(.lockAcquire, identity.value)
        noteAcquire(rank, spinning: spinning)
        var backoff = Backoff()
        while true {
            while !writer.compareExchange(expected: 0, desired: 1, ordering: .sequentiallyConsistent).exchanged {
                backoff.wait(identity.value)
            }
            if readers.isEmpty(0) { return }
            if readers.isSpread { return waitForReaders() }
            writer.store(0, ordering: .releasing)
            repeat { backoff.wait(identity.value) } while !readers.isEmpty(0)
        }
    }

    private func waitForReaders() {
        var backoff = Backoff()
        while !readers.isEmpty(0) { backoff.wait(identity.value) }
    }

    public func unlockWrite() {
        noteRelease(rank, spinning: spinning)
        schedulingNote(.lockRelease, identity.value)
        writer.store(0, ordering: .releasing)
    }

    public var isWriteLocked: Bool { writer.load(ordering: .relaxed) != 0 }
    public var isLocked: Bool { isWriteLocked || !readers.isEmpty(0) }
}
