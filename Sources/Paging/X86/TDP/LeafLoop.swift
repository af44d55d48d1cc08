import Audit
import Frames
import GuestMemory
import HostMemory
import Synchrony

/// The loops over the entries of a run, and what they need, fetched once. Spec: x86 3.3, 3.12.
///
/// Caller: mmu_lock for writing, but where `shared` says otherwise. The processor still sets A and D, and the lockless
/// fault path still sets W, so every change is one atomic instruction and what counts is the value that it returns.
///
/// Entries are looked at unannounced first: present ones change only under mmu_lock or in bits that don't matter here, and
/// 512 scheduling points for a table would drown all others.
struct LeafLoop {
    private let memory: PhysicalMemory
    private let statistics: Statistics
    private let journal: Journal?
    private let bits: EntryBits
    /// D, or W where hardware keeps no D.
    private let loggingBit: UInt64

    init(_ mmu: TDPMMU) {
        memory = mmu.vm.memory
        statistics = mmu.vm.statistics
        journal = mmu.vm.memory.journal
        bits = mmu.bits
        loggingBit = mmu.loggingBit
    }

    @inline(__always)
    private func guest(_ run: LeafRun, _ i: Int) -> GuestFrame {
        GuestFrame(run.base.number + UInt64(truncatingIfNeeded: i) * run.level.frames)
    }

    /// Empties the leaves of `run`; how many there were. `shared`: mmu_lock is held for reading, so each change is a
    /// compare-exchange and the bookkeeping comes after its success (X31). Kernel: `tdp_mmu_zap_leafs`.
    @inline(__always)
    func zap<P: ReferencePolicy>(_ run: LeafRun, _ policy: P, shared: Bool) -> Int {
        let level = run.level.rawValue
        var count = 0
        for i in 0..<run.count {
            let entry = StageTwoEntry(memory.entry(run.firstIndex &+ i, of: run.table), EntryBits.field)
            let seen = entry.peek()
            guard EntryBits.isLeaf(seen, level) else { continue }
            schedulingNote(.atomicLoad, run.table.physicalAddress)
            let old = shared ? clearShared(entry, seen, level) : entry.exchange(forEmpty: EntryBits.empty)
            guard old & EntryBits.mmuPresent != 0 else { continue }
            count &+= 1
            policy.leafRemoved(
                EntryBits.field.frame(in: old), counted: old & EntryBits.counted != 0,
                accessed: old & bits.accessed != 0,
                dirty: old & loggingBit != 0)
            if let journal { note(journal, .entryZapped, guest(run, i), level, new: EntryBits.empty, old: old) }
        }
        if count > 0 { statistics.addPages(level: level, -count) }
        return count
    }

    /// 0 if the leaf is gone, or is no leaf any more.
    private func clearShared(_ entry: StageTwoEntry, _ seen: UInt64, _ level: UInt8) -> UInt64 {
        var seen = seen
        while let now = entry.clear(to: EntryBits.empty, expected: seen) {
            guard EntryBits.isLeaf(now, level) else { return 0 }
            seen = now
        }
        return seen
    }

    /// Clears `lost`, W or D, in those leaves of `run` whose bit is set in `mask` (bit 0 is the run's first entry, one
    /// bit for each frame; runs longer than 64 take all). Whether any had one. The old policies mark the page, since
    /// the entry's word is lost. Kernel: `clear_dirty_pt_masked`, `wrprot_gfn_range`, `clear_dirty_gfn_range`.
    ///
    /// Up to 64 entries are looked at, then changed: the processor waits at each change for all that it has begun, also for
    /// the look at the next entry.
    @inline(__always)
    func clear<P: ReferencePolicy>(_ lost: UInt64, in run: LeafRun, mask: UInt64 = ~0, _ policy: P) -> Bool {
        let level = run.level.rawValue
        let first = StageTwoEntry(memory.entry(run.firstIndex, of: run.table), EntryBits.field)
        var any = false
        var start = 0
        while start < run.count {
            let count = min(64, run.count &- start)
            var hits: UInt64 = 0
            for i in 0..<count {
                let seen = first.following(start &+ i).peek()
                let isHit = EntryBits.isLeaf(seen, level) && seen & lost != 0
                hits |= (isHit ? 1 : 0) &<< UInt64(truncatingIfNeeded: i)
            }
            if start == 0 { hits &= mask }
            any = any || hits != 0
            if hits != 0 {
                if let journal {
                    clear(lost, hits, run, start, policy, telling: journal)
                } else {
                    Self.clear(lost, hits, first.following(start), run.table, policy)
                }
            }
            start &+= 64
        }
        return any
    }

