import Frames
import HostMemory

/// From a guest frame to the user's address: the first half of every translation. Spec: generic 2.1.
///
/// Nil stands for both of KVM's error addresses: no slot or one that is INVALID (`KVM_HVA_ERR_BAD`), and a read-only slot
/// that is to be written (`KVM_HVA_ERR_RO_BAD`). Who must tell them apart looks at the slot. Callers are inside
/// `withSlots` or hold `slotsLock`.
extension MemorySlot {
    /// Kernel: `__gfn_to_hva_many`. `frame` lies in the slot.
    @inline(__always)
    public func checkedAddress(of frame: GuestFrame, write: Bool) -> UserAddress? {
        isInvalid || (write && flags.readOnly) ? nil : userAddress(of: frame)
    }
}

extension VirtualMachine {
    /// Kernel: `gfn_to_hva` for a write, `gfn_to_hva_prot` for a read.
    public func userAddress(of frame: GuestFrame, in space: UInt8 = 0, write: Bool = true) -> UserAddress? {
        activeSet(of: space)._withUnsafeGuaranteedRef { $0.checkedAddress(of: frame, write: write) }
    }

    /// The same, and how many pages of the slot follow from there, this one counted. Kernel: `gfn_to_hva_many`.
    public func userAddresses(
        from frame: GuestFrame, in space: UInt8 = 0, write: Bool = true
    ) -> (first: UserAddress, count: UInt64)? {
        guard let slot = slot(containing: frame, in: space),
            let address = slot.checkedAddress(of: frame, write: write)
        else { return nil }
        return (address, slot.frames.upperBound.number - frame.number)
    }

    /// For a read, and whether the guest may write there too. Kernel: `gfn_to_hva_prot`.
    public func userAddressAndRights(
        of frame: GuestFrame, in space: UInt8 = 0
    ) -> (address: UserAddress, writable: Bool)? {
        guard let slot = slot(containing: frame, in: space),
            let address = slot.checkedAddress(of: frame, write: false)
        else { return nil }
        return (address, !slot.flags.readOnly)
    }
}

extension VirtualMachine {
    /// Calls `body` for each slot that shows any of `range`, with its guest frames. Caller as above.
    public func forEachSlot(
        intersecting range: Range<UserAddress>, _ body: (MemorySlot, Range<GuestFrame>) -> Void
    ) {
        for sets in slotSets { sets.active.forEach(intersecting: range, body) }
    }

    /// Calls `body` for each slot of an address space that has any of `frames`, in order. Caller as above.
    public func forEachSlot(intersecting frames: Range<GuestFrame>, in space: UInt8, _ body: (MemorySlot) -> Void) {
        slotSets[Int(space)].active.forEach(intersecting: frames) { slot in
            body(slot)
            return true
        }
    }
}

extension VirtualCPU {
    /// In the vCPU's address space. Kernel: `kvm_vcpu_gfn_to_hva`, `kvm_vcpu_gfn_to_hva_prot`.
    public final func userAddress(of frame: GuestFrame, write: Bool = true) -> UserAddress? {
        if let address = hintedAddress(of: frame, write: write) { return address }
        return slot(containing: frame)?.checkedAddress(of: frame, write: write)
    }
}
