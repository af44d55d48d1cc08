import Frames
import GuestMemory
import HostMemory

/// A vCPU that enters and leaves a nested guest. The vCPU is a model: what touches memory is here, no instruction set.
/// All: the vCPU's task, outside of guest mode, no lock held. Spec: x86 4.10.
extension TDPMMU {
    /// What the MMU keeps for the nested guests of a vCPU. Caller: the MMU was made for such.
    public func shadowState(of cpu: VirtualCPU) -> ShadowCPU {
        guard let shadow = state(of: cpu).shadow else {
            preconditionFailure("an MMU that is made without nested guests")
        }
        return shadow
    }

    /// VMLAUNCH or VMRESUME with EPT. EINVAL: the pointer is none, or needs five levels where the processor has four; the
    /// entry fails. Kernel: `nested_ept_init_mmu_context`.
    public func enterNested(_ tables: EPTTables, _ cpu: VirtualCPU) throws(Errno) {
        guard bits.isEPT, tables.isValid, tables.levels <= configuration.levels else { throw .EINVAL }
        let shadows = try startNested(cpu)
        shadows.load(tables, on: cpu)
    }

    /// VMRUN with nested paging. `registers` are the guest hypervisor's own, which say how its tables are read, of 32 bits,
    /// PAE or four or five levels, with nCR3 for CR3. EINVAL: it has no paging, or more levels than the host.
    /// Kernel: `nested_svm_init_mmu_context`.
    public func enterNested(_ registers: GuestRegisters, _ cpu: VirtualCPU) throws(Errno) {
        guard !bits.isEPT, registers.isPaged, registers.levels <= configuration.levels else {
            throw .EINVAL
        }
        let shadows = try startNested(cpu)
        shadows.loadNPT(registers, levels: configuration.levels, on: cpu)
    }

    private func startNested(_ cpu: VirtualCPU) throws(Errno) -> ShadowMMU {
        guard let nested else { throw .EINVAL }
        let state = state(of: cpu)
        guard !state.usesNestedTables else { return nested }
        // The tree of the guest hypervisor stays the MMU's; the vCPU takes it again when it is back.
        leaveRoot(cpu)
        state.isGuestMode = true
        state.usesNestedTables = true
        return nested
    }

    /// The exit to the guest hypervisor. What shadows its tables stays. Kernel: `nested_ept_uninit_mmu_context`.
    public func leaveNested(_ cpu: VirtualCPU) {
        let state = state(of: cpu)
        guard state.usesNestedTables else { return setGuestMode(false, of: cpu) }
        state.usesNestedTables = false
        state.isGuestMode = false
        cpu.root = nil
        cpu.dropTranslations()
        reloadPostponedAPICPage(for: cpu)
    }

    /// INVEPT, of one pointer or of all. Kernel: `handle_invept`.
    public func invalidateEPT(_ pointer: UInt64?, _ cpu: VirtualCPU) {
        nested?.forget(pointer: pointer, cpu)
        cpu.dropTranslations()
    }

    /// The guest hypervisor, or the emulator in its place, has written guest memory: tables that are shadowed follow.
    /// No lock held, inside `withSlots`. Kernel: `kvm_page_track_write`.
    public func guestMemoryWritten(_ cpu: VirtualCPU, _ address: GuestAddress, count: Int) {
        guard let nested, nested.knowsSlots else { return }
        nested.guestMemoryWritten(cpu, address, count: count)
    }

    /// A write of the processor's own to the guest's tables, to set A or D, was refused because they are second-stage tables
    /// for another guest as well: those are given up, and the processor tries again. Emulation would not help.
    /// Kernel: `kvm_mmu_write_protect_fault`. Spec: x86 2.9, 4.10.
    @inline(never)
    func unprotecting(_ outcome: FaultOutcome, _ fault: GuestFault) -> FaultOutcome {
        guard case .writeProtected = outcome, fault.isOnGuestTables, fault.entryPresent, let nested,
            nested.knowsSlots, nested.unprotect(fault.frame)
        else { return outcome }
        return .retry
    }

    /// Whether a vCPU runs a nested guest on tables that its guest hypervisor made.
    public func runsNested(_ cpu: VirtualCPU) -> Bool { state(of: cpu).usesNestedTables }

    /// The role of the tables in use, of a nested guest's.
    func nestedRole(of cpu: VirtualCPU) -> PageRole? {
        guard configuration.nested, let nested, nested.isInUse(by: cpu) else { return nil }
        return nested.state(of: cpu).role
    }

    /// Whether the guest may write `frame` through these tables: it may hold tables that are shadowed. Those of the lowest
    /// level are out of sync from now on. Caller: mmu_lock, for reading at least. Kernel: `mmu_try_to_unsync_pages`.
    @inline(never)
    func letGuestWrite(_ frame: GuestFrame, _ borrowed: Unmanaged<MemorySlot>, prefetch: Bool) -> Bool {
        guard tracksFrames else { return true }
        if isTracked(frame, in: borrowed) { return false }
        let slot = borrowed.takeUnretainedValue()
        guard configuration.nested, let nested, nested.knowsSlots else { return true }
        return nested.letGuestWrite(frame, slot, synchronizing: false, prefetch: prefetch)
    }
}
