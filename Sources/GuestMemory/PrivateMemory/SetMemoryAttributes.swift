import Frames
import HostMemory
import Synchrony

/// What can be said of a guest frame. Kernel: `KVM_MEMORY_ATTRIBUTE_*`.
public struct MemoryAttributes: Sendable, Equatable {
    public let bits: UInt64
    public init(bits: UInt64) { self.bits = bits }
    /// Kernel: `KVM_MEMORY_ATTRIBUTE_PRIVATE`.
    public static let isPrivate = MemoryAttributes(bits: 1 << 3)
    public static let none = MemoryAttributes(bits: 0)
}

extension VirtualMachine {
    /// What `setMemoryAttributes` takes. Kernel: `kvm_supported_mem_attributes`.
    public var supportedMemoryAttributes: MemoryAttributes { hasPrivateMemory ? .isPrivate : .none }

    /// Whether a guest frame uses private memory. Any lock may be held. A fault asks after its snapshot: a change after
    /// that is an invalidation. Kernel: `kvm_mem_is_private`.
    @inline(__always)
    public func isPrivate(_ frame: GuestFrame) -> Bool {
        hasPrivateMemory && hasPrivateAttribute(frame)
    }

    @inline(never)
    private func hasPrivateAttribute(_ frame: GuestFrame) -> Bool { privateMemory.attributes.isPrivate(frame) }

    /// Makes guest frames private or shared, with or without a slot. Address and size in bytes. Takes slots_lock.
    /// EINVAL: a flag, an attribute that is not supported, no size, wrap, part of a page; ENOMEM. Kernel:
    /// `KVM_SET_MEMORY_ATTRIBUTES`. Spec: generic 2.15.
    ///
    /// What was mapped goes first, and nothing of the range is mapped until the attributes are stored: a fault that looked
    /// at the old ones fails the retry check.
    public func setMemoryAttributes(
        address: UInt64, size: UInt64, _ attributes: MemoryAttributes, flags: UInt64 = 0
    ) throws(Errno) {
        mightSleep()
        guard flags == 0, attributes.bits & ~supportedMemoryAttributes.bits == 0 else { throw .EINVAL }
        let (end, wraps) = address.addingReportingOverflow(size)
        guard size != 0, !wraps, (address | size) & (pageSize - 1) == 0 else { throw .EINVAL }
        slotsLock.lock()
        defer { slotsLock.unlock() }
        try set(GuestAddress(address).frame..<GuestAddress(end).frame, isPrivate: attributes == .isPrivate)
    }

    /// Caller holds slots_lock.
    private func set(_ frames: Range<GuestFrame>, isPrivate: Bool) throws(Errno) {
        if privateMemory.attributes.areAll(frames, isPrivate: isPrivate) { return }
        // Whatever needs memory comes before anything changes. Kernel: `xa_reserve`.
        guard memory.allowsObject() else { throw .ENOMEM }
        let parts = slots(intersecting: frames)
        if !parts.isEmpty {
            // Blocks that the range cuts are mixed from here on. Linux 6.13 finds out only afterwards: a fault beside the
            // range, which no retry check stops, can put a huge leaf over what is about to become private.
            invalidate(parts) {
                for part in parts { part.slot.largePages?.markCut(by: frames, in: part.slot) }
            }
        }
        privateMemory.attributes.store(frames, isPrivate: isPrivate)
        if !parts.isEmpty {
            let guardian = lockMMU()
            endInvalidation()
            for part in parts { updateMixed(part.slot, frames) }
            guardian.unlock()
        }
    }

    /// The slots that show any of `frames`, each with what it shows. Caller holds slots_lock. A VM with private memory has
    /// one address space.
    private func slots(intersecting frames: Range<GuestFrame>) -> [SlotPart] {
        var parts: [SlotPart] = []
        slotSets[0].active.byFrame.forEach(intersecting: frames.lowerBound.number, frames.upperBound.number) { slot in
            parts.append(SlotPart(slot: slot, frames: slot.frames.clamped(to: frames)))
            return true
        }
        return parts
    }
}
