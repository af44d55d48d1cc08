import Synchronization

/// A place where a task sleeps until another wakes it. Kernel: `struct rcuwait`.
///
/// The sleeper announces itself *before* it looks at its condition; whoever makes the condition true looks for sleepers
/// *after* that. In any other order the wake-up can fall between look and sleep, and is lost.
public final class SleepQueue: Sendable {
    let sleepers = Atomic<UInt32>(0)
    /// Wake-ups given so far.
    let wakes = Atomic<UInt64>(0)
    let identity = ObjectIdentity()
    public init() {}

    /// Sleeps until `condition` holds. No spinning lock held. Kernel: `rcuwait_wait_event`.
    public func wait(until condition: () -> Bool) {
        mightSleep()
        while true {
            schedulingPoint(.atomicUpdate, identity.value)
            sleepers.add(1, ordering: .sequentiallyConsistent)
            let seen = wakes.load(ordering: .sequentiallyConsistent)
            let done = condition()
            if !done { sleep(seen) }
            schedulingNote(.atomicUpdate, identity.value)
            sleepers.subtract(1, ordering: .sequentiallyConsistent)
            if done { return }
        }
    }

    private func sleep(_ seen: UInt64) {
        schedulingPoint(.conditionRead, identity.value)
        var backoff = Backoff()
        while wakes.load(ordering: .sequentiallyConsistent) == seen { backoff.wait(identity.value, .sleep) }
    }

    /// Wakes whoever sleeps. Any lock may be held. Kernel: `rcuwait_wake_up`.
    public func wake() {
        schedulingPoint(.atomicUpdate, identity.value)
        guard sleepers.load(ordering: .sequentiallyConsistent) > 0 else { return }
        wakes.add(1, ordering: .sequentiallyConsistent)
    }
}
