import Synchronization
import Synchrony

/// Answers that a driver gives to the next faults whatever its own code would say: a driver that fails, for scenarios
/// and tests.
public final class ForcedAnswers: Sendable {
    /// How often in the low half, the answer's number above it: one word, so that tasks that fault side by side take
    /// each answer once.
    private let state = Atomic<UInt64>(0)
    private let identity = ObjectIdentity()
    private static let numbered: [DriverFault] = [
        .inserted, .handled, .busError, .outOfMemory, .poisoned, .retry,
    ]

    init() {}

    /// The next `count` faults, and requests to make an entry writable, end with `answer`; 0: the driver works again.
    /// `.inserted` inserts nothing. Replaces what was asked for before.
    public func set(_ answer: DriverFault, count: UInt32) {
        let number = Self.numbered.firstIndex(of: answer) ?? 0
        schedulingPoint(.atomicUpdate, identity.value)
        state.store(UInt64(number) << 32 | UInt64(count), ordering: .releasing)
    }

    /// Nil: the driver's own code answers. Where nothing is forced, as nearly always, this is no scheduling point.
    func next() -> DriverFault? {
        var seen = state.load(ordering: .acquiring)
        while seen & 0xffff_ffff != 0 {
            schedulingPoint(.atomicUpdate, identity.value)
            let (done, now) = state.compareExchange(expected: seen, desired: seen - 1, ordering: .acquiringAndReleasing)
            if done { return Self.numbered[Int(seen >> 32)] }
            seen = now
        }
        return nil
    }
}
