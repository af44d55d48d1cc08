import Frames
import HostMemory
import Synchronization
import Synchrony

/// The asynchronous faults of one vCPU. Kernel: `vcpu->async_pf`. Spec: generic 6.2.
public final class AsyncFaultQueue: @unchecked Sendable {
    // Unchecked: `queued` belongs to the vCPU's task, `done` is under the lock.
    /// Kernel: `ASYNC_PF_PER_VCPU`.
    public static let limit = 64

    /// Not yet completed by the vCPU. Kernel: `async_pf.queue`; with the dummies, `async_pf.queued`.
    private var queued: [AsyncFault] = []
    private var dummies = 0
    private let lock = SpinLock(.asyncFault)
    private var done: [CompletedFault] = []
    /// `done.count`, for a look without the lock. Kernel: `list_empty_careful`.
    private let doneCount = Atomic<Int>(0)
    private let identity = ObjectIdentity()
    private unowned(unsafe) let cpu: VirtualCPU

    /// Unsafe: the queue is the vCPU's own, and ends with it.
    init(_ cpu: VirtualCPU) { self.cpu = cpu }

    // MARK: The vCPU's own task

    /// Faults that the vCPU has queued and not completed.
    public var count: Int { queued.count + dummies }

    /// Whether the page of `frame` is being fetched already. Kernel: `kvm_find_async_pf_gfn`.
    func contains(_ frame: GuestFrame) -> Bool { queued.contains { $0.fault.frame == frame } }

    func append(_ fault: AsyncFault) { queued.append(fault) }

    /// Whether something is done that the vCPU has not completed.
    var hasDone: Bool {
        schedulingNote(.atomicLoad, identity.value)
        return doneCount.load(ordering: .acquiring) > 0
    }

    /// The next that is done, taken off both lists and finished, so that it may go.
    func takeDone() -> CompletedFault? {
        lock.lock()
        guard !done.isEmpty else {
            lock.unlock()
            return nil
        }
        let next = done.removeFirst()
        doneCount.store(done.count, ordering: .releasing)
        lock.unlock()
        switch next {
        case .wakeUp: dummies -= 1
        case .page(let fault):
            queued.removeAll { $0 === fault }
            fault.waitUntilFinished()
        }
        return next
    }

    /// Wakes the vCPU although nothing is done, if nothing is done: a dummy that never was work. ENOMEM is not possible
    /// here. The vCPU's own task. Kernel: `kvm_async_pf_wakeup_all`.
    func wakeAll() {
        guard !hasDone else { return }
        dummies += 1
        complete(.wakeUp)
    }

    /// The vCPU ends: every fault is cancelled, or waited for. May sleep. Kernel: `kvm_clear_async_pf_completion_queue`.
    func drain() {
        for fault in queued { cpu.vm.asyncFaults.cancel(fault) }
        queued = []
        dummies = 0
        lock.lock()
        done = []
        doneCount.store(0, ordering: .releasing)
        lock.unlock()
    }

    // MARK: Any task

    /// Puts a fault on the list of those that are done and tells the vCPU.
    func complete(_ fault: CompletedFault) {
        lock.lock()
        let isFirst = done.isEmpty
        done.append(fault)
        schedulingNote(.atomicUpdate, identity.value)
        doneCount.store(done.count, ordering: .releasing)
        lock.unlock()
        if isFirst { cpu.post(VirtualCPU.Request.asyncFaultReady) }
        cpu.vm.addressSpace.signals.sleepers.wake()
    }
}
