import CSchedule
import Synchronization

/// An 8-byte page-table entry in raw memory, changed only by atomic operations: software and (modelled) hardware share
/// it. Every access passes a scheduling point.
@frozen
public struct AtomicWord: @unchecked Sendable {
    // Unchecked: the pointee is an `Atomic`, so sharing the pointer is sharing the atomic. Who may write which value is
    // the rule of the owner (mmu_lock, page-table lock), not of this type.
    @usableFromInline let pointer: UnsafeMutablePointer<Atomic<UInt64>>

    /// `address` must be 8-byte aligned and stay valid while the word is used.
    @inlinable @inline(__always)
    public init(at address: UnsafeMutableRawPointer) {
        pointer = address.assumingMemoryBound(to: Atomic<UInt64>.self)
    }

    /// The word's address: its name for the explorer. The arena's place must not change from run to run.
    @inlinable @inline(__always) public var identity: UInt64 { UInt64(UInt(bitPattern: pointer)) }

    /// The word `count` further on, of the same table.
    @inlinable @inline(__always)
    public func following(_ count: Int) -> AtomicWord { AtomicWord(at: UnsafeMutableRawPointer(pointer + count)) }

    /// Reads, and only notes it: for a reader that checks again where it acts (a compare-exchange, a lock and a second
    /// look), so that a change in between shows there; or that holds the lock of all writers but the processor.
    @inlinable @inline(__always)
    public func load() -> UInt64 {
        schedulingNote(.entryRead, identity)
        return pointer.pointee.load(ordering: .acquiring)
    }

    /// Reads where others may go first: for a reader that acts on what it sees without a second look.
    @inlinable @inline(__always)
    public func loadRacing() -> UInt64 {
        schedulingPoint(.entryRead, identity)
        return pointer.pointee.load(ordering: .acquiring)
    }

    /// Reads unannounced: under the lock of every writer whose changes matter to the reader.
    @inlinable @inline(__always)
    public func peek() -> UInt64 { pointer.pointee.load(ordering: .acquiring) }

    /// Asks the processor to bring the word's line, which is about to be written.
    @inlinable @inline(__always)
    public func prefetch() { fl_prefetch(pointer) }

    /// How many words from this one on, at most `count`, hold `value`. Unannounced, like `peek`. Tables are mostly empty:
    /// eight words are looked at for one branch.
    @inlinable @inline(__always)
    public func run(of value: UInt64, atMost count: Int) -> Int {
        var i = 0
        while i + 8 <= count {
            var difference: UInt64 = 0
            for j in i..<i + 8 { difference |= pointer[j].load(ordering: .relaxed) ^ value }
            if difference != 0 { break }
            i += 8
        }
        while i < count, pointer[i].load(ordering: .relaxed) == value { i += 1 }
        return i
    }

    /// Visits the words from this one on, `count` of them, that do not hold `value` when they are looked at: ascending
    /// indices. Unannounced.
    @inlinable @inline(__always)
    public func forEachIndex(below count: Int, notHolding value: UInt64, _ body: (Int) -> Void) {
        var i = 0
        while true {
            i += following(i).run(of: value, atMost: count - i)
            guard i < count else { return }
            body(i)
            i += 1
        }
    }

    /// Writes an entry of a table that nobody else can see yet.
    @inlinable @inline(__always)
    public func initialize(to value: UInt64) { pointer.pointee.store(value, ordering: .relaxed) }

    /// Exchanges unannounced: the caller has announced the change of the whole table.
    @inlinable @inline(__always)
    public func exchangeUnannounced(_ value: UInt64) -> UInt64 {
        pointer.pointee.exchange(value, ordering: .acquiringAndReleasing)
    }

    /// Reads a word of data.
    @inlinable @inline(__always)
    public func loadData() -> UInt64 {
        schedulingPoint(.dataRead, identity)
        return pointer.pointee.load(ordering: .acquiring)
    }

    /// Writes a word of data. Noted for the page as well, for whoever copies pages whole; writes of other words of the page
    /// commute with it.
    @inlinable @inline(__always)
    public func storeData(_ value: UInt64) {
        schedulingPoint(.dataWrite, identity)
        pointer.pointee.store(value, ordering: .releasing)
        schedulingNote(.atomicAccumulate, pageIdentity)
    }

    /// The name of the bytes of the word's page, 4 KiB, as a whole.
    @inlinable @inline(__always) public var pageIdentity: UInt64 { identity & ~0xfff | 1 }

    /// Adds to a word of data, in one step; returns the old value. x86: `lock xadd`.
    @inlinable @inline(__always)
    public func addData(_ value: UInt64) -> UInt64 {
        schedulingPoint(.dataWrite, identity)
        let old = pointer.pointee.wrappingAdd(value, ordering: .acquiringAndReleasing).oldValue
        schedulingNote(.atomicAccumulate, pageIdentity)
        return old
    }

    @inlinable @inline(__always)
    public func store(_ value: UInt64) {
        schedulingPoint(.entryWrite, identity)
        pointer.pointee.store(value, ordering: .releasing)
    }

    /// Kernel: `xchg`.
    @inlinable @inline(__always)
    public func exchange(_ value: UInt64) -> UInt64 {
        schedulingPoint(.entryWrite, identity)
        return pointer.pointee.exchange(value, ordering: .acquiringAndReleasing)
    }

    /// Kernel: `try_cmpxchg64`. Nil on success, else the value found.
    @inlinable @inline(__always)
    public func compareExchange(expected: UInt64, desired: UInt64) -> UInt64? {
        schedulingPoint(.entryWrite, identity)
        let (exchanged, original) = pointer.pointee.compareExchange(
            expected: expected, desired: desired, ordering: .acquiringAndReleasing)
        return exchanged ? nil : original
    }

    /// Clears the bits that are 0 in `mask`; returns the old value. Kernel: `atomic64_fetch_and`.
    @inlinable @inline(__always)
    public func fetchAnd(_ mask: UInt64) -> UInt64 {
        schedulingPoint(.entryWrite, identity)
        return pointer.pointee.bitwiseAnd(mask, ordering: .acquiringAndReleasing).oldValue
    }

    /// Sets `bits`; returns the old value.
    @inlinable @inline(__always)
    public func fetchOr(_ bits: UInt64) -> UInt64 {
        schedulingPoint(.entryWrite, identity)
        return pointer.pointee.bitwiseOr(bits, ordering: .acquiringAndReleasing).oldValue
    }
}

/// A counter that writers bracket and readers check. Kernel: `seqcount_t`; used by the fast GUP walk against fork.
public final class SequenceCount: Sendable {
    let value = Atomic<UInt64>(0)
    let identity = ObjectIdentity()
    public init() {}
    public func beginWrite() { step() }
    public func endWrite() { step() }
    private func step() {
        schedulingPoint(.atomicUpdate, identity.value)
        value.add(1, ordering: .acquiringAndReleasing)
    }
    /// The value to check later; odd while a writer is inside.
    public func read() -> UInt64 {
        schedulingPoint(.atomicLoad, identity.value)
        return value.load(ordering: .acquiring)
    }
    public func changed(since seen: UInt64) -> Bool { seen & 1 == 1 || read() != seen }
}
