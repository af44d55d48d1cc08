import Audit
import Frames
import GuestMemory
import HostMemory
import Synchrony

/// An access without memory that a vCPU has just met, and of which slots that was true. Kernel: `mmio_gfn`, `mmio_gen`.
struct RememberedMMIO {
    private(set) var frame: GuestFrame?
    private var generation: UInt64 = 0

    func isOf(_ frame: GuestFrame, _ generation: UInt64) -> Bool {
        self.frame == frame && self.generation == generation
    }

    /// Nothing while an update of the slots is in progress. Kernel: `vcpu_cache_mmio_info`.
    mutating func note(_ frame: GuestFrame, _ generation: UInt64) {
        guard generation >> 63 == 0 else { return }
        self.frame = frame
        self.generation = generation
    }
}

/// What stands where a walk ends.
enum LastEntry {
    case mmio(UInt64)
    case reserved, other
}

extension TDPConfiguration {
    /// Whether there can be an MMIO entry for `frame`. Kernel: `enable_mmio_caching`, `kvm_mmu_max_gfn`.
    func keepsMMIO(_ frame: GuestFrame) -> Bool {
        // A legacy entry needs an address bit that no processor of this width accepts.
        cachesMMIO && (format == .ept || physicalAddressBits < 52) && frame.number < endOfGuestFrames
            && frame.number >> (levels == 5 ? 45 : 36) == 0
    }

    /// Caller: nobody frees a table meanwhile. Kernel: `get_mmio_spte`.
    func lastEntry(in tables: RadixTables<TDPFormat>, _ frame: GuestFrame, _ bits: EntryBits) -> LastEntry {
        var level = PageLevel(levels)
        while true {
            let entry = tables.descend(to: frame, until: level).value
            if EntryBits.isPresent(entry) {
                let isReserved = bits.isReserved(
                    entry, level.rawValue, physicalAddressBits: physicalAddressBits, executeOnly: executeOnly)
                if isReserved { return .reserved }
            }
            guard EntryBits.isTable(entry, level.rawValue) else {
                return cachesMMIO && bits.isMMIO(entry) ? .mmio(entry) : .other
            }
            level = level.below
        }
    }
}

extension SecondaryMMU {
    /// The access met an entry that hardware does not accept. Nil: the entry is out of date, and the fault is handled like
    /// any other. EINVAL: KVM's own tables are broken. Caller as for `handleFault`. Kernel: `handle_mmio_page_fault`.
    /// Spec: x86 2.8.
    final func answer(
        _ last: LastEntry, _ frame: GuestFrame, _ remembered: inout RememberedMMIO, _ cpu: VirtualCPU
    ) -> FaultOutcome? {
        switch last {
        case .reserved: return .failed(.EINVAL)
        case .other: return .retry
        case .mmio(let entry):
            let now = vm.slotsGeneration(of: cpu.addressSpaceNumber)
            guard isFresh(entry, frame, now) else { return nil }
            remembered.note(frame, now)
            return .emulate
        }
    }

    /// Whether the entry may be believed. Kernel: `check_mmio_spte`. Spec: X27.
    private final func isFresh(_ entry: UInt64, _ frame: GuestFrame, _ now: UInt64) -> Bool {
        vm.record(Event(.mmioChecked, guest: frame.number, value: entry, extra: now))
        let isSame = EntryBits.generation(ofMMIO: entry) == now & EntryBits.generationMask
        return now >> 63 == 0 && (isSame || Defect.generationIgnored.isOn)
    }

    /// Puts "no memory here" into a lowest entry. Caller holds mmu_lock. Kernel: `mark_mmio_spte`.
    ///
    /// A leaf here belongs to a slot that is new since this fault looked. If it does not allow the access either, the
    /// guest tries again, and then finds that slot; Linux would put the marker over it.
    final func markMMIO(
        _ position: RadixPosition, _ fault: GuestFault, _ bits: EntryBits, _ cpu: VirtualCPU
    ) -> FaultOutcome {
        let old = position.value
        if EntryBits.isPresent(old) { return bits.allows(fault.access, old) ? .spurious : .retry }
        let now = vm.slotsGeneration(of: cpu.addressSpaceNumber)
        let new = bits.mmioEntry(fault.frame, generation: now, .all)
        if new != old, position.entry.mark(new, form: bits.mmioForm, expected: old) != nil { return .retry }
        CPUStatistics.bump(cpu.statistics.pf_mmio_spte_created)
        vm.record(
            Event(
                .mmioMarked, frame: position.table, guest: fault.frame.number, level: 1, value: new,
                extra: now & EntryBits.generationMask))
        return .emulate
    }

    /// Whether the 19 bits of MMIO entries begin anew with `generation`: entries of long ago would pass for fresh, so
    /// everything must go. Kernel: `kvm_mmu_invalidate_mmio_sptes`. Spec: x86 1.5.
    final func wrapsMMIO(_ generation: UInt64) -> Bool {
        generation & EntryBits.generationMask & ~(UInt64(vm.addressSpaceCount) - 1) == 0
    }
}
