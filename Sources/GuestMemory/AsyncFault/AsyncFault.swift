import Audit
import Frames
import HostMemory
import Synchronization
import Synchrony

/// A page that is fetched while its vCPU does something else. Kernel: `struct kvm_async_pf`. Spec: generic 6.2.
///
///     the vCPU: queue → (not present: the guest is told, or the vCPU halts) → page ready: fault again as a prefetch
///     a worker: pending → running (fault in, without a reference) → on the vCPU's list `done`, vCPU woken → finished
///
/// States: 1 pending, in `AsyncFaultWork`; 2 running; 3 finished: its worker touches neither it nor the vCPU any more.
/// Only a worker goes from 1 to 2 and 3; cancelling goes from 1 to 3. Nobody lets go of it before it is finished.
final class AsyncFault: @unchecked Sendable {
    // Unchecked: immutable but for the state.
    let cpu: VirtualCPU
    /// What to do again when the page is there, as a prefetch.
    let fault: GuestFault
    let address: UserAddress
    private let state = Atomic<UInt8>(1)
    private let identity = ObjectIdentity()

    init(_ cpu: VirtualCPU, _ fault: GuestFault, _ address: UserAddress) {
        self.cpu = cpu
        self.fault = fault
        self.address = address
    }

    var isFinished: Bool { state.load(ordering: .acquiring) == 3 }
    func begin() { state.store(2, ordering: .relaxed) }
    func finish() {
        schedulingPoint(.atomicStore, identity.value)
        state.store(3, ordering: .releasing)
    }

    /// Waits until no worker touches it any more. May sleep. Kernel: `flush_work`.
    func waitUntilFinished() {
        mightSleep()
        spinUntil(identity.value) { isFinished }
    }
}

/// The work of all vCPUs of a VM. Any number of tasks may serve it. Kernel: the system's work queue.
public final class AsyncFaultWork: @unchecked Sendable {
    // Unchecked: `pending` changes under the lock.
    private let lock = SpinLock(.asyncFault)
    private var pending: [AsyncFault] = []
    private let servers = Atomic<Int>(0)
    private let waiting = SleepQueue()
    private let count = Atomic<Int>(0)

    init() {}

    /// Whether no task has said that it serves the work: a vCPU that halts then does it itself.
    var isUnserved: Bool { servers.load(ordering: .sequentiallyConsistent) == 0 }
    /// Pages not yet being fetched.
    public var pendingCount: Int { count.load(ordering: .sequentiallyConsistent) }

    /// Kernel: `schedule_work`.
    func add(_ fault: AsyncFault) {
        lock.lock()
        pending.append(fault)
        count.store(pending.count, ordering: .sequentiallyConsistent)
        lock.unlock()
        waiting.wake()
    }

    /// Takes the work back, or waits for the worker that has it: afterwards nobody touches it. Kernel: `cancel_work_sync`.
    func cancel(_ fault: AsyncFault) {
        lock.lock()
        var isPending = false
        for i in pending.indices where pending[i] === fault {
            pending.remove(at: i)
            isPending = true
            break
        }
        count.store(pending.count, ordering: .sequentiallyConsistent)
        lock.unlock()
        if isPending { fault.finish() } else { fault.waitUntilFinished() }
    }

    /// Fetches one page, if any is asked for; whether it was. Any task, no lock held; may sleep.
    public func runOne() -> Bool {
        lock.lock()
        guard !pending.isEmpty else {
            lock.unlock()
            return false
        }
        let fault = pending.removeFirst()
        count.store(pending.count, ordering: .sequentiallyConsistent)
        fault.begin()
        lock.unlock()
        fetch(fault)
        return true
    }

    /// Serves the work until `stop` holds and nothing is pending. Whoever makes `stop` true calls `wake` afterwards.
    public func serve(until stop: () -> Bool) {
        while true {
            servers.add(1, ordering: .sequentiallyConsistent)
            while true {
                if runOne() { continue }
                if stop() { break }
                waiting.wait { pendingCount > 0 || stop() }
            }
            servers.subtract(1, ordering: .sequentiallyConsistent)
            // A vCPU that has just added work saw a server, or is seen here: one of the two does it.
            if pendingCount == 0 { return }
        }
    }

    /// Lets the tasks that serve look whether they shall stop.
    public func wake() { waiting.wake() }

    /// Kernel: `async_pf_execute`. Spec: generic 6.2: the vCPU is told whether or not the page came.
    private func fetch(_ fault: AsyncFault) {
        let cpu = fault.cpu
        cpu.vm.addressSpace.faultInRemotely(fault.address)
        cpu.vm.record(
            Event(
                .asyncCompleted, guest: fault.fault.frame.number, value: fault.address.value,
                task: UInt8(truncatingIfNeeded: cpu.number)))
        cpu.asyncFaults.complete(.page(fault))
        fault.finish()
    }
}

/// What a vCPU finds on its list of completed faults.
enum CompletedFault {
    case page(AsyncFault)
    /// It is only woken.
    case wakeUp
}
