import CSchedule
import Synchronization

/// Counters of readers, spread over lines of memory: who enters and leaves writes a line of its own, so that no line goes
/// from processor to processor among readers, and who waits for all of them looks at every line. Kernel: per-CPU counters
/// (`srcu_struct`'s, `percpu_rw_semaphore`'s).
///
/// A task leaves on the line on which it has entered, so no counter is ever negative, and all are 0 exactly when nobody is
/// inside.
@frozen @usableFromInline
struct ReaderLines: @unchecked Sendable {
    // Unchecked: the pointer never changes, and what it points to is atomic.
    @usableFromInline let lines: UnsafeMutableRawPointer
    @usableFromInline let count: Int
    @inlinable static var bytes: Int { 64 }

    /// - Parameter isSpread: a line for each task, as far as they go; else one for all.
    init(isSpread: Bool) {
        count = isSpread ? Int(fl_lines) : 1
        lines = .allocate(byteCount: count * Self.bytes, alignment: Self.bytes)
        lines.initializeMemory(as: UInt64.self, repeating: 0, count: count * Self.bytes / 8)
    }

    /// The owner's last word. A `~Copyable` value with a `deinit` would do it itself, but Embedded Swift 6.3 can't destroy
    /// one of another module.
    func deallocate() { lines.deallocate() }

    @inlinable @inline(__always) var isSpread: Bool { count > 1 }

    /// The running task's line.
    @inlinable @inline(__always) var own: Int { count == 1 ? 0 : Int(fl_line()) }

    /// One of the counters of a line: 0 or 1.
    @inlinable @inline(__always)
    func counter(_ number: Int, line: Int) -> UnsafeMutablePointer<Atomic<Int>> {
        (lines + (line &* Self.bytes &+ number &* 8)).assumingMemoryBound(to: Atomic<Int>.self)
    }

    /// In one order with whatever the other side does before it looks at the counter.
    @inlinable @inline(__always)
    func enter(_ number: Int, line: Int) {
        _ = counter(number, line: line).pointee.wrappingAdd(1, ordering: .sequentiallyConsistent)
    }

    /// Nobody else writes a line that is the task's own: a load and a store, and no instruction that locks.
    @inlinable @inline(__always)
    func leave(_ number: Int, line: Int) {
        let counter = counter(number, line: line)
        if count == 1 || line == Int(fl_common_line) {
            _ = counter.pointee.wrappingSubtract(1, ordering: .releasing)
        } else {
            counter.pointee.store(counter.pointee.load(ordering: .relaxed) &- 1, ordering: .releasing)
        }
    }

    /// Whether nobody is inside, by a look at each line in turn. Nobody may enter meanwhile for the answer to hold.
    func isEmpty(_ number: Int) -> Bool {
        for line in 0..<count where counter(number, line: line).pointee.load(ordering: .sequentiallyConsistent) != 0 {
            return false
        }
        return true
    }
}
