import Audit
import Frames
import HostMemory
import Synchrony

/// What userspace learns of a fault that KVM can't serve because of private memory: above all that the guest wants a frame
/// to be private that is shared, or the other way round. Kernel: `run->memory_fault` of `KVM_EXIT_MEMORY_FAULT`.
///
/// The run fails with an errno as well; only EFAULT and EHWPOISON say that this is to be trusted. Spec: generic section 7.
public struct MemoryFaultExit: Sendable, Equatable {
    /// The access wanted private memory. Kernel: `KVM_MEMORY_EXIT_FLAG_PRIVATE`, bit 3.
    public var isPrivate: Bool
    /// Page-aligned.
    public var address: GuestAddress
    /// Bytes: one page.
    public var size: UInt64

    public init(_ frame: GuestFrame, isPrivate: Bool) {
        self.isPrivate = isPrivate
        address = frame.address
        size = pageSize
    }

    /// Kernel: `run->memory_fault.flags`.
    public var flags: UInt64 { isPrivate ? 1 << 3 : 0 }
}

/// The answer of a private fault-in: a frame, or an errno for the run.
public enum PrivateFaultInResult: ~Copyable {
    case frame(FaultedFrame)
    case failed(Errno, InvalidationSnapshot)
}

extension VirtualMachine {
    /// Whether a fault on `frame` that does not say itself wants private memory: where the guest has no way to say so, its
    /// attribute does. Read before the snapshot: a change in between is seen as a mismatch. Spec: x86 2.3 step 1.
    @inline(__always)
    public func wantsPrivate(_ fault: GuestFault) -> Bool {
        fault.isPrivate ?? (type == .softwareProtected && isPrivate(fault.frame))
    }

    /// Finds the private page of a guest frame to serve a fault. May sleep; inside `withSlots`, no lock held. The slot
    /// binds a file, or did: EFAULT. Errors: those of `privatePage`. Kernel: `kvm_faultin_pfn_private`. Spec: generic 2.15.
    ///
    /// The page comes with one reference, held and released like that of a shared frame; nothing of the user's mappings
    /// plays a part.
    @export(interface)
    public func faultInPrivate(
        _ frame: GuestFrame, slot: MemorySlot, snapshot: consuming InvalidationSnapshot
    ) -> PrivateFaultInResult {
        let page: PageReference
        do throws(Errno) {
            page = try privatePage(of: frame, in: slot)
        } catch {
            record(
                Event(
                    .translationFailed, holder: .guestFault, guest: frame.number,
                    value: UInt64(100 + error.rawValue)))
            return .failed(error, snapshot)
        }
        return .frame(FaultedFrame(private: page, at: frame, slot, snapshot, self))
    }
}

extension FaultedFrame {
    /// A private page. Writable unless the slot is read-only, which a slot with private memory never is.
    init(
        private page: consuming PageReference, at frame: GuestFrame, _ slot: MemorySlot,
        _ snapshot: consuming InvalidationSnapshot, _ vm: VirtualMachine
    ) {
        let found = page.frame
        let writable = !slot.flags.readOnly
        vm.record(
            Event(.translated, holder: .guestFault, frame: found, guest: frame.number, value: (writable ? 1 : 0) | 2))
        self.init(
            guestFrame: frame, frame: found, isWritable: writable, isCounted: true, isPrivate: true, mayBeHuge: false,
            slotReference: Unmanaged.passUnretained(slot), snapshot: snapshot, reference: vm.hold(page))
    }
}
