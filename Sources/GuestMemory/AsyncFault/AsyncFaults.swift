import Audit
import Frames
import HostMemory
import Synchrony

/// A fault on a page that must be read first: the vCPU need not wait for it. Spec: generic 6.1, 6.2.
extension VirtualCPU {
    /// Step 2 of the dance: whether the fault is taken care of, and the guest runs on (or the vCPU halts) meanwhile. The
    /// vCPU's own task, inside `withSlots`, no lock held. Kernel: a part of `__kvm_mmu_faultin_pfn`.
    ///
    /// False: the caller must wait for the page itself. So for a prefetch, where asynchronous faults are not allowed, on a
    /// read-only slot (the address is looked up for write) and with 64 of them underway.
    public final func postpone(_ fault: GuestFault, in slot: MemorySlot) -> Bool {
        guard allowsAsyncFaults, !fault.isPrefetch else { return false }
        tell(.asyncTried, fault.frame)
        if asyncFaults.contains(fault.frame) {
            tell(.asyncRepeated, fault.frame)
            // The guest was told, and came back all the same: it has nothing else to do.
            post(Request.asyncFaultHalt)
            return true
        }
        return queueAsyncFault(fault, in: slot)
    }

    /// Kernel: `kvm_setup_async_pf`.
    private final func queueAsyncFault(_ fault: GuestFault, in slot: MemorySlot) -> Bool {
        guard asyncFaults.count < AsyncFaultQueue.limit, !slot.isInvalid, !slot.flags.readOnly else { return false }
        var again = fault
        again.isPrefetch = true
        let work = AsyncFault(self, again, slot.userAddress(of: fault.frame))
        asyncFaults.append(work)
        tell(.asyncNotPresent, fault.frame)
        if !pageNotPresent(fault.frame) { post(Request.asyncFaultHalt) }
        vm.asyncFaults.add(work)
        return true
    }

    private final func tell(_ kind: Event.Kind, _ frame: GuestFrame) {
        vm.record(Event(kind, guest: frame.number, task: UInt8(truncatingIfNeeded: number)))
    }

    /// Completes what is done: each fault again, as a prefetch; the vCPU need not halt any more. The vCPU's own task, no
    /// lock held, outside of `withSlots`. Kernel: `kvm_check_async_pf_completion`.
    final func completeAsyncFaults() {
        while let next = asyncFaults.takeDone() {
            if case .page(let work) = next {
                vm.withSlots { vm.mmu.asyncFaultReady(self, work.fault) }
                tell(.asyncReady, work.fault.frame)
            }
            isHalted = false
        }
    }

    /// The vCPU halts: sleeps until an asynchronous fault is done or a signal comes. Nil, or EINTR for a signal. The
    /// vCPU's own task, no lock held. Kernel: `kvm_vcpu_halt`.
    ///
    /// Where no task serves the VM's asynchronous faults, this one does, as long as it would sleep.
    public final func sleepUntilReady() -> Errno? {
        let signals = vm.addressSpace.signals
        while !asyncFaults.hasDone {
            if signals.pending { return .EINTR }
            if vm.asyncFaults.isUnserved, vm.asyncFaults.runOne() { continue }
            signals.sleepers.wait {
                asyncFaults.hasDone || signals.pending
                    || (vm.asyncFaults.isUnserved && vm.asyncFaults.pendingCount > 0)
            }
        }
        return nil
    }

    /// Lets a vCPU that halts, or whose guest waits, go on without a page. The vCPU's own task. Kernel:
    /// `kvm_async_pf_wakeup_all`.
    public final func wakeAsyncFaults() { asyncFaults.wakeAll() }

    /// The vCPU ends. Nothing that was asked for is left, and no task touches it any more. Kernel: `kvm_vcpu_destroy`.
    final func end() {
        asyncFaults.drain()
        let ring = ring
        self.ring = nil
        ring?.free()
    }
}
