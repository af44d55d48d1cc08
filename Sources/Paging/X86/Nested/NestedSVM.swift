import Frames
import GuestMemory
import HostMemory

/// What an SVM instruction of the guest hypervisor's comes to.
public enum SVMOutcome: Sendable, Equatable {
    case done
    /// #GP: its operand is no memory.
    case generalProtection
    /// The instruction is skipped, and the run goes on. Kernel: any other error of the map.
    case skipped
    /// A system management interrupt could not be entered. Kernel: `kvm_vm_dead`.
    case dead
    /// A return from system management mode could not. Kernel: a triple fault.
    case shutdown
}

/// The pages that KVM maps for SVM's nested guests: for the moment of an instruction, all but one. Spec: x86 6.2.
///
/// The vCPU's own task's; methods inside `withSlots`. Every map is writable, also that of VMLOAD, which only reads.
public final class NestedSVM {
    private unowned(unsafe) let cpu: VirtualCPU
    /// The communication block of an SEV-ES guest: mapped from its VMGEXIT to the next entry, across exits to userspace.
    private var communication = MappedPage()

    public init(_ cpu: VirtualCPU) { self.cpu = cpu }

    /// VMRUN, and the exit of the nested guest: vmcb12 is read, or written. Kernel: `nested_svm_vmrun`,
    /// `nested_svm_vmexit`.
    public func withControlBlock(_ address: GuestAddress, _ body: (UnsafeMutableRawPointer) -> Void) -> SVMOutcome {
        withPage(address, body)
    }

    /// VMLOAD and VMSAVE. Kernel: `vmload_vmsave_interception`.
    public func withOperand(_ address: GuestAddress, _ body: (UnsafeMutableRawPointer) -> Void) -> SVMOutcome {
        withPage(address, body)
    }

    private func withPage(_ address: GuestAddress, _ body: (UnsafeMutableRawPointer) -> Void) -> SVMOutcome {
        do throws(Errno) {
            let map = try cpu.vm.map(address.frame)
            body(map.bytes)
            map.unmap(by: cpu)
            return .done
        } catch { return error == .EINVAL ? .generalProtection : .skipped }
    }

    /// An SMI arrives while a nested guest runs: the guest hypervisor's state goes to its save area. Kernel:
    /// `svm_enter_smm`.
    public func enterManagementMode(
        saveArea: GuestAddress, _ body: (UnsafeMutableRawPointer) -> Void
    ) -> SVMOutcome { withPage(saveArea, body) == .done ? .done : .dead }

    /// RSM to a nested guest: vmcb12 and the save area are mapped at the same time. Kernel: `svm_leave_smm`.
    public func leaveManagementMode(
        controlBlock: GuestAddress, saveArea: GuestAddress,
        _ body: (UnsafeMutableRawPointer, UnsafeMutableRawPointer) -> Void
    ) -> SVMOutcome {
        var block = MappedPage()
        var area = MappedPage()
        guard block.map(controlBlock, by: cpu) else { return .shutdown }
        let isMapped = area.map(saveArea, by: cpu)
        if isMapped, let first = block.bytes, let second = area.bytes { body(first, second) }
        area.unmap(by: cpu)
        block.unmap(by: cpu)
        return isMapped ? .done : .shutdown
    }

    /// VMGEXIT: false, and the guest goes on, if its block can't be mapped. Kernel: `sev_handle_vmgexit`.
    public func mapCommunication(_ address: GuestAddress) -> Bool { communication.map(address, by: cpu) }
    public var communicationFrame: HostFrame? { communication.frame }
    /// Before the next entry. Kernel: `sev_es_unmap_ghcb`.
    public func unmapCommunication() { communication.unmap(by: cpu) }
}
