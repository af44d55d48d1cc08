import Synchronization

/// A counter by KVM's name, with the value that it had when it was asked for. Kernel: `struct kvm_stats_desc`.
/// Spec: x86 section 9.
public struct NamedCounter: Sendable {
    public enum Kind: Sendable {
        /// It only grows.
        case cumulative
        /// How many there are now.
        case instant
        /// The most there ever were.
        case peak
    }
    public let name: StaticString
    public let kind: Kind
    public let value: UInt64
}

extension Statistics {
    /// A VM's counters, in the order in which `KVM_GET_STATS_FD` gives them.
    public var inOrder: [NamedCounter] {
        func cumulative(_ name: StaticString, _ counter: borrowing Atomic<UInt64>) -> NamedCounter {
            NamedCounter(name: name, kind: .cumulative, value: counter.load(ordering: .relaxed))
        }
        func instant(_ name: StaticString, _ value: Int) -> NamedCounter {
            NamedCounter(name: name, kind: .instant, value: UInt64(clamping: value))
        }
        func peak(_ name: StaticString, _ counter: borrowing Atomic<UInt64>) -> NamedCounter {
            NamedCounter(name: name, kind: .peak, value: counter.load(ordering: .relaxed))
        }
        return [
            cumulative("remote_tlb_flush", remote_tlb_flush),
            cumulative("remote_tlb_flush_requests", remote_tlb_flush_requests),
            cumulative("mmu_shadow_zapped", mmu_shadow_zapped), cumulative("mmu_pte_write", mmu_pte_write),
            cumulative("mmu_pde_zapped", mmu_pde_zapped), cumulative("mmu_flooded", mmu_flooded),
            cumulative("mmu_recycled", mmu_recycled), cumulative("mmu_cache_miss", mmu_cache_miss),
            instant("mmu_unsync", mmu_unsync.load(ordering: .relaxed)), instant("pages_4k", pages_4k.value),
            instant("pages_2m", pages_2m.value), instant("pages_1g", pages_1g.value),
            instant("nx_lpage_splits", nx_lpage_splits.load(ordering: .relaxed)),
            peak("max_mmu_rmap_size", max_mmu_rmap_size),
            peak("max_mmu_page_hash_collisions", max_mmu_page_hash_collisions),
        ]
    }
}

extension CPUStatistics {
    /// A vCPU's counters, in the order in which `KVM_GET_STATS_FD` gives them; what is not modelled is left out.
    public var inOrder: [NamedCounter] {
        func counter(_ name: StaticString, _ counter: borrowing Atomic<UInt64>) -> NamedCounter {
            NamedCounter(name: name, kind: .cumulative, value: counter.load(ordering: .relaxed))
        }
        return [
            counter("pf_taken", pf_taken), counter("pf_fixed", pf_fixed), counter("pf_emulate", pf_emulate),
            counter("pf_spurious", pf_spurious), counter("pf_fast", pf_fast),
            counter("pf_mmio_spte_created", pf_mmio_spte_created), counter("pf_guest", pf_guest),
            counter("tlb_flush", tlb_flush), counter("invlpg", invlpg), counter("exits", exits),
            counter("mmio_exits", mmio_exits), counter("signal_exits", signal_exits),
            counter("insn_emulation", insn_emulation),
        ]
    }
}
