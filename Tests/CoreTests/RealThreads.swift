import Foundation
import Synchronization
import Synchrony
import Testing

/// Runs each body on a thread of its own until all are done; fails with the first error, and where a body took locks out of
/// order or slept under a spinning one. Not as tasks of Swift's pool: bodies wait for each other, and the pool has only as
/// many threads as there are processors, so that two tests which wait side by side could wait for ever.
func onThreads(_ bodies: [@Sendable () throws -> Void]) async throws {
    let outcome = Outcome(bodies.count)
    await withCheckedContinuation { (all: CheckedContinuation<Void, Never>) in
        for body in bodies {
            Thread.detachNewThread {
                LockViolations.clear()
                let result = Result { try body() }
                let seen = LockViolations.ofCurrentTask()
                if outcome.note(result, isOrderly: seen.order == 0 && seen.sleeping == 0) { all.resume() }
            }
        }
    }
    #expect(outcome.isOrderly, "locks out of order, or a sleep under a spinning lock")
    try outcome.rethrow()
}

private final class Outcome: Sendable {
    private let state: Mutex<(left: Int, isOrderly: Bool, error: (any Error)?)>

    init(_ count: Int) { state = Mutex((count, true, nil)) }

    /// Whether it was the last.
    func note(_ result: Result<Void, any Error>, isOrderly: Bool) -> Bool {
        state.withLock { state in
            state.left -= 1
            state.isOrderly = state.isOrderly && isOrderly
            if case .failure(let error) = result, state.error == nil { state.error = error }
            return state.left == 0
        }
    }

    var isOrderly: Bool { state.withLock { $0.isOrderly } }

    func rethrow() throws {
        if let error = state.withLock({ $0.error }) { throw error }
    }
}
