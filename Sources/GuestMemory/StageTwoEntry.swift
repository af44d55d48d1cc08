import Frames
import HostMemory
import Synchrony

/// What an entry says of its frame: its number, `(entry & mask) >> shift`, and with which bits the guest may write it.
@frozen
public struct FrameField: Sendable, Equatable {
    public let mask: UInt64
    public let shift: UInt64
    /// The bits of which any one lets the guest write: EPT's W, RISC-V's W. 0 for a format whose bits forbid instead of
    /// allow; its MMU then asks `InstallPermit.writable` itself.
    public let write: UInt64
    @inlinable public init(mask: UInt64, shift: UInt64, write: UInt64) {
        precondition(mask & write == 0, "the frame number and the rights share a bit")
        self.mask = mask
        self.shift = shift
        self.write = write
    }
    @inlinable public func frame(in entry: UInt64) -> HostFrame { HostFrame((entry & mask) >> shift) }
    @inlinable public func bits(for frame: HostFrame) -> UInt64 { (frame.number << shift) & mask }
}

/// A change to an entry that keeps its frame: bits to set and bits to clear. It cannot spell a frame; applying one that
/// would reach into the frame's field traps. Changing rights or A/D needs no permit (DESIGN, "rules as types").
@frozen
public struct EntryUpdate: Sendable, Equatable {
    public let set: UInt64
    public let clear: UInt64
    @inlinable public init(set: UInt64 = 0, clear: UInt64 = 0) {
        self.set = set
        self.clear = clear
    }
    @inlinable public func applied(to entry: UInt64) -> UInt64 { (entry & ~clear) | set }
}

/// How the MMU's hardware tells an entry that it does not accept, whatever the rest of it says: `entry & mask == value`.
@frozen
public struct MarkerForm: Sendable, Equatable {
    public let mask: UInt64
    public let value: UInt64
    @inlinable public init(mask: UInt64, value: UInt64) {
        precondition(value & ~mask == 0 && value != 0, "a form that nothing has")
        self.mask = mask
        self.value = value
    }
    @inlinable @inline(__always) public func matches(_ entry: UInt64) -> Bool { entry & mask == value }
}

/// An entry as it was read under mmu_lock: the one way for a frame to get from an entry into another (split, join)
/// without a permit. It cannot outlive the lock, for afterwards a notifier may zap the entry and the frame may be freed
/// (Spec: I-6).
@frozen
public struct ObservedEntry: ~Escapable {
    public let value: UInt64
    @inlinable @_lifetime(immortal)
    init(_ value: UInt64) { self.value = value }
}

/// One entry of a stage-2 table, and the only ways to change it:
/// *install* a frame (takes an `InstallPermit`), *link* a table, *update* what is not the frame, *split* or *join* what
/// was observed, *clear*. The word itself is out of reach: it could store anything.
@frozen
public struct StageTwoEntry: Sendable {
    @usableFromInline let word: AtomicWord
    public let field: FrameField

    @inlinable @inline(__always)
    public init(_ word: AtomicWord, _ field: FrameField) {
        self.word = word
        self.field = field
    }

    @inlinable @inline(__always) public func load() -> UInt64 { word.load() }

    /// Asks the processor to bring the entry's line, which is about to be written; looks at nothing.
    @inlinable @inline(__always) public func prefetch() { word.prefetch() }

    /// The entry `count` further on in the same table: a loop over a table looks the table up once.
    @inlinable @inline(__always)
    public func following(_ count: Int) -> StageTwoEntry { StageTwoEntry(word.following(count), field) }

    /// See `AtomicWord.run`.
    @inlinable @inline(__always) public func run(of value: UInt64, atMost count: Int) -> Int {
        word.run(of: value, atMost: count)
    }

    /// See `AtomicWord.forEachIndex`.
    @inlinable @inline(__always)
    public func forEachIndex(below count: Int, notHolding value: UInt64, _ body: (Int) -> Void) {
        word.forEachIndex(below: count, notHolding: value, body)
    }

    /// Reads unannounced. See `AtomicWord.peek`.
    @inlinable @inline(__always) public func peek() -> UInt64 { word.peek() }

    /// Reads the entry in order to split it, or to join it with its neighbours. Caller holds mmu_lock.
    @inlinable @_lifetime(borrow guardian)
    public func observe(holding guardian: borrowing MMUGuard) -> ObservedEntry { ObservedEntry(word.load()) }

    /// The same on a fault's way to its entry: a permit exists only while mmu_lock is held.
    @inlinable @_lifetime(copy permit)
    public func observe(holding permit: borrowing InstallPermit) -> ObservedEntry { ObservedEntry(word.load()) }

    // MARK: A frame goes in: only with a permit.

    /// Maps the permit's frame with a leaf of `level`: `attributes` are all bits of the entry but the frame. Nil on
    /// success, else the value found in place of `expected`. Spec: I-6, I-7.
    @inlinable @inline(__always)
    public func install(
        _ permit: borrowing InstallPermit, level: PageLevel, attributes: UInt64, expected: UInt64
    ) -> UInt64? {
        schedulingNote(.pageUse, permit.frame.physicalAddress)
        return word.compareExchange(expected: expected, desired: value(permit, level, attributes))
    }

