import Audit
import Frames
import HostMemory
import Synchrony

/// Guest memory mapped by KVM for itself: nested state, dcbz patching. Kernel: `struct kvm_host_map`.
/// Spec: generic 1.8, 2.12.
///
/// The memory is pinned, since no notifier guards such a mapping. PFN-mapped memory can't be pinned and is refused,
/// unless the VM allows unsafe mappings (I-16).
public struct HostMap: ~Copyable {
    public let guestFrame: GuestFrame
    public let frame: HostFrame
    /// Fixed when the map is made: a writable map dirties slot and page when it ends, written or not.
    public let isWritable: Bool
    /// The bytes of the page.
    public let bytes: UnsafeMutableRawPointer
    private var pin: PagePin?
    private let vm: VirtualMachine
    private let slot: MemorySlot

    init(
        guestFrame: GuestFrame, frame: HostFrame, isWritable: Bool, bytes: UnsafeMutableRawPointer,
        pin: consuming PagePin?, vm: VirtualMachine, slot: MemorySlot
    ) {
        self.guestFrame = guestFrame
        self.frame = frame
        self.isWritable = isWritable
        self.bytes = bytes
        self.pin = pin
        self.vm = vm
        self.slot = slot
    }

    /// Whether the memory is pinned; false only for unsafe mappings.
    public var isPinned: Bool { pin != nil }

    /// Kernel: `kvm_vcpu_unmap`.
    public consuming func unmap() {
        if isWritable { vm.markDirty(guestFrame, in: slot) }
        if let pin = pin.take() { pin.unpin(dirty: isWritable) }
    }
}

extension VirtualMachine {
    /// Maps a guest page for KVM. May sleep; inside `withSlots`. EINVAL: no translation, or PFN-mapped memory without
    /// `allowUnsafeMappings`. Kernel: `kvm_vcpu_map`, `kvm_vcpu_map_readonly`.
    public func map(_ frame: GuestFrame, writable: Bool = true) throws(Errno) -> HostMap {
        guard let slot = slot(containing: frame), !slot.isInvalid, !(slot.flags.readOnly && writable) else {
            throw .EINVAL
        }
        let address = slot.userAddress(of: frame)
        do throws(GetUserPagesError) {
            let pin =
                writable
                ? try addressSpace.pinUserPageFast(address, write: true, holder: .hostMap)
                : try pinSlowly(address, writable: false)
            let found = pin.frame
            if writable { memory.willWrite(found) }
            return HostMap(
                guestFrame: frame, frame: found, isWritable: writable, bytes: memory.bytes(of: found), pin: pin,
                vm: self, slot: slot)
        } catch {}
        return try mapUnpinned(frame, slot, writable: writable)
    }

    private func pinSlowly(_ address: UserAddress, writable: Bool) throws(GetUserPagesError) -> PagePin {
        var flags = LookupFlags()
        flags.write = writable
        flags.hardwarePoison = true
        flags.honorNUMA = true
        return try addressSpace.pinUserPageUnlocked(address, flags, holder: .hostMap)
    }

    /// Spec: generic 2.6 row 1: refused before any walk.
    private func mapUnpinned(_ frame: GuestFrame, _ slot: MemorySlot, writable: Bool) throws(Errno) -> HostMap {
        guard allowUnsafeMappings else { throw .EINVAL }
        let address = slot.userAddress(of: frame)
        addressSpace.mmapLock.lockForRead()
        defer { addressSpace.mmapLock.unlockRead() }
        while true {
            guard let vma = addressSpace.vmaLookup(address), vma.flags.io || vma.flags.pfnMap else { throw .EINVAL }
            var mapping = addressSpace.withPFNMapping(of: address, in: vma) { $0 }
            if mapping == nil {
                let fixup = addressSpace.fixupUserFault(address, write: writable)
                if fixup.unlocked { continue }
                if fixup.error != nil { throw .EINVAL }
                mapping = addressSpace.withPFNMapping(of: address, in: vma) { $0 }
            }
            guard let mapping, mapping.writable || !writable else { throw .EINVAL }
            return HostMap(
                guestFrame: frame, frame: mapping.frame, isWritable: writable,
                bytes: memory.bytes(of: mapping.frame), pin: nil, vm: self, slot: slot)
        }
    }
}