    /// Clears `lost` in the entries from `first` on that `hits` names.
    ///
    /// Only the processor's A and D and the lockless path's W can come in between, all of them no matter here; an old value
    /// that nobody reads makes this one `lock and`. Apart, so that all it needs stays in registers: a load between two locked
    /// instructions waits for the first, and the second for it.
    @inline(never)
    private static func clear<P: ReferencePolicy>(
        _ lost: UInt64, _ hits: UInt64, _ first: StageTwoEntry, _ table: HostFrame, _ policy: P
    ) {
        var hits = hits
        while hits != 0 {
            let entry = first.following(hits.trailingZeroBitCount)
            hits &= hits &- 1
            schedulingNote(.atomicLoad, table.physicalAddress)
            _ = entry.clear(bits: lost)
            policy.dirtyCleared(
                EntryBits.field.frame(in: entry.peek()), counted: entry.peek() & EntryBits.counted != 0)
        }
    }

    /// The same where a journal listens. `start`: the place in `run` of the first.
    @inline(never)
    private func clear<P: ReferencePolicy>(
        _ lost: UInt64, _ hits: UInt64, _ run: LeafRun, _ start: Int, _ policy: P, telling journal: Journal
    ) {
        for i in start..<min(start + 64, run.count) where hits &>> UInt64(truncatingIfNeeded: i &- start) & 1 != 0 {
            let entry = StageTwoEntry(memory.entry(run.firstIndex &+ i, of: run.table), EntryBits.field)
            schedulingNote(.atomicLoad, run.table.physicalAddress)
            let old = entry.clear(bits: lost)
            note(journal, .entryChanged, guest(run, i), run.level.rawValue, new: old & ~lost, old: old)
            policy.dirtyCleared(EntryBits.field.frame(in: old), counted: old & EntryBits.counted != 0)
        }
    }

    /// Makes the leaves of `run` old; whether any was young. Kernel: `age_gfn_range`. Spec: x86 3.9.
    ///
    /// Without A in hardware the leaf loses its rights instead, and with them, under the old policies, the word that it
    /// was writable.
    @inline(__always)
    func age<P: ReferencePolicy>(_ run: LeafRun, _ policy: P) -> Bool {
        let level = run.level.rawValue
        var young = false
        for i in 0..<run.count {
            let entry = StageTwoEntry(memory.entry(run.firstIndex &+ i, of: run.table), EntryBits.field)
            var old = entry.peek()
            guard EntryBits.isLeaf(old, level), old & bits.accessed != 0 else { continue }
            young = true
            if EntryBits.hasAD(old) {
                old = entry.clear(bits: bits.accessed)
            } else {
                while let now = entry.apply(bits.ageing(old), expected: old) { old = now }
                if old & EntryBits.write != 0 {
                    policy.dirtyCleared(EntryBits.field.frame(in: old), counted: old & EntryBits.counted != 0)
                }
            }
            if let journal {
                note(journal, .entryChanged, guest(run, i), level, new: bits.ageing(old).applied(to: old), old: old)
            }
        }
        return young
    }

    /// Whether any leaf of `run` is young.
    func anyAccessed(_ run: LeafRun) -> Bool {
        for i in 0..<run.count {
            let entry = memory.entry(run.firstIndex + i, of: run.table).peek()
            if EntryBits.isLeaf(entry, run.level.rawValue), entry & bits.accessed != 0 { return true }
        }
        return false
    }

    @inline(never)
    private func note(
        _ journal: Journal, _ kind: Event.Kind, _ guest: GuestFrame, _ level: UInt8, new: UInt64, old: UInt64
    ) {
        journal.record(
            Event(
                kind, frame: EntryBits.field.frame(in: old), guest: guest.number, level: level, value: new, extra: old))
    }
}
