// Paging: stage-2 page tables, one folder for each MMU; what radix tables share stands in `Radix`.
//
// It guarantees: a frame enters an entry only with an `InstallPermit`, and whatever removes or weakens an entry says
// whether TLBs must be flushed. It never looks at a page frame. Read this file first, then a format, then its MMU.

import Frames
import GuestMemory
import HostMemory
import Synchrony

/// A radix page-table format, as data and three questions. Levels count from 1 (4 KiB) up to `levels` (the root).
protocol RadixFormat: Sendable {
    var levels: UInt8 { get }
    /// Index bits of the root: 9, or 11 for a four-page root.
    var rootIndexBits: UInt64 { get }
    var field: FrameField { get }
    /// What most entries hold: neither table nor leaf.
    var empty: UInt64 { get }
    /// Whether `entry` at `level` points to a table.
    func isTable(_ entry: UInt64, _ level: UInt8) -> Bool
    /// Whether `entry` at `level` maps memory.
    func isLeaf(_ entry: UInt64, _ level: UInt8) -> Bool
}

/// An entry found on the way down.
struct RadixPosition {
    let entry: StageTwoEntry
    let value: UInt64
    let level: PageLevel
    /// The table that holds the entry, and the entry's index.
    let table: HostFrame
    let index: Int
}

/// Consecutive entries of one table that may be leaves: all of a level-1 table that the range covers, or one huge leaf.
struct LeafRun {
    let table: HostFrame
    let level: PageLevel
    let firstIndex: Int
    let count: Int
    /// The guest frame of the first entry.
    let base: GuestFrame
}

/// A view of the tables under one root.
struct RadixTables<Format: RadixFormat> {
    let memory: TableArena
    let format: Format
    let root: HostFrame

    @inline(__always)
    func index(_ frame: GuestFrame, _ level: UInt8) -> Int {
        let bits = level == format.levels ? format.rootIndexBits : 9
        return Int(truncatingIfNeeded: (frame.number &>> (9 &* UInt64(level &- 1))) & ((1 &<< bits) &- 1))
    }

    @inline(__always)
    func entry(_ index: Int, of table: HostFrame) -> StageTwoEntry {
        StageTwoEntry(memory.entry(index, of: table), format.field)
    }

    /// The first guest frame beyond the tables' reach.
    var end: GuestFrame { GuestFrame(1 << (9 * UInt64(format.levels - 1) + format.rootIndexBits)) }

    /// Goes down towards `frame` and stops at `target`'s level, or above it where there is no table to enter.
    /// Caller: mmu_lock or a read-side section that keeps tables from being freed.
    ///
    /// `racing`: the caller acts on what it finds without a second look, and whoever shares mmu_lock may have unlinked the
    /// table and frozen its entries by then. Who does that names the table alone.
    @inline(__always)
    func descend(to frame: GuestFrame, until target: PageLevel, racing: Bool = false) -> RadixPosition {
        var table = root
        var level = format.levels
        while true {
            let index = index(frame, level)
            let entry = entry(index, of: table)
            if racing && level <= target.rawValue { schedulingPoint(.atomicLoad, table.physicalAddress) }
            let value = entry.load()
            if level <= target.rawValue || !format.isTable(value, level) {
                return RadixPosition(entry: entry, value: value, level: PageLevel(level), table: table, index: index)
            }
            table = format.field.frame(in: value)
            level -= 1
        }
    }

    /// How many tables are missing on the way to the 4 KiB entry of `frame`. Where none is, that entry is not looked at:
    /// its line is only asked for. Caller as for `descend`.
    @inline(__always)
    func approach(_ frame: GuestFrame) -> Int {
        var table = root
        var level = format.levels
        while level > 1 {
            let value = entry(index(frame, level), of: table).load()
            guard format.isTable(value, level) else { return Int(level) - 1 }
            table = format.field.frame(in: value)
            level -= 1
        }
        entry(index(frame, 1), of: table).prefetch()
        return 0
    }

    /// The leaf that maps `frame`, if there is one.
    func leaf(of frame: GuestFrame) -> RadixPosition? {
        let position = descend(to: frame, until: .page4K)
        return format.isLeaf(position.value, position.level.rawValue) ? position : nil
    }

    /// The runs of possible leaves that intersect `range`, in ascending order. A huge leaf is given whole. Level-1 runs
    /// are given without looking at their entries.
    func runs(in range: Range<GuestFrame>) -> LeafRuns<Format> {
        LeafRuns(tables: self, cursor: range.lowerBound, end: Swift.min(range.upperBound, end))
    }

    /// How many entries from this one on are empty, at least 1: tables are mostly empty, and going down from the root for
    /// each entry is dear. Unannounced: the caller's lock keeps whoever makes entries out.
    func empties(from position: RadixPosition) -> Int {
        let level = position.level.rawValue
        let size = level == format.levels ? 1 << Int(format.rootIndexBits) : 512
        var next = position.index + 1
        while next < size {
            next += position.entry.following(next - position.index).run(of: format.empty, atMost: size - next)
            guard next < size else { break }
            let value = position.entry.following(next - position.index).peek()
            if format.isTable(value, level) || format.isLeaf(value, level) { break }
            next += 1
        }
        return next - position.index
    }
}

/// See `RadixTables.runs`.
struct LeafRuns<Format: RadixFormat>: Sequence, IteratorProtocol {
    let tables: RadixTables<Format>
    var cursor: GuestFrame
    let end: GuestFrame

    mutating func next() -> LeafRun? {
        while cursor < end {
            let position = tables.descend(to: cursor, until: .page4K)
            let level = position.level
            let start = cursor.aligned(to: level)
            if level == .page4K {
                let count = Swift.min(512 - position.index, Int(end.number - cursor.number))
                cursor = cursor.advanced(by: count)
                return LeafRun(
                    table: position.table, level: level, firstIndex: position.index, count: count, base: start)
            }
            if tables.format.isLeaf(position.value, level.rawValue) {
                cursor = GuestFrame(start.number + level.frames)
                return LeafRun(table: position.table, level: level, firstIndex: position.index, count: 1, base: start)
            }
            cursor = GuestFrame(start.number + UInt64(tables.empties(from: position)) * level.frames)
        }
        return nil
    }
}
