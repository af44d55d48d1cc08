import CSchedule
import Frames
import Synchrony

/// Sees each entry that a walk reads or writes, through the scheduling points that the walk passes.
final class WalkWatch {
    private let tables: RandomTables
    private(set) var loads = 0
    /// The first frame in which an entry was read, or written, that must not be.
    private(set) var strayRead: UInt64?
    private(set) var strayWrite: UInt64?

    init(_ tables: RandomTables) { self.tables = tables }

    private struct Task {
        /// First, so that the pointer to it is the pointer to the whole.
        var base: fl_task
        unowned(unsafe) let watch: WalkWatch
    }

    func during<R>(_ body: () -> R) -> R {
        let outer = fl_current()
        var base = fl_task()
        base.note = { _, _, _ in }
        base.point = { task, operation, object in
            guard let task else { return }
            UnsafeMutableRawPointer(task).assumingMemoryBound(to: Task.self).pointee.watch.see(operation, object)
        }
        var task = Task(base: base, watch: self)
        return withUnsafeMutablePointer(to: &task) { pointer in
            fl_attach(UnsafeMutableRawPointer(pointer).assumingMemoryBound(to: fl_task.self))
            defer { fl_attach(outer) }
            return body()
        }
    }

    private func see(_ operation: UInt32, _ object: UInt64) {
        let frame = HostFrame((object &- tables.base) >> pageShift)
        switch operation {
        case SchedulingPoint.entryRead.rawValue:
            loads += 1
            // No walk of any processor is a tenth as long: this one would not end.
            precondition(loads < 1000, "a walk without end")
            if !tables.mayRead(frame), !tables.isSecondStage(frame) { strayRead = strayRead ?? frame.number }
        case SchedulingPoint.entryWrite.rawValue:
            if !tables.mayWrite(frame), !tables.isSecondStage(frame) { strayWrite = strayWrite ?? frame.number }
        default: break
        }
    }
}
