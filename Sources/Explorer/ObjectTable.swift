import Synchrony

/// What the running run knows of one shared object: who holds it, who touched it last, and what happened before.
///
/// An event is a transition: the code from one scheduling point to the next. Events are numbered from 1 in the order
/// run; 0 is none. A clock holds, for each task, its last event that happened before.
struct ObjectState {
    /// The phase of the run in which the rest was written; older values are void.
    var epoch: UInt64 = 0
    /// Changes so far, for waiters.
    var version: UInt32 = 0
    /// 1 + the task that holds it as a lock.
    var owner: UInt8 = 0
    /// Holders, shared.
    var shared: UInt16 = 0
    var lastWriter: UInt8 = 0
    var lastAcquirer: UInt8 = 0
    var lastReleaser: UInt8 = 0
    var lastWrite: UInt32 = 0
    var lastAcquire: UInt32 = 0
    var lastRelease: UInt32 = 0
}

/// A clock or a row of event numbers: one for each task.
typealias Row = UnsafeMutablePointer<UInt32>

/// The shared objects of a search, found by name. Names are the same in every run, so the table only grows.
struct ObjectTable {
    /// Rows of an object: clocks after writes, releases, reads and accumulations; last read and last accumulation of each
    /// task.
    enum RowKind: Int { case writeClock, releaseClock, readClock, accumulateClock, reads, accumulations }
    static let rowsPerObject = 6

    private var names: UnsafeMutablePointer<UInt64>
    private var indices: UnsafeMutablePointer<UInt32>
    private var slotCount = 1024
    private(set) var states: UnsafeMutablePointer<ObjectState>
    private(set) var rows: Row
    private(set) var count = 0
    private var capacity = 512
    /// The present phase of the present run.
    var epoch: UInt64 = 1
    var taskCount = 0

    init() {
        names = .allocate(capacity: slotCount)
        names.initialize(repeating: 0, count: slotCount)
        indices = .allocate(capacity: slotCount)
        indices.initialize(repeating: 0, count: slotCount)
        states = .allocate(capacity: capacity)
        rows = .allocate(capacity: capacity * Self.rowsPerObject * Subject.mostTasks)
    }

    func deallocate() {
        names.deallocate()
        indices.deallocate()
        states.deallocate()
        rows.deallocate()
    }

    private static func hash(_ name: UInt64) -> Int { Int(truncatingIfNeeded: (name &* 0x9e37_79b9_7f4a_7c15) >> 24) }

    /// The object's index, its state made ready for this phase.
    mutating func index(of name: UInt64) -> Int {
        var slot = Self.hash(name) & (slotCount - 1)
        while names[slot] != name {
            if names[slot] == 0 { return insert(name, at: slot) }
            slot = (slot + 1) & (slotCount - 1)
        }
        let index = Int(indices[slot])
        if states[index].epoch != epoch { reset(index) }
        return index
    }

    private mutating func insert(_ name: UInt64, at slot: Int) -> Int {
        if count == capacity { grow() }
        let index = count
        count += 1
        names[slot] = name
        indices[slot] = UInt32(index)
        (states + index).initialize(to: ObjectState())
        reset(index)
        if count * 2 > slotCount { rehash() }
        return index
    }

    private mutating func grow() {
        let stride = Self.rowsPerObject * Subject.mostTasks
        let newStates = UnsafeMutablePointer<ObjectState>.allocate(capacity: capacity * 2)
        newStates.moveInitialize(from: states, count: count)
        let newRows = Row.allocate(capacity: capacity * 2 * stride)
        newRows.moveInitialize(from: rows, count: count * stride)
        states.deallocate()
        rows.deallocate()
        (states, rows, capacity) = (newStates, newRows, capacity * 2)
    }

    private mutating func rehash() {
        let (oldNames, oldIndices, oldCount) = (names, indices, slotCount)
        slotCount *= 2
        names = .allocate(capacity: slotCount)
        names.initialize(repeating: 0, count: slotCount)
        indices = .allocate(capacity: slotCount)
        indices.initialize(repeating: 0, count: slotCount)
        for old in 0..<oldCount where oldNames[old] != 0 {
            var slot = Self.hash(oldNames[old]) & (slotCount - 1)
            while names[slot] != 0 { slot = (slot + 1) & (slotCount - 1) }
            names[slot] = oldNames[old]
            indices[slot] = oldIndices[old]
        }
        oldNames.deallocate()
        oldIndices.deallocate()
    }

    private func reset(_ index: Int) {
        states[index] = ObjectState()
        states[index].epoch = epoch
        for kind in 0..<Self.rowsPerObject {
            (rows + (index * Self.rowsPerObject + kind) * Subject.mostTasks).update(repeating: 0, count: taskCount)
        }
    }

    func row(_ index: Int, _ kind: RowKind) -> Row {
        rows + (index * Self.rowsPerObject + kind.rawValue) * Subject.mostTasks
    }

    /// Memory held, in bytes.
    var byteCount: Int {
        slotCount * 12 + capacity * (MemoryLayout<ObjectState>.stride + Self.rowsPerObject * Subject.mostTasks * 4)
    }
}
