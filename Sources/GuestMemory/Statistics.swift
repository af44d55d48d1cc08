import Synchronization

/// KVM's counters, by KVM's names. Spec: x86 section 9.
// swift-format-ignore: AlwaysUseLowerCamelCase
public final class Statistics: Sendable {
    public let pf_taken = Atomic<UInt64>(0)
    public let pf_fixed = Atomic<UInt64>(0)
    public let pf_fast = Atomic<UInt64>(0)
    public let pf_emulate = Atomic<UInt64>(0)
    public let pf_spurious = Atomic<UInt64>(0)
    public let pf_mmio_spte_created = Atomic<UInt64>(0)
    public let mmio_exits = Atomic<UInt64>(0)
    public let signal_exits = Atomic<UInt64>(0)
    /// Present leaves by level; index 0 is 4 KiB. Kernel: `pages_4k`, `pages_2m`, `pages_1g`.
    public let pages_4k = Atomic<Int>(0)
    public let pages_2m = Atomic<Int>(0)
    public let pages_1g = Atomic<Int>(0)
    public let remote_tlb_flush = Atomic<UInt64>(0)
    public let remote_tlb_flush_requests = Atomic<UInt64>(0)
    public let tlb_flush = Atomic<UInt64>(0)
    public let pf_guest = Atomic<UInt64>(0)
    public let invlpg = Atomic<UInt64>(0)
    /// Shadow pages that were zapped; a root counts once more when its last vCPU lets it go.
    public let mmu_shadow_zapped = Atomic<UInt64>(0)
    /// Emulated writes to guest page tables.
    public let mmu_pte_write = Atomic<UInt64>(0)
    public let mmu_pde_zapped = Atomic<UInt64>(0)
    public let mmu_flooded = Atomic<UInt64>(0)
    public let mmu_recycled = Atomic<UInt64>(0)
    public let mmu_cache_miss = Atomic<UInt64>(0)
    /// Shadow pages out of sync now.
    public let mmu_unsync = Atomic<Int>(0)
    public let nx_lpage_splits = Atomic<Int>(0)
    public let max_mmu_rmap_size = Atomic<UInt64>(0)
    public let max_mmu_page_hash_collisions = Atomic<UInt64>(0)
    public init() {}

    /// Adds `count` leaves of `level` (1, 2 or 3).
    @inlinable public func addPages(level: UInt8, _ count: Int) {
        switch level {
        case 1: pages_4k.add(count, ordering: .relaxed)
        case 2: pages_2m.add(count, ordering: .relaxed)
        default: pages_1g.add(count, ordering: .relaxed)
        }
    }

    /// Keeps the largest value seen.
    public static func raise(_ peak: borrowing Atomic<UInt64>, to value: UInt64) {
        _ = peak.max(value, ordering: .relaxed)
    }

    @inlinable public static func bump(_ counter: borrowing Atomic<UInt64>) { counter.add(1, ordering: .relaxed) }
}