    /// The same for the exclusive owner of the tables; returns the old value. Caller holds mmu_lock for writing.
    @inlinable
    public func install(_ permit: borrowing InstallPermit, level: PageLevel, attributes: UInt64) -> UInt64 {
        schedulingNote(.pageUse, permit.frame.physicalAddress)
        return word.exchange(value(permit, level, attributes))
    }

    /// The entry that `install` would store.
    @inlinable @inline(__always)
    public func value(_ permit: borrowing InstallPermit, _ level: PageLevel, _ attributes: UInt64) -> UInt64 {
        precondition(attributes & field.mask == 0, "attributes may not spell a frame")
        precondition(permit.writable || attributes & field.write == 0, "the permit does not allow writing (I-7)")
        return attributes | field.bits(for: permit.frame(at: level))
    }

    // MARK: The frame stays.

    /// Applies `update` if the entry still is `expected`; nil on success, else the value found. For lockless paths.
    @inlinable
    public func apply(_ update: EntryUpdate, expected: UInt64) -> UInt64? {
        precondition((update.set | update.clear) & field.mask == 0, "an update may not spell a frame")
        return word.compareExchange(expected: expected, desired: update.applied(to: expected))
    }

    /// Clears `bits` atomically; returns the old value. The frame's field is out of reach.
    @inlinable @inline(__always)
    public func clear(bits: UInt64) -> UInt64 { word.fetchAnd(~(bits & ~field.mask)) }

    /// Sets `bits` atomically; returns the old value.
    @inlinable @inline(__always)
    public func set(bits: UInt64) -> UInt64 { word.fetchOr(bits & ~field.mask) }

    /// Splits a huge leaf: writes the leaf for the same memory, one level down, `index` of 512, into a table that is not
    /// linked yet (this entry). The frame is taken from `huge` and can't be another.
    @inlinable
    public func storePart(of huge: borrowing ObservedEntry, index: Int, childLevel: PageLevel, _ update: EntryUpdate) {
        precondition((update.set | update.clear) & field.mask == 0, "an update may not spell a frame")
        let first = field.frame(in: huge.value)
        precondition(index >= 0 && index < 512 && first.isAligned(to: childLevel.above), "not a part of the huge leaf")
        let frame = HostFrame(first.number + UInt64(index) * childLevel.frames)
        word.initialize(to: (update.applied(to: huge.value) & ~field.mask) | field.bits(for: frame))
    }

    /// All 512 parts, into the table of which this is the first entry.
    @inlinable
    public func storeParts(of huge: borrowing ObservedEntry, childLevel: PageLevel, _ update: EntryUpdate) {
        precondition((update.set | update.clear) & field.mask == 0, "an update may not spell a frame")
        let first = field.frame(in: huge.value)
        let last = HostFrame(first.number + 511 * childLevel.frames)
        precondition(first.isAligned(to: childLevel.above), "not a huge leaf of that level")
        precondition(field.frame(in: field.bits(for: last)) == last, "beyond what the field can say")
        let step = field.bits(for: HostFrame(childLevel.frames))
        var value = (update.applied(to: huge.value) & ~field.mask) | field.bits(for: first)
        for index in 0..<512 {
            word.following(index).initialize(to: value)
            value &+= step
        }
    }

    /// Joins the leaves of a table into one huge leaf of `level`: `leaf` is any leaf of the table; its frame is rounded
    /// down. Nil on success, else the value found in place of `expected`, the link to the table. Spec: x86 3.10.
    @inlinable
    public func replaceTable(
        byJoining leaf: borrowing ObservedEntry, level: PageLevel, _ update: EntryUpdate, expected: UInt64
    ) -> UInt64? {
        precondition((update.set | update.clear) & field.mask == 0, "an update may not spell a frame")
        let frame = field.frame(in: leaf.value).aligned(to: level)
        return word.compareExchange(
            expected: expected, desired: (update.applied(to: leaf.value) & ~field.mask) | field.bits(for: frame))
    }

    // MARK: Markers, tables, and emptiness.

    /// Writes a marker, which may keep a guest address where a frame would be: no walk gets through an entry of `form`.
    /// Nil on success, else the value found.
    @inlinable
    public func mark(_ marker: UInt64, form: MarkerForm, expected: UInt64) -> UInt64? {
        precondition(form.matches(marker), "no marker of this form")
        return word.compareExchange(expected: expected, desired: marker)
    }

    /// Links a table; nil on success, else the value found. A `TableFrame` is always a page table, so this is no way to
    /// map a page of the guest without a permit.
    @inlinable
    public func link(_ table: TableFrame, attributes: UInt64, expected: UInt64) -> UInt64? {
        precondition(attributes & field.mask == 0, "attributes may not spell a frame")
        return word.compareExchange(expected: expected, desired: attributes | field.bits(for: table.frame))
    }

    /// Replaces the entry by `empty`, a value without a frame; returns the old one.
    @inlinable @inline(__always)
    public func exchange(forEmpty empty: UInt64) -> UInt64 { word.exchange(empty & ~field.mask) }

    /// The same unannounced, for the end of a whole table. See `AtomicWord.exchangeUnannounced`.
    @inlinable @inline(__always)
    public func exchangeUnannounced(forEmpty empty: UInt64) -> UInt64 { word.exchangeUnannounced(empty & ~field.mask) }

    /// The same if the entry still is `expected`; nil on success.
    @inlinable
    public func clear(to empty: UInt64, expected: UInt64) -> UInt64? {
        word.compareExchange(expected: expected, desired: empty & ~field.mask)
    }
}
