import Audit
import Frames
import GuestMemory
import HostMemory
import Synchrony

/// Faults on private memory: the same way as others but for where the frame comes from. Spec: x86 2.7 steps 2, 3 and 7,
/// generic 3.6 F2 and F5.
extension TDPMMU {
    /// Whether the fault wants what its frame's attribute says. Asked after the snapshot it is good until the retry check.
    func agrees(_ fault: GuestFault, _ isPrivate: Bool, _ vm: VirtualMachine) -> Bool {
        isPrivate == vm.isPrivate(fault.frame)
    }

    /// The run fails with `errno` and tells userspace where. No page is owned. Kernel:
    /// `kvm_mmu_prepare_memory_fault_exit`.
    @inline(never)
    func memoryFault(_ cpu: VirtualCPU, _ fault: GuestFault, _ isPrivate: Bool, _ errno: Errno) -> FaultOutcome {
        cpu.memoryFault = MemoryFaultExit(fault.frame, isPrivate: isPrivate)
        return FaultFamily.x86.answer(.privateMemory(errno), fault.access).outcome
    }

    /// Kernel: `kvm_mmu_faultin_pfn_private`, and the rest of the fault.
    @inline(never)
    func servePrivate(
        _ cpu: VirtualCPU, _ root: HostFrame, _ fault: inout GuestFault, _ borrowed: Unmanaged<MemorySlot>,
        _ snapshot: consuming InvalidationSnapshot, _ reserve: inout TableReserve
    ) -> FaultOutcome {
        let slot = borrowed.takeUnretainedValue()
        guard slot.flags.guestMemory else { return memoryFault(cpu, fault, true, .EFAULT) }
        switch vm.faultInPrivate(fault.frame, slot: slot, snapshot: snapshot) {
        case .failed(let errno, _): return memoryFault(cpu, fault, true, errno)
        case .frame(let faulted): return resolve(cpu, root, &fault, faulted, borrowed, &reserve, vm)
        }
    }
}
