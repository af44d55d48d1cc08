import Foundation
import Synchronization

/// Work of several threads that begin it at once.
final class ParallelWork: @unchecked Sendable {
    // Unchecked: the work never changes; each thread writes its own time before it signals.
    private let work: [@Sendable () -> Int]
    private let waiting: Atomic<Int>
    private let total = Atomic<Int>(0)
    private let done = DispatchSemaphore(value: 0)
    private let times: UnsafeMutablePointer<(begin: ContinuousClock.Instant, end: ContinuousClock.Instant)>

    struct Result {
        /// Until the last is done.
        var nanoseconds: Double
        /// What all of them returned, added up.
        var count: Int
    }

    /// Each of `work` on a thread of its own.
    static func run(_ work: [@Sendable () -> Int]) -> Result {
        let all = ParallelWork(work)
        for number in work.indices { Thread.detachNewThread { all.run(number) } }
        return all.result
    }

    private init(_ work: [@Sendable () -> Int]) {
        self.work = work
        waiting = Atomic(work.count)
        times = .allocate(capacity: work.count)
    }

    deinit { times.deallocate() }

    private func run(_ number: Int) {
        let work = work[number]
        waiting.subtract(1, ordering: .sequentiallyConsistent)
        while waiting.load(ordering: .acquiring) > 0 {}
        let begin = ContinuousClock.now
        let count = work()
        times[number] = (begin, ContinuousClock.now)
        total.add(count, ordering: .relaxed)
        done.signal()
    }

    private var result: Result {
        for _ in work { done.wait() }
        var (begin, end) = times[0]
        for i in work.indices {
            begin = min(begin, times[i].begin)
            end = max(end, times[i].end)
        }
        let (seconds, attoseconds) = (end - begin).components
        return Result(
            nanoseconds: Double(seconds) * 1e9 + Double(attoseconds) / 1e9, count: total.load(ordering: .relaxed))
    }
}
