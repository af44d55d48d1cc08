import Audit
import Frames
import Synchrony

/// Telling the notifiers. Kernel: `mmu_notifier_invalidate_range_start`, `_end`.
///
/// Called without spinning locks. Every start has its end, by the same task.
extension AddressSpace {
    func notifyStart(_ range: Range<UserAddress>, blockable: Bool = true) {
        mightSleep()
        schedulingPoint(.notifierStart)
        memory.record(
            Event(
                .notifierStart, guest: range.lowerBound.page,
                value: range.upperBound.page - range.lowerBound.page, extra: blockable ? 1 : 0))
        let section = notifierReaders.enter()
        notifierLock.lock()
        invalidations += 1
        let listeners = notifiers
        notifierLock.unlock()
        for listener in listeners {
            if blockable {
                listener.invalidateRangeStart(range, blockable: true)
            } else {
                withoutSleeping { listener.invalidateRangeStart(range, blockable: false) }
            }
        }
        // Of a space that nobody listens to, a child's, there is nothing to check.
        if !listeners.isEmpty, let observer = memory.journal?.observer {
            observer.invalidationStarted(range.lowerBound.page, range.upperBound.page - range.lowerBound.page)
        }
        notifierReaders.exit(section)
    }

    func notifyEnd(_ range: Range<UserAddress>, blockable: Bool = true) {
        schedulingPoint(.notifierEnd)
        let section = notifierReaders.enter()
        notifierLock.lock()
        let listeners = notifiers
        notifierLock.unlock()
        for listener in listeners { listener.invalidateRangeEnd(range, blockable: blockable) }
        notifierLock.lock()
        invalidations -= 1
        notifierLock.unlock()
        notifierReaders.exit(section)
        memory.record(
            Event(
                .notifierEnd, guest: range.lowerBound.page,
                value: range.upperBound.page - range.lowerBound.page, extra: blockable ? 1 : 0))
    }

    /// Adds a notifier. Waits until no invalidation is running, so that it never hears an end without its start:
    /// `mmapLock` keeps the system calls out, and those that come from a driver or an object end by themselves.
    /// Kernel: `mmu_notifier_register`, `mm_take_all_locks`.
    public func register(_ notifier: MMUNotifier) {
        mmapLock.lockForWrite()
        precondition(!hasExited, "a notifier for an address space that is gone")
        // Each end leaves a section of the readers after it has counted.
        spinUntil(notifierReaders.identity.value) {
            notifierLock.lock()
            let idle = invalidations == 0
            if idle { notifiers.append(notifier) }
            notifierLock.unlock()
            return idle
        }
        mmapLock.unlockWrite()
    }

    /// Removes a notifier: calls its `release` if the address space's death has not, and waits for running callbacks.
    /// A start that it heard may stay without its end. Kernel: `mmu_notifier_unregister`.
    public func unregister(_ notifier: MMUNotifier) {
        let section = notifierReaders.enter()
        notifierLock.lock()
        let listed = notifiers.contains { $0 === notifier }
        notifierLock.unlock()
        // Before it leaves the list: until it is released it must hear of every change.
        if listed { notifier.release() }
        notifierLock.lock()
        notifiers.removeAll { $0 === notifier }
        notifierLock.unlock()
        notifierReaders.exit(section)
        notifierReaders.synchronize()
    }

    /// The address space dies. Kernel: `mmu_notifier_release`.
    func releaseNotifiers() {
        let section = notifierReaders.enter()
        notifierLock.lock()
        let listeners = notifiers
        notifierLock.unlock()
        for listener in listeners { listener.release() }
        notifierLock.lock()
        notifiers.removeAll()
        notifierLock.unlock()
        notifierReaders.exit(section)
        notifierReaders.synchronize()
    }

    // MARK: Ageing

    /// Asks the secondary MMUs whether they used `range`, and clears that. Kernel: `mmu_notifier_clear_flush_young`.
    public func clearFlushYoung(_ range: Range<UserAddress>) -> Bool { ask { $0.clearFlushYoung(range) } }
    /// Kernel: `mmu_notifier_clear_young`.
    public func clearYoung(_ range: Range<UserAddress>) -> Bool { ask { $0.clearYoung(range) } }
    /// Kernel: `mmu_notifier_test_young`.
    public func testYoung(_ address: UserAddress) -> Bool { ask { $0.testYoung(address) } }

    private func ask(_ question: (MMUNotifier) -> Bool) -> Bool {
        let section = notifierReaders.enter()
        notifierLock.lock()
        let listeners = notifiers
        notifierLock.unlock()
        var young = false
        for listener in listeners where question(listener) { young = true }
        notifierReaders.exit(section)
        return young
    }
}
