import Audit
import Frames
import Synchronization
import Synchrony

/// The primary page table: four levels of 512 entries in the arena.
///
/// A huge leaf keeps a spare table for the day it is split, so that splitting cannot fail: the spares of one level-2
/// table hang on its page frame's `word0`, each linking to the next by its own. Kernel: `pgtable_trans_huge_deposit`.
extension AddressSpace {
    /// Entry index of `address` in a table of `level`.
    @inline(__always) static func index(_ address: UserAddress, _ level: UInt64) -> Int {
        Int((address.value >> (pageShift + 9 * (level - 1))) & 511)
    }

    /// What stands at level 2 for an address.
    enum MiddleEntry {
        /// No table down to level 2; the nearest missing one is an entry of `level`.
        case missing(PageLevel)
        case present(AtomicWord, table: HostFrame)
    }

    /// The level-2 entry of `address`, each table read once. No lock needed.
    @inline(__always) func middleEntry(_ address: UserAddress) -> MiddleEntry {
        schedulingNote(.atomicLoad, rootIdentity.value)
        let top = root.load(ordering: .acquiring)
        guard top != 0 else { return .missing(PageLevel(4)) }
        let upper = HostEntry(memory.entry(Self.index(address, 4), of: HostFrame(top)).load())
        guard upper.isPresent else { return .missing(PageLevel(4)) }
        let middle = HostEntry(memory.entry(Self.index(address, 3), of: upper.frame).load())
        guard middle.isPresent, !middle.isLargeLeaf else { return .missing(.page1G) }
        return .present(memory.entry(Self.index(address, 2), of: middle.frame), table: middle.frame)
    }

    /// The leaf for `address`, present or not, if there is an entry for it. Lockless callers must check again.
    @inline(__always)
    func leaf(_ address: UserAddress) -> HostLeaf? {
        if memory.hasHugePools, let word = upperEntry(address) {
            let entry = HostEntry(word.load())
            if entry.isLargeLeaf { return HostLeaf(word: word, entry: entry, level: .page1G) }
        }
        guard case .present(let word, _) = middleEntry(address) else { return nil }
        let middle = HostEntry(word.load())
        if middle.isLargeLeaf { return HostLeaf(word: word, entry: middle, level: .page2M) }
        guard middle.isPresent else { return nil }
        let last = memory.entry(Self.index(address, 1), of: middle.frame)
        return HostLeaf(word: last, entry: HostEntry(last.load()), level: .page4K, upper: (word, middle.bits))
    }

    /// The level of the leaf for `address`: 4 KiB also where nothing is mapped. Lockless callers must check again.
    @inline(__always)
    func leafLevel(_ address: UserAddress) -> PageLevel {
        if memory.hasHugePools, let word = upperEntry(address), HostEntry(word.load()).isLargeLeaf { return .page1G }
        guard case .present(let word, _) = middleEntry(address) else { return .page4K }
        return HostEntry(word.load()).isLargeLeaf ? .page2M : .page4K
    }

    /// Asks the processor to bring the 4 KiB entry of `address`, if there is a table for it. Unannounced: nothing that is
    /// seen here is acted on.
    @inline(__always)
    public func prefetchEntry(of address: UserAddress) {
        let top = root.load(ordering: .relaxed)
        guard top != 0 else { return }
        let upper = HostEntry(memory.entry(Self.index(address, 4), of: HostFrame(top)).peek())
        guard upper.isPresent else { return }
        let middle = HostEntry(memory.entry(Self.index(address, 3), of: upper.frame).peek())
        guard middle.isPresent, !middle.isLargeLeaf else { return }
        let last = HostEntry(memory.entry(Self.index(address, 2), of: middle.frame).peek())
        guard last.isPresent, !last.isLargeLeaf else { return }
        memory.entry(Self.index(address, 1), of: last.frame).prefetch()
    }

    /// The first address of `range` whose 1 GiB has a table, or a leaf. No lock needed.
    func firstWithTable(_ range: Range<UserAddress>) -> UserAddress? {
        let top = root.load(ordering: .relaxed)
        guard top != 0 else { return nil }
        var address = range.lowerBound
        while address < range.upperBound {
            let upper = HostEntry(memory.entry(Self.index(address, 4), of: HostFrame(top)).peek())
            if upper.isPresent, memory.entry(Self.index(address, 3), of: upper.frame).peek() != 0 { return address }
            let shift: UInt64 = upper.isPresent ? 30 : 39
            address = UserAddress((address.value >> shift + 1) << shift)
        }
        return nil
    }

    /// The level-3 entry of `address`, if there is one. No lock needed.
    func upperEntry(_ address: UserAddress) -> AtomicWord? {
        let top = root.load(ordering: .acquiring)
        guard top != 0 else { return nil }
        let upper = HostEntry(memory.entry(Self.index(address, 4), of: HostFrame(top)).load())
        return upper.isPresent ? memory.entry(Self.index(address, 3), of: upper.frame) : nil
    }

    /// The same, its tables made. Nil: no memory.
    func makeUpperEntry(_ address: UserAddress) -> AtomicWord? {
        guard let top = makeRoot() else { return nil }
        guard let upper = makeTable(memory.entry(Self.index(address, 4), of: top)) else { return nil }
        return memory.entry(Self.index(address, 3), of: upper)
    }

