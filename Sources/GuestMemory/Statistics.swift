import Synchronization

/// A VM's counters, by KVM's names; those of its vCPUs as sums. Spec: x86 section 9.
// swift-format-ignore: AlwaysUseLowerCamelCase
public final class Statistics: @unchecked Sendable {
    // Unchecked: `cpus` is written while vCPUs are made, before any of them runs.
    /// What `addPages` has counted: all but the leaves that vCPUs count for themselves.
    private let otherPages_4k = Atomic<Int>(0)
    private let otherPages_2m = Atomic<Int>(0)
    private let otherPages_1g = Atomic<Int>(0)
    public let remote_tlb_flush = Atomic<UInt64>(0)
    public let remote_tlb_flush_requests = Atomic<UInt64>(0)
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
    private var cpus: [CPUStatistics] = []
    public init() {}

    // MARK: Of all vCPUs

    public var pf_taken: CounterSum { sum { $0.pf_taken.load(ordering: .relaxed) } }
    public var pf_fixed: CounterSum { sum { $0.pf_fixed.load(ordering: .relaxed) } }
    public var pf_fast: CounterSum { sum { $0.pf_fast.load(ordering: .relaxed) } }
    public var pf_emulate: CounterSum { sum { $0.pf_emulate.load(ordering: .relaxed) } }
    public var pf_spurious: CounterSum { sum { $0.pf_spurious.load(ordering: .relaxed) } }
    public var pf_mmio_spte_created: CounterSum { sum { $0.pf_mmio_spte_created.load(ordering: .relaxed) } }
    public var pf_guest: CounterSum { sum { $0.pf_guest.load(ordering: .relaxed) } }
    public var tlb_flush: CounterSum { sum { $0.tlb_flush.load(ordering: .relaxed) } }
    public var invlpg: CounterSum { sum { $0.invlpg.load(ordering: .relaxed) } }
    public var exits: CounterSum { sum { $0.exits.load(ordering: .relaxed) } }
    public var mmio_exits: CounterSum { sum { $0.mmio_exits.load(ordering: .relaxed) } }
    public var insn_emulation: CounterSum { sum { $0.insn_emulation.load(ordering: .relaxed) } }
    public var signal_exits: CounterSum { sum { $0.signal_exits.load(ordering: .relaxed) } }

    func count(_ cpu: CPUStatistics) { cpus.append(cpu) }

    private func sum(_ counter: (CPUStatistics) -> UInt64) -> CounterSum {
        var total: UInt64 = 0
        for cpu in cpus { total &+= counter(cpu) }
        return CounterSum(value: total)
    }

    // MARK: Of the VM

    /// Present leaves of 4 KiB. A fault adds to its own vCPU's counter, everybody else to the VM's. Kernel: `pages_4k`.
    public var pages_4k: LeafCount {
        leaves(otherPages_4k.load(ordering: .relaxed)) { $0.pages_4k.load(ordering: .relaxed) }
    }
    /// Of 2 MiB. Kernel: `pages_2m`.
    public var pages_2m: LeafCount {
        leaves(otherPages_2m.load(ordering: .relaxed)) { $0.pages_2m.load(ordering: .relaxed) }
    }
    /// Of 1 GiB. Kernel: `pages_1g`.
    public var pages_1g: LeafCount {
        leaves(otherPages_1g.load(ordering: .relaxed)) { $0.pages_1g.load(ordering: .relaxed) }
    }

    private func leaves(_ others: Int, _ counter: (CPUStatistics) -> Int) -> LeafCount {
        var total = others
        for cpu in cpus { total &+= counter(cpu) }
        return LeafCount(value: total)
    }

    /// Adds `count` leaves of `level` (1, 2 or 3).
    public func addPages(level: UInt8, _ count: Int) {
        switch level {
        case 1: otherPages_4k.add(count, ordering: .relaxed)
        case 2: otherPages_2m.add(count, ordering: .relaxed)
        default: otherPages_1g.add(count, ordering: .relaxed)
        }
    }

    /// Keeps the largest value seen.
    public static func raise(_ peak: borrowing Atomic<UInt64>, to value: UInt64) {
        _ = peak.max(value, ordering: .relaxed)
    }

    @inlinable public static func bump(_ counter: borrowing Atomic<UInt64>) { counter.add(1, ordering: .relaxed) }
}
