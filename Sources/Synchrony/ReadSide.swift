import Synchronization

/// Read-side sections with grace periods. Kernel: SRCU (`srcu_struct`), and RCU where `atomic` is set.
///
/// Two counters; a grace period flips which one new readers use and waits until the other has drained, twice, so that a
/// reader that was caught between choosing a counter and raising it is waited for too.
public final class ReadSideSections: Sendable {
    let readers0 = Atomic<Int>(0)
    let readers1 = Atomic<Int>(0)
    let index = Atomic<UInt32>(0)
    let updater = Atomic<UInt32>(0)
    /// Whether a reader may not sleep (RCU).
    public let atomic: Bool
    public let identity = ObjectIdentity()

    public init(atomic: Bool) { self.atomic = atomic }
    /// Enters a read-side section; give the result to `exit`.
    public func enter() -> UInt32 {
        schedulingPoint(.readSideEnter, identity.value)
        let side = index.load(ordering: .acquiring) & 1
        if side == 0 {
            readers0.add(1, ordering: .sequentiallyConsistent)
        } else {
            readers1.add(1, ordering: .sequentiallyConsistent)
        }
        if atomic { noteAtomicSection(entering: true) }
        return side
    }

    public func exit(_ side: UInt32) {
        if atomic { noteAtomicSection(entering: false) }
        schedulingNote(.readSideExit, identity.value)
        if side == 0 {
            readers0.subtract(1, ordering: .releasing)
        } else {
            readers1.subtract(1, ordering: .releasing)
        }
    }

    /// Waits until every section that was entered before the call has been left. Must not be called inside one.
    public func synchronize() {
        mightSleep()
        schedulingPoint(.gracePeriod, identity.value)
        spinUntil(identity.value) { updater.compareExchange(expected: 0, desired: 1, ordering: .acquiring).exchanged }
        for _ in 0..<2 {
            let old = index.add(1, ordering: .sequentiallyConsistent).oldValue & 1
            if old == 0 {
                spinUntil(identity.value) { readers0.load(ordering: .sequentiallyConsistent) == 0 }
            } else {
                spinUntil(identity.value) { readers1.load(ordering: .sequentiallyConsistent) == 0 }
            }
        }
        schedulingNote(.gracePeriod, identity.value)
        updater.store(0, ordering: .releasing)
    }

    /// Whether no section is open right now: what was unlinked before the call can then be freed.
    public var isQuiescent: Bool {
        schedulingPoint(.conditionRead, identity.value)
        return readers0.load(ordering: .sequentiallyConsistent) == 0
            && readers1.load(ordering: .sequentiallyConsistent) == 0
    }
}
