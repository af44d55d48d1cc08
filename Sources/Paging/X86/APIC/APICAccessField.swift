import Audit
import Frames
import GuestMemory
import HostMemory
import Synchrony

/// What a vCPU's own VMCS says of the page, which the processor uses while no nested guest runs. The vCPU's own task's.
struct APICAccessField {
    /// Kernel: the control `SECONDARY_EXEC_VIRTUALIZE_APIC_ACCESSES`.
    var isUsed = false
    /// Kernel: `APIC_ACCESS_ADDR`.
    var frame: HostFrame?
    /// To be loaded when the nested guest is left. Kernel: `reload_vmcs01_apic_access_page`.
    var isPostponed = false
    /// The last look found no page. What stands in the field is of no use to anybody: no table maps it.
    var isLost = false
}

extension TDPMMU {
    /// The guest puts its APIC into the mode in which it is memory (xAPIC), or out of it. Caller: the vCPU's task, outside
    /// of guest mode. Kernel: `vmx_set_virtual_apic_mode`.
    public func useAPICAccessPage(_ isUsed: Bool, by cpu: VirtualCPU) {
        state(of: cpu).apicAccess.isUsed = isUsed
        if isUsed { cpu.post(VirtualCPU.Request.reloadAPICPage) }
    }

    /// What the processor takes for the page; nil: it takes none. The vCPU's own task's.
    public func apicAccessFrame(of cpu: VirtualCPU) -> HostFrame? {
        let field = state(of: cpu).apicAccess
        return field.isUsed ? field.frame : nil
    }

    /// The nested guest is left: what came meanwhile is done now. Kernel: a part of `nested_vmx_vmexit`.
    func reloadPostponedAPICPage(for cpu: VirtualCPU) {
        let state = state(of: cpu)
        guard state.apicAccess.isPostponed else { return }
        state.apicAccess.isPostponed = false
        cpu.post(VirtualCPU.Request.reloadAPICPage)
    }

    /// Tells the processor where the page is. Caller: the vCPU's task, outside of guest mode, no lock held; may sleep.
    /// Kernel: `vmx_set_apic_access_page_addr`. Spec: x86 6.4, X17.
    ///
    /// The page may be taken away at any time: between the look and the write, a notifier posts the request anew or has
    /// made the look stale, in which case it is posted here. What the notifier has not seen by the time it gets mmu_lock,
    /// which is held here until the page is released, it posts for. No TLB is flushed: the page's leaf was zapped.
    func loadAPICPage(for cpu: VirtualCPU) {
        let state = state(of: cpu)
        guard !state.isGuestMode else {
            state.apicAccess.isPostponed = true
            return
        }
        guard vm.withSlots({ loadAPICPage(state) }) == .stale else { return }
        cpu.post(VirtualCPU.Request.reloadAPICPage)
        // The vCPU would come here again and again as long as the invalidation runs.
        isExplorerAttached ? vm.waitForInvalidations() : yieldProcessor()
    }

    private enum Load { case done, stale }

    private func loadAPICPage(_ state: TDPCPUState) -> Load {
        guard state.apicAccess.isUsed, let slot = vm.slot(numbered: UInt32(APICAccessPage.slot)), !slot.isInvalid else {
            return .done
        }
        switch vm.faultIn(APICAccessPage.frame, slot: slot, write: true, snapshot: vm.snapshot()) {
        case .failed:
            state.apicAccess.isLost = true
            return .done
        case .frame(let faulted):
            let guardian = vm.lockMMUForRead()
            let load = write(faulted, to: state, holding: guardian)
            faulted.finishLoad(holding: guardian)
            guardian.unlock()
            return load
        }
    }

    private func write(
        _ faulted: borrowing FaultedFrame, to state: TDPCPUState, holding guardian: borrowing MMUGuard
    ) -> Load {
        guard let permit = guardian.check(faulted) else { return .stale }
        schedulingNote(.pageUse, permit.frame.physicalAddress)
        state.apicAccess.frame = permit.frame
        state.apicAccess.isLost = false
        return .done
    }
}

extension TableCheck {
    /// X17: the processor of each vCPU knows the page that the process has, or looks before it runs.
    mutating func apicAccess() {
        let vm = mmu.vm
        guard let slot = vm.slot(numbered: UInt32(APICAccessPage.slot)), !slot.isInvalid else { return }
        let now = vm.addressSpace.translate(slot.userAddress)?.frame
        for cpu in vm.virtualCPUs {
            let state = mmu.state(of: cpu)
            let field = state.apicAccess
            let isPending =
                cpu.hasRequest(VirtualCPU.Request.reloadAPICPage) || (state.isGuestMode && field.isPostponed)
            guard field.isUsed, !isPending, field.frame != now, !(field.isLost && now == nil) else { continue }
            findings.append(
                Finding(
                    .x17, "the processor takes another page for the APIC's", frame: field.frame,
                    guest: APICAccessPage.frame))
        }
    }
}
