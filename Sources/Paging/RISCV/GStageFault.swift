import Audit
import Frames
import GuestMemory
import HostMemory

/// Guest-page faults. Kernel: `gstage_page_fault`, `kvm_riscv_gstage_map`. Spec: arches 2.2, generic 3.6.
extension GStageMMU {
    /// Serves one fault and counts it. RISC-V KVM has no such statistics; the model keeps them under x86's names, so
    /// that its tables have one form.
    func serve(_ cpu: VirtualCPU, _ fault: GuestFault) -> FaultOutcome {
        CPUStatistics.bump(cpu.statistics.pf_taken)
        let task = UInt8(truncatingIfNeeded: cpu.number)
        note(
            Event(
                .fault, guest: fault.frame.number, value: UInt64(fault.access.rawValue), extra: UInt64(cpu.number),
                task: task))
        let outcome = resolve(cpu, fault)
        switch outcome {
        case .fixed: CPUStatistics.bump(cpu.statistics.pf_fixed)
        case .spurious: CPUStatistics.bump(cpu.statistics.pf_spurious)
        case .emulate: CPUStatistics.bump(cpu.statistics.pf_emulate)
        case .retry, .writeProtected, .failed, .memoryFault: break
        }
        note(Event(.faultResolved, guest: fault.frame.number, value: outcome.code, task: task))
        return outcome
    }

    /// Slot first, then fault-in, then installation. An INVALID slot is like none here: its user address is an error
    /// value (generic section 7). Kernel: `gstage_page_fault`.
    private func resolve(_ cpu: VirtualCPU, _ fault: GuestFault) -> FaultOutcome {
        func answer(_ condition: FaultCondition) -> FaultOutcome {
            FaultFamily.riscv.answer(condition, fault.access).outcome
        }
        guard let slot = vm.slot(containing: fault.frame) else { return answer(.noSlot) }
        if slot.isInvalid { return answer(.invalidSlot) }
        if slot.flags.readOnly, fault.access == .write { return answer(.readOnlySlot) }
        guard root != nil, stock.fill(cpu, to: Int(mode.levels), from: vm.host) else { return answer(.noMemory) }
        let snapshot = vm.snapshot()
        switch vm.faultIn(fault.frame, slot: slot, write: fault.access == .write, snapshot: snapshot) {
        case .frame(let faulted): return install(faulted, cpu, fault.access)
        case .failed(let error, _): return answer(.translation(error))
        }
    }

    /// Takes mmu_lock, checks, maps, releases the page, in that order and all before the lock is dropped (RV-5).
    private func install(_ faulted: consuming FaultedFrame, _ cpu: VirtualCPU, _ access: AccessKind) -> FaultOutcome {
        let slot = faulted.slot
        let logging = slot.isLogged && !slot.flags.readOnly
        // While a slot is logged, only a write makes a leaf writable, and that is when it is logged.
        let request = MapRequest(
            slot: slot, access: access, writable: faulted.isWritable && (!logging || access == .write),
            largest: logging || !usesHostHugePages ? .page4K : Self.largestLeaf, cpu: cpu)
        let guardian = vm.lockMMUForFault()
        let (outcome, use) = check(faulted, request, holding: guardian)
        faulted.finish(use, holding: guardian)
        guardian.unlock()
        return outcome
    }

    /// The retry check and, if it passes, the mapping.
    private func check(
        _ faulted: borrowing FaultedFrame, _ request: MapRequest, holding guardian: borrowing MMUGuard
    ) -> (FaultOutcome, FaultUse) {
        guard let permit = guardian.check(faulted, largest: request.largest) else {
            return (.retry, quirks.retryMarksUsed ? .used(dirty: request.writable) : .unused)
        }
        return map(permit, request)
    }
}