    /// The level-2 entry, its tables made where they are missing. Nil: no memory. `pageTableLock` not held.
    func makeMiddleEntry(_ address: UserAddress) -> (word: AtomicWord, table: HostFrame)? {
        guard let top = makeRoot() else { return nil }
        guard let upper = makeTable(memory.entry(Self.index(address, 4), of: top)) else { return nil }
        guard let middle = makeTable(memory.entry(Self.index(address, 3), of: upper)) else { return nil }
        return (memory.entry(Self.index(address, 2), of: middle), middle)
    }

    private func makeRoot() -> HostFrame? {
        schedulingNote(.atomicLoad, rootIdentity.value)
        let top = root.load(ordering: .acquiring)
        if top != 0 { return HostFrame(top) }
        guard let fresh = newTable() else { return nil }
        pageTableLock.lock()
        let seen = root.load(ordering: .acquiring)
        if seen == 0 {
            schedulingPoint(.atomicStore, rootIdentity.value)
            root.store(fresh.number, ordering: .releasing)
        }
        pageTableLock.unlock()
        guard seen != 0 else { return fresh }
        freeTable(fresh)
        return HostFrame(seen)
    }

    /// The table that `word` points to, made if there is none. At level 2 a huge leaf may stand there instead: then its
    /// frame is returned, which is no table. Nil: no memory. Kernel: `__pte_alloc`.
    func makeTable(_ word: AtomicWord) -> HostFrame? {
        let seen = HostEntry(word.load())
        if seen.bits != 0 { return seen.frame }
        guard let fresh = newTable() else { return nil }
        pageTableLock.lock()
        let now = HostEntry(word.load())
        if now.bits == 0 { word.store(HostEntry.table(fresh)) }
        pageTableLock.unlock()
        guard now.bits != 0 else { return fresh }
        freeTable(fresh)
        return now.frame
    }

    /// The level-1 entry of `address`. Nil: no memory, or a huge leaf stands there (`isLeaf`).
    func makeLastEntry(_ address: UserAddress, in middle: AtomicWord) -> (word: AtomicWord?, isLeaf: Bool) {
        if HostEntry(middle.load()).isLargeLeaf { return (nil, true) }
        guard let table = makeTable(middle) else { return (nil, false) }
        // Between the two reads another task may have made a huge leaf; its frame is no table.
        guard memory.isTable(table) else { return (nil, true) }
        return (memory.entry(Self.index(address, 1), of: table), false)
    }

    func newTable() -> HostFrame? { host.allocateTable(order: 0, fill: 0) }
    func freeTable(_ frame: HostFrame) { host.freeTable(frame) }

    // MARK: Spare tables

    /// Puts `spare` aside for the huge leaf just made in `table`. `pageTableLock` held.
    func deposit(_ spare: HostFrame, in table: HostFrame) {
        memory.page(spare).pointee.word0 = memory.page(table).pointee.word0
        memory.page(table).pointee.word0 = spare.number
    }

    /// Takes a spare table of `table` back. `pageTableLock` held. Precondition: each huge leaf made one.
    func withdraw(from table: HostFrame) -> HostFrame {
        let spare = memory.page(table).pointee.word0
        precondition(spare != 0, "a huge leaf without its spare table")
        memory.page(table).pointee.word0 = memory.page(HostFrame(spare)).pointee.word0
        memory.page(HostFrame(spare)).pointee.word0 = 0
        return HostFrame(spare)
    }

    // MARK: Writing

    /// Writes a leaf. `pageTableLock` held. From now on the frame may be written by whoever the entry lets, the guest
    /// among them.
    func setLeaf(_ word: AtomicWord, _ entry: HostEntry, _ address: UserAddress, _ level: PageLevel = .page4K) {
        if entry.isWritable { memory.willWrite(entry.frame, count: Int(level.frames)) }
        word.store(entry.bits)
        if entry.mapsFrame { schedulingNote(.pageUse, entry.frame.physicalAddress) }
        memory.record(
            Event(
                .hostEntrySet, frame: entry.frame, guest: address.aligned(to: level).page, level: level.rawValue,
                value: entry.bits))
    }

    /// Frees every table. Only when no entry is left and nobody walks.
    func freeAllTables() {
        let top = root.exchange(0, ordering: .acquiringAndReleasing)
        if top != 0 { freeTables(HostFrame(top), level: 4) }
    }

    private func freeTables(_ table: HostFrame, level: UInt64) {
        if level > 1 {
            let first = memory.entry(0, of: table)
            first.forEachIndex(below: 512, notHolding: 0) { i in
                let entry = HostEntry(first.following(i).peek())
                if entry.isPresent, !entry.isLargeLeaf { freeTables(entry.frame, level: level - 1) }
            }
        }
        freeTable(table)
    }
}

extension PhysicalMemory {
    func isTable(_ frame: HostFrame) -> Bool {
        hasPageFrame(frame) && page(frame).pointee.flags.load(ordering: .relaxed) & PageFlags.table != 0
    }
}
