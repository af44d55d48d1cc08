import Synchronization

/// The counters of one vCPU, by KVM's names. Kernel: `struct kvm_vcpu_stat`. Spec: x86 section 9.
///
/// The vCPU's own task alone counts, so a load and a store are enough: no line goes from processor to processor for a
/// count, and no instruction locks one. Anybody may read.
// swift-format-ignore: AlwaysUseLowerCamelCase
public final class CPUStatistics: Sendable {
    public let pf_taken = Atomic<UInt64>(0)
    public let pf_fixed = Atomic<UInt64>(0)
    public let pf_fast = Atomic<UInt64>(0)
    public let pf_emulate = Atomic<UInt64>(0)
    public let pf_spurious = Atomic<UInt64>(0)
    public let pf_mmio_spte_created = Atomic<UInt64>(0)
    public let pf_guest = Atomic<UInt64>(0)
    public let tlb_flush = Atomic<UInt64>(0)
    public let invlpg = Atomic<UInt64>(0)
    public let exits = Atomic<UInt64>(0)
    public let mmio_exits = Atomic<UInt64>(0)
    public let signal_exits = Atomic<UInt64>(0)
    /// Instructions that KVM carried out in the guest's place.
    public let insn_emulation = Atomic<UInt64>(0)
    /// Leaves that the vCPU's own faults made; see `Statistics.pages_4k`.
    public let pages_4k = Atomic<Int>(0)
    public let pages_2m = Atomic<Int>(0)
    public let pages_1g = Atomic<Int>(0)
    public init() {}

    /// The vCPU's fault has made a leaf of `level` (1, 2 or 3). Caller: the vCPU's own task.
    @inlinable @inline(__always)
    public func addPage(level: UInt8) {
        switch level {
        case 1: Self.bump(pages_4k)
        case 2: Self.bump(pages_2m)
        default: Self.bump(pages_1g)
        }
    }

    /// Caller: the vCPU's own task.
    @inlinable @inline(__always)
    static func bump(_ counter: borrowing Atomic<Int>) {
        counter.store(counter.load(ordering: .relaxed) &+ 1, ordering: .relaxed)
    }

    /// Caller: the vCPU's own task.
    @inlinable @inline(__always)
    public static func bump(_ counter: borrowing Atomic<UInt64>) {
        counter.store(counter.load(ordering: .relaxed) &+ 1, ordering: .relaxed)
    }

    /// How a fault ended. A write that was refused because of what the page holds ends with the emulator. Caller as above.
    /// Kernel: the end of `kvm_mmu_page_fault`. Spec: x86 2.3, section 9.
    public func count(_ outcome: FaultOutcome) {
        switch outcome {
        case .fixed: Self.bump(pf_fixed)
        case .emulate, .writeProtected: Self.bump(pf_emulate)
        case .spurious: Self.bump(pf_spurious)
        case .failed(.EINTR): Self.bump(signal_exits)
        case .retry, .failed, .memoryFault: break
        }
    }
}

/// How many leaves of one size there are, added up when it was asked for.
public struct LeafCount: Sendable, Equatable {
    public let value: Int
    /// Reads like a single counter.
    @inlinable public func load(ordering: CounterSum.Ordering) -> Int { value }
}

/// What all vCPUs of a VM have counted, added up when it was asked for.
public struct CounterSum: Sendable, Equatable {
    /// Counters are read in one way only.
    public enum Ordering: Sendable { case relaxed }
    public let value: UInt64
    /// Reads like the counter of a single vCPU.
    @inlinable public func load(ordering: Ordering) -> UInt64 { value }
}
