import Audit
import Frames
import GuestMemory
import HostMemory
import Synchrony

/// Accesses to what no slot contains. Spec: x86 1.5, 2.7 (noslot), 2.8.
///
/// The race that the generation closes: a fault finds no slot, a slot is made, the fault installs "no memory here". The
/// update waits for the fault, which is inside `withSlots`, and only then raises the generation; so whatever the fault
/// has installed is older than the new slot.
extension TDPMMU {
    /// Whether there can be an MMIO entry for `frame`. Kernel: `enable_mmio_caching`, `kvm_mmu_max_gfn`.
    func cachesMMIO(_ frame: GuestFrame) -> Bool {
        // A legacy entry needs an address bit that no processor of this width accepts.
        configuration.cachesMMIO && (bits.isEPT || configuration.physicalAddressBits < 52)
            && frame.number < configuration.endOfGuestFrames && frame < GuestFrame(1 << UInt64(guestAddressBits - 12))
    }

    private func generation(for cpu: VirtualCPU) -> UInt64 { vm.slotsGeneration(of: cpu.addressSpaceNumber) }

    /// Whether the entry may be believed. Kernel: `check_mmio_spte`. Spec: X27.
    private func isFresh(_ entry: UInt64, _ frame: GuestFrame, for cpu: VirtualCPU) -> Bool {
        let now = generation(for: cpu)
        record(Event(.mmioChecked, guest: frame.number, value: entry, extra: now))
        let isSame = EntryBits.generation(ofMMIO: entry) == now & EntryBits.generationMask
        return now >> 63 == 0 && (isSame || Defect.generationIgnored.isOn)
    }

    // MARK: A fault with a reserved bit

    /// The access met an entry that hardware does not accept. Nil: the entry is out of date, and the fault is handled like
    /// any other. EINVAL: KVM's own tables are broken. Caller as for `handleFault`. Kernel: `handle_mmio_page_fault`.
    /// Spec: x86 2.8.
    @inline(never)
    func handleMMIO(_ cpu: VirtualCPU, _ fault: GuestFault) -> FaultOutcome? {
        let state = state(of: cpu)
        if state.mmioFrame == fault.frame, state.mmioGeneration == generation(for: cpu) { return .emulate }
        guard let root = cpu.root, fault.frame < view(root).end else { return .retry }
        switch withTables({ lastEntry(root, fault.frame) }) {
        case .reserved: return .failed(.EINVAL)
        case .other: return .retry
        case .mmio(let entry):
            guard isFresh(entry, fault.frame, for: cpu) else { return nil }
            state.rememberMMIO(fault.frame, generation(for: cpu))
            return .emulate
        }
    }

    private enum LastEntry {
        case mmio(UInt64)
        case reserved, other
    }

    /// What stands where the walk for `frame` ends. Caller in a section.
    private func lastEntry(_ root: HostFrame, _ frame: GuestFrame) -> LastEntry {
        let view = view(root)
        var level = PageLevel(configuration.levels)
        while true {
            let position = view.descend(to: frame, until: level)
            let entry = position.value
            if EntryBits.isPresent(entry) {
                let reserved = bits.isReserved(
                    entry, level.rawValue, physicalAddressBits: configuration.physicalAddressBits,
                    executeOnly: configuration.executeOnly)
                if reserved { return .reserved }
            }
            guard EntryBits.isTable(entry, level.rawValue) else {
                return configuration.cachesMMIO && bits.isMMIO(entry) ? .mmio(entry) : .other
            }
            level = level.below
        }
    }

    // MARK: A fault without a slot

    /// Emulated, and remembered: by the vCPU, and by an entry that makes the next access a quick exit. No page is owned.
    /// Caller as for `serve`. Kernel: `kvm_handle_noslot_fault`, and the rest of the fault.
    ///
    /// No retry check: the generation protects these entries. That of the root stays. Spec: x86 2.7.
    @inline(never)
    func serveNoSlot(
        _ cpu: VirtualCPU, _ root: HostFrame, _ fault: GuestFault, _ reserve: inout TableReserve
    ) -> FaultOutcome {
        let now = generation(for: cpu)
        if now >> 63 == 0 { state(of: cpu).rememberMMIO(fault.frame, now) }
        guard cachesMMIO(fault.frame) else { return FaultFamily.x86.answer(.noSlot, fault.access).outcome }
        let guardian = vm.lockMMUForFault()
        let section = tables.enter()
        let outcome = isValid(root) ? mark(cpu, root, fault, &reserve, guardian) : .retry
        tables.exit(section)
        guardian.unlock()
        return outcome
    }

    private func mark(
        _ cpu: VirtualCPU, _ root: HostFrame, _ fault: GuestFault, _ reserve: inout TableReserve,
        _ guardian: borrowing MMUGuard
    ) -> FaultOutcome {
        let role = role(ofRoot: root)
        while true {
            let position = view(root).descend(to: fault.frame, until: .page4K)
            if position.value == EntryBits.frozen { return .retry }
            if position.level == .page4K { return mark(cpu, position, fault) }
            guard let child = reserve.take() else { return .retry }
            let seen = position.entry.observe(holding: guardian)
            if !link(child, at: position, fault.frame, role, seen: seen) {
                vm.host.freeTable(child)
                return .retry
            }
        }
    }

    /// A leaf here belongs to a slot that is new since this fault looked. If it does not allow the access either, the
    /// guest tries again, and then finds that slot; Linux would put the marker over it.
    private func mark(_ cpu: VirtualCPU, _ position: RadixPosition, _ fault: GuestFault) -> FaultOutcome {
        let old = position.value
        if EntryBits.isPresent(old) { return bits.allows(fault.access, old) ? .spurious : .retry }
        let now = generation(for: cpu)
        let new = bits.mmioEntry(fault.frame, generation: now, .all)
        if new != old, position.entry.mark(new, form: bits.mmioForm, expected: old) != nil { return .retry }
        CPUStatistics.bump(cpu.statistics.pf_mmio_spte_created)
        record(
            Event(
                .mmioMarked, frame: position.table, guest: fault.frame.number, level: 1, value: new,
                extra: now & EntryBits.generationMask))
        return .emulate
    }

    // MARK: The generation

    /// The slots are about to get `generation`. When the 19 bits begin anew, entries of long ago would pass for fresh, so
    /// everything goes. Caller holds slots_lock. Kernel: `kvm_mmu_invalidate_mmio_sptes`. Spec: x86 1.5.
    func slotsChange(to generation: UInt64) {
        let spaces = UInt64(vm.addressSpaceCount)
        guard configuration.cachesMMIO, generation & EntryBits.generationMask & ~(spaces - 1) == 0 else { return }
        replaceRoots()
        freeRemovedTables()
    }
}
