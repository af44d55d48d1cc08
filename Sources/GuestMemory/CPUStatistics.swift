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
    public init() {}

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

/// What all vCPUs of a VM have counted, added up when it was asked for.
public struct CounterSum: Sendable, Equatable {
    /// Counters are read in one way only.
    public enum Ordering: Sendable { case relaxed }
    public let value: UInt64
    /// Reads like the counter of a single vCPU.
    @inlinable public func load(ordering: Ordering) -> UInt64 { value }
}
