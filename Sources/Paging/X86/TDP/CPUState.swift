import Frames
import GuestMemory
import HostMemory

/// What the MMU keeps for a vCPU. Kernel: parts of `vcpu->arch`. The vCPU's own task's.
public final class TDPCPUState: CPUExtra, @unchecked Sendable {
    // Unchecked: restates the base class's; the vCPU's own task's alone.
    /// A nested guest runs. Kernel: `is_guest_mode`.
    var isGuestMode = false
    /// What the processor knows of the page of the VM's APIC.
    var apicAccess = APICAccessField()
    /// It runs on second-stage tables that its guest hypervisor made. Kernel: `mmu` is `guest_mmu`.
    var usesNestedTables = false
    /// What shadows those; it stays while the guest hypervisor runs. Kernel: `guest_mmu`.
    let shadow: ShadowCPU?
    private let host: Host
    /// Kernel: `pml_pg`.
    let modificationLogPage: HostFrame?
    var lastMMIO = RememberedMMIO()

    init(_ host: Host, logs: Bool, nested: Bool) {
        self.host = host
        shadow = nested ? ShadowCPU() : nil
        modificationLogPage = logs ? host.allocateTable(order: 0, fill: 0) : nil
        precondition(!logs || modificationLogPage != nil, "no memory for a vCPU")
    }

    deinit {
        if let page = modificationLogPage { host.freeTable(page) }
    }
}

extension TDPMMU {
    func state(of cpu: VirtualCPU) -> TDPCPUState {
        guard let extra = cpu.extra else { preconditionFailure("a vCPU of this VM has its state") }
        // Made by `makeExtra` and nowhere else.
        return unsafeDowncast(extra, to: TDPCPUState.self)
    }

    /// The vCPU begins or ends running a nested guest. Its tables are others from now on, so that the leaves of the two
    /// never mix (Spec: x86 1.6, 4.10). Caller: the vCPU's task, outside of guest mode, no lock held.
    ///
    /// KVM keeps up to three former roots at hand; here the reference is dropped, and the tree, which the MMU itself
    /// still holds, is found again by its role.
    public func setGuestMode(_ isGuestMode: Bool, of cpu: VirtualCPU) {
        let state = state(of: cpu)
        guard state.isGuestMode != isGuestMode else { return }
        state.isGuestMode = isGuestMode
        dropObsoleteRoot(cpu)
        if !isGuestMode { reloadPostponedAPICPage(for: cpu) }
    }
}
