import Audit
import Frames
import GuestMemory
import Hardware
import HostMemory
import Paging
import Synchrony

/// A vCPU whose guest has page tables of its own: it performs single accesses of 8 bytes at linear addresses. Kernel: a
/// vCPU thread in `KVM_RUN`.
///
/// A subclass says what the processor walks, and what KVM is told of a fault.
public class LinearCPU: VirtualCPU, @unchecked Sendable {
    // Unchecked: restates the base class; the rest belongs to the vCPU's own task.
    public final let buffer = LinearTranslationBuffer(capacity: 64)
    /// As `GuestCPU.patience`.
    public final var patience = 1000

    public final override func dropTranslations() { buffer.invalidateAll() }

    /// One access, 8-byte aligned. No lock held.
    public final func access(_ access: PagedAccess, at address: UInt64) -> PagedAccessResult {
        persevere(patience, at: GuestAddress(address).frame) { step(access, at: address) } ?? .failed(.EIO)
    }

    /// Runs the guest until the access is done or has faulted once: nil after a fault, when the guest is to try again.
    /// As `access`.
    public final func step(_ access: PagedAccess, at address: UInt64) -> PagedAccessResult? {
        if let refusal = enterGuest() {
            guard refusal == .halted else { return .dirtyRingFull }
            return sleepUntilReady().map { .failed($0) }
        }
        guard root != nil else {
            exitGuest()
            return .failed(shadow.rootFailure ?? .ENOMEM)
        }
        let result = attempt(access, address)
        exitGuest()
        switch result {
        case .value(let value): return .value(value)
        case .stored: return .stored
        case .misaligned: preconditionFailure("accesses are 8-byte aligned")
        case .fault(let fault): return answer(fault, to: access, address)
        }
    }

    /// Lets KVM handle the fault. Nil: run the guest again.
    final func handle(_ access: PagedAccess, _ fault: GuestFault) -> PagedAccessResult? {
        let shadow = shadow
        shadow.pageFault = nil
        shadow.nestedExit = nil
        let side = vm.slotReaders.enter()
        defer { vm.slotReaders.exit(side) }
        switch vm.mmu.handleFault(self, fault) {
        case .retry, .fixed, .spurious:
            if let exit = shadow.nestedExit { return .nestedExit(exit) }
            return shadow.pageFault.map { .pageFault($0) }
        case .writeProtected, .emulate:
            // What was to be done to a guest's table, no instruction names: the processor will do it.
            guard !fault.isOnGuestTables else { return nil }
            return emulate(access, isOnShadowTables ? shadow.faultedAddress : fault.address) { guestMemoryWritten($0) }
        case .failed(let errno), .memoryFault(let errno): return .failed(errno)
        }
    }

    /// KVM's tables are such that the processor can't walk them.
    final func failWalk(_ reason: StaticReason, _ address: UInt64) -> PagedAccessResult {
        vm.memory.journal?.add(Finding(.x23, reason, guest: GuestAddress(address).frame))
        return .failed(.EIO)
    }

    // MARK: What subclasses say

    /// What KVM keeps for the tables that are shadowed.
    var shadow: ShadowCPU { preconditionFailure("a vCPU of no kind") }
    /// Whether the tables in use shadow others, so that KVM alone knows the guest physical address of a fault.
    var isOnShadowTables: Bool { preconditionFailure("a vCPU of no kind") }
    /// The processor's part. In guest mode.
    func attempt(_ access: PagedAccess, _ address: UInt64) -> LinearPortResult {
        preconditionFailure("a vCPU of no kind")
    }
    /// What the fault comes to: the guest's own, or KVM's to `handle`. Nil: run the guest again.
    func answer(_ fault: LinearResult, to access: PagedAccess, _ address: UInt64) -> PagedAccessResult? {
        preconditionFailure("a vCPU of no kind")
    }
    /// KVM has written 8 bytes of the guest's: they may be a table's. Inside `withSlots`, no lock held.
    func guestMemoryWritten(_ address: GuestAddress) { preconditionFailure("a vCPU of no kind") }
}
