import CSchedule
import Synchrony

/// A task of the test's own, which it runs on for a while instead of the thread's.
struct TestTask {
    /// What it does at a scheduling point: the operation's kind and the object's name.
    typealias Point = (_ operation: UInt32, _ object: UInt64) -> Void

    /// The defects of the museum that are switched on.
    var defects: [Defect] = []
    /// The patch that is taken back, besides those that the outer task takes back.
    var undone: SeriesPatch?
    var point: Point = { _, _ in }

    private struct Storage {
        /// First, so that the pointer to it is the pointer to the whole.
        var base: fl_task
        let point: Point
    }

    /// Returns what `body` returns and what it broke of the rules on locks.
    func run<R>(_ body: () throws -> R) rethrows -> (result: R, held: fl_held) {
        let outer = fl_current()
        var base = fl_task()
        base.defects = defects.reduce(0) { $0 | 1 << UInt64($1.rawValue) }
        base.undone = outer?.pointee.undone ?? (0, 0)
        switch undone?.rawValue {
        case let patch? where patch < 64: base.undone.0 |= 1 << UInt64(patch)
        case let patch?: base.undone.1 |= 1 << UInt64(patch - 64)
        case nil: break
        }
        base.note = { _, _, _ in }
        base.point = { task, operation, object in
            guard let task else { return }
            let point = UnsafeMutableRawPointer(task).assumingMemoryBound(to: Storage.self).pointee.point
            point(operation, object)
        }
        let storage = UnsafeMutablePointer<Storage>.allocate(capacity: 1)
        storage.initialize(to: Storage(base: base, point: point))
        fl_attach(UnsafeMutableRawPointer(storage).assumingMemoryBound(to: fl_task.self))
        defer {
            fl_attach(outer)
            storage.deinitialize(count: 1)
            storage.deallocate()
        }
        let result = try body()
        return (result, storage.pointee.base.held)
    }

    /// Runs what is another task's, with locks of its own, in the midst of the running one.
    static func elsewhere<R>(_ body: () throws -> R) rethrows -> R {
        let task = fl_current()
        fl_attach(nil)
        defer { fl_attach(task) }
        return try body()
    }
}

extension fl_held {
    /// No lock was taken out of order, and nothing slept that must not.
    var isSound: Bool { order_violations == 0 && sleep_violations == 0 }
}
