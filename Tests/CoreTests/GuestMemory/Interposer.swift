import CSchedule
import Synchrony
import Testing

/// Runs an action in the middle of an operation: at its n-th scheduling point at which the running task holds no lock
/// and is in no section that forbids sleeping. What an interleaving of two threads would do, on one thread and with
/// the place chosen.
final class Interposer {
    private struct Task {
        /// First, so that the pointer to it is the pointer to the whole.
        var base: fl_task
        var owner: Unmanaged<Interposer>
    }

    private let target: Int
    private let action: () -> Void
    /// Points at which it is false are not counted.
    var mayFire: () -> Bool = { true }
    private var seen = 0
    private var ignored: UInt64 = 0
    private(set) var hasFired = false

    init(_ target: Int, _ action: @escaping () -> Void) {
        self.target = target
        self.action = action
    }

    /// Counts points at which a lock of `rank` is held, too, if no other is. The action may not take it. More than one rank
    /// may be named.
    func ignoring(_ rank: LockRank) { ignored |= 1 << UInt64(rank.rawValue) }

    func run<R>(_ body: () throws -> R) rethrows -> R {
        let task = UnsafeMutablePointer<Task>.allocate(capacity: 1)
        var base = fl_task()
        base.point = { task, _, _ in
            guard let task else { return }
            let whole = UnsafeMutableRawPointer(task).assumingMemoryBound(to: Task.self)
            whole.pointee.owner.takeUnretainedValue().pass(task)
        }
        base.note = { _, _, _ in }
        task.initialize(to: Task(base: base, owner: Unmanaged.passUnretained(self)))
        let raw = UnsafeMutableRawPointer(task).assumingMemoryBound(to: fl_task.self)
        let outer = fl_current()
        raw.pointee.undone = outer?.pointee.undone ?? (0, 0)
        fl_attach(raw)
        defer {
            fl_attach(outer)
            #expect(raw.pointee.held.order_violations == 0 && raw.pointee.held.sleep_violations == 0)
            task.deinitialize(count: 1)
            task.deallocate()
        }
        return try body()
    }

    private func pass(_ task: UnsafeMutablePointer<fl_task>) {
        guard !hasFired, task.pointee.held.ranks & ~ignored == 0, task.pointee.held.atomic_depth == 0, mayFire() else {
            return
        }
        defer { seen += 1 }
        guard seen == target else { return }
        hasFired = true
        // The action is another task's: it has its own locks.
        fl_attach(nil)
        action()
        fl_attach(task)
    }
}
