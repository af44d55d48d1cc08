import CSchedule
import Synchronization

/// Counters of readers, spread over lines of memory: who enters and leaves writes a line of its own, so that no line goes
/// from processor to processor among readers, and who waits for all of them looks at every line. Kernel: per-CPU counters
/// (`srcu_struct`'s, `percpu_rw_semaphore`'s).
///
/// A task leaves on the line on which it has entered, so no counter is ever negative, and all are 0 exactly when nobody is
/// inside.
struct ReaderLines: ~Copyable, @unchecked Sendable {
    // Unchecked: the pointer never changes, and what it points to is atomic.
    private let lines: UnsafeMutableRawPointer
    let count: Int
    private static let bytes = 64

    /// - Parameter isSpread: one line for each task, as far as they go; else one for all.
    init(isSpread: Bool) {
        count = isSpread ? fl_lines : 1
        lines = .allocate(byteCount: count * Self.bytes, alignment: Self.bytes)
        lines.initializeMemory(as: UInt64.self, repeating: 0, count: count * Self.bytes / 8)
    }

    deinit { lines.deallocate() }

    /// The running task's line.
    @inline(__always) var own: Int { count == 1 ? 0 : Int(fl_line()) }

    /// One of the counters of a line: 0 or 1.
    @inline(__always)
    func counter(_ number: Int, line: Int) -> UnsafeMutablePointer<Atomic<Int>> {
        (lines + line &* Self.bytes + number &* 8).assumingMemoryBound(to: Atomic<Int>.self)
    }

    /// Whether nobody is inside, by a look at each line in turn. Nobody may enter meanwhile for the answer to hold.
    func isEmpty(_ number: Int) -> Bool {
        for line in 0..<count where counter(number, line: line).pointee.load(ordering: .sequentiallyConsistent) != 0 {
            return false
        }
        return true
    }
}
