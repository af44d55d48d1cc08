import Synchronization

/// Read-side sections with grace periods. Kernel: SRCU (`srcu_struct`), and RCU where `atomic` is set.
///
/// Two counters; a grace period flips which one new readers use and waits until the other has drained, twice, so that a
/// reader that was caught between choosing a counter and raising it is waited for too. With spread readers that holds line
/// by line.
public final class ReadSideSections: Sendable {
    @usableFromInline let readers: ReaderLines
    @usableFromInline let index = Atomic<UInt32>(0)
    let updater = Atomic<UInt32>(0)
    /// Whether a reader may not sleep (RCU).
    public let atomic: Bool
    public let identity = ObjectIdentity()

    /// - Parameter spread: readers are many, and shall not write one line all of them.
    public init(atomic: Bool, spread: Bool = false) {
        self.atomic = atomic
        readers = ReaderLines(isSpread: spread)
    }

    deinit { readers.deallocate() }

    /// Enters a read-side section; give the result to `exit`.
    @inlinable @inline(__always)
    public func enter() -> UInt32 {
        schedulingPoint(.readSideEnter, identity.value)
        let side = index.load(ordering: .acquiring) & 1
        let line = readers.own
        readers.enter(Int(side), line: line)
        if atomic { noteAtomicSection(entering: true) }
        return side | UInt32(truncatingIfNeeded: line) << 1
    }

    @inlinable @inline(__always)
    public func exit(_ section: UInt32) {
        if atomic { noteAtomicSection(entering: false) }
        schedulingNote(.readSideExit, identity.value)
        readers.leave(Int(section & 1), line: Int(section >> 1))
    }

    /// Waits until every section that was entered before the call has been left. Must not be called inside one.
    public func synchronize() {
        mightSleep()
        schedulingPoint(.gracePeriod, identity.value)
        spinUntil(identity.value) { updater.compareExchange(expected: 0, desired: 1, ordering: .acquiring).exchanged }
        for _ in 0..<2 {
            let old = Int(index.add(1, ordering: .sequentiallyConsistent).oldValue & 1)
            for line in 0..<readers.count {
                let counter = readers.counter(old, line: line)
                // The explorer is asked to wait only where there is somebody to wait for.
                if counter.pointee.load(ordering: .sequentiallyConsistent) == 0, line > 0 { continue }
                spinUntil(identity.value) { counter.pointee.load(ordering: .sequentiallyConsistent) == 0 }
            }
        }
        schedulingNote(.gracePeriod, identity.value)
        updater.store(0, ordering: .releasing)
    }

    /// Whether no section is open right now: what was unlinked before the call can then be freed.
    public var isQuiescent: Bool {
        schedulingPoint(.conditionRead, identity.value)
        return readers.isEmpty(0) && readers.isEmpty(1)
    }
}
