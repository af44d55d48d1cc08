import CSchedule
import Synchrony
import Testing

/// Runs an action in the middle of an operation: at its n-th scheduling point at which the running task holds no lock
/// and is in no section that forbids sleeping. What an interleaving of two threads would do, on one thread and with
/// the place chosen.
final class Interposer {
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
        let run = try TestTask { [self] _, _ in pass() }.run(body)
        #expect(run.held.isSound)
        return run.result
    }

    private func pass() {
        let held = fl_held_current().pointee
        guard !hasFired, held.ranks & ~ignored == 0, held.atomic_depth == 0, mayFire() else { return }
        defer { seen += 1 }
        guard seen == target else { return }
        hasFired = true
        TestTask.elsewhere(action)
    }
}
