import Audit
import Frames
import GuestMemory
import HostMemory
import Synchrony

/// Faults that only give back what KVM itself took away: W for the dirty log, rights for access tracking. No lock, no
/// translation, and no page is touched: none is known, and the page was marked dirty when the leaf was made (X5).
/// Kernel: `fast_page_fault`. Spec: x86 2.6.
///
/// Works only because the guest frame of an entry never changes in these tables: no guest's entry stands behind it.
struct LocklessFix {
    let tables: RadixTables<TDPFormat>
    let bits: EntryBits
    let accessDirty: Bool

    /// Whether there is anything to try: present, the leaf must have lacked W; absent, it can only be access-tracked.
    /// Kernel: `page_fault_can_be_fast`.
    @inline(__always)
    static func mayHelp(_ fault: GuestFault, accessDirty: Bool) -> Bool {
        fault.entryPresent ? fault.access == .write : !accessDirty
    }

    /// Fixes the fault, or nil: the slow path must. Caller inside `withSlots`, and no table is freed meanwhile.
    func fix(_ fault: GuestFault, _ slot: MemorySlot?, by cpu: VirtualCPU) -> FaultOutcome? {
        guard !fault.isReserved, fault.frame < tables.end else { return nil }
        for _ in 0..<5 {
            switch attempt(fault, slot, cpu) {
            case .lostRace: continue
            case .outcome(let outcome): return outcome
            case .needsLock: return nil
            }
        }
        return nil
    }

    private enum Attempt {
        case outcome(FaultOutcome)
        case lostRace
        case needsLock
    }

    private func attempt(_ fault: GuestFault, _ slot: MemorySlot?, _ cpu: VirtualCPU) -> Attempt {
        guard let leaf = tables.leaf(of: fault.frame) else { return .needsLock }
        let old = leaf.value
        if bits.allows(fault.access, old) {
            tell(fault, leaf, old, old, 6, cpu)
            return .outcome(.spurious)
        }
        guard let update = restoring(old, fault.access, leaf.level, slot) else { return .needsLock }
        let new = update.applied(to: old)
        guard new != old, bits.allows(fault.access, new) else { return .needsLock }
        guard leaf.entry.apply(update, expected: old) == nil else { return .lostRace }
        tell(fault, leaf, old, new, 5, cpu)
        cpu.vm.record(
            Event(
                .entryChanged, frame: EntryBits.field.frame(in: new), guest: fault.frame.aligned(to: leaf.level).number,
                level: leaf.level.rawValue, value: new, extra: old))
        if new & ~old & EntryBits.write != 0, !Defect.fastFaultUnlogged.isOn, let slot {
            cpu.vm.markDirty(fault.frame, in: slot, by: cpu)
        }
        return .outcome(.fixed)
    }

    /// How it ended. Kernel: the tracepoint `fast_page_fault`; told of the ends that are final alone.
    private func tell(
        _ fault: GuestFault, _ leaf: RadixPosition, _ old: UInt64, _ new: UInt64, _ result: UInt8, _ cpu: VirtualCPU
    ) {
        cpu.vm.record(
            Event(
                .fastFault, frame: leaf.table, guest: fault.frame.number, level: leaf.level.rawValue | result << 4,
                value: new, extra: old, task: UInt8(truncatingIfNeeded: cpu.number)))
    }

    /// What may be given back. Nil: a huge leaf of a logged slot must be split first (X39). D stays as it is: hardware
    /// sets it.
    private func restoring(_ old: UInt64, _ access: AccessKind, _ level: PageLevel, _ slot: MemorySlot?) -> EntryUpdate?
    {
        var set: UInt64 = 0
        var clear: UInt64 = 0
        if !accessDirty && bits.isAccessTracked(old) {
            let restored = bits.restoring(old)
            clear = restored.clear
            set = restored.set | bits.accessed
        }
        if access == .write, old & bits.mmuWritable != 0 || Defect.fastWriteUnasked.isOn {
            if level > .page4K, slot?.isLogged ?? true { return nil }
            set |= EntryBits.write
        }
        return EntryUpdate(set: set, clear: clear)
    }
}
