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
    private let hold: Hold
    private let vm: VirtualMachine

    /// What keeps the memory alive.
    fileprivate enum Hold: ~Copyable {
        case pin(PagePin)
        /// The old policies: a reference instead of a pin.
        case page(PageReference)
        /// Nothing: an unsafe mapping.
        case nothing
    }

    fileprivate init(
        _ guestFrame: GuestFrame, _ frame: HostFrame, writable: Bool, _ hold: consuming Hold, _ vm: VirtualMachine
    ) {
        self.guestFrame = guestFrame
        self.frame = frame
        isWritable = writable
        bytes = vm.memory.bytes(of: frame)
        self.hold = hold
        self.vm = vm
        if writable { vm.memory.willWrite(frame) }
    }

    /// Whether the memory is pinned; false for unsafe mappings and under the old policies.
    public var isPinned: Bool {
        switch hold {
        case .pin: true
        case .page: false
        case .nothing: false
        }
    }

    /// Whether the memory has no page frame and is mapped all the same. Kernel: `map->page` is NULL: `memremap`.
    public var isRemapped: Bool { !vm.memory.hasPageFrame(frame) && !SeriesPatch.remappedHasNoPage.isUndone }

    /// Inside `withSlots`. The slot is looked up again: logging may have begun since the map was made (I-12).
    /// `cpu`: the vCPU whose task does it, nil for none. Kernel: `kvm_vcpu_unmap`.
    public consuming func unmap(by cpu: VirtualCPU? = nil) {
        let dirty = isWritable || SeriesPatch.writabilityFixedAtMap.isUndone
        if dirty, let slot = vm.slot(containing: guestFrame) { vm.markDirty(guestFrame, in: slot, by: cpu) }
        switch consume hold {
        case .pin(let pin): pin.unpin(dirty: dirty)
        case .page(let page):
            if dirty {
                page.releaseDirty(stabilisedBy: .exclusiveOwner)
            } else {
                page.releaseClean(stabilisedBy: .exclusiveOwner)
            }
        case .nothing: break
        }
    }
}

extension VirtualMachine {
    /// Maps a guest page for KVM. May sleep; inside `withSlots`. EINVAL: no translation, or PFN-mapped memory without
    /// `allowUnsafeMappings`. EFAULT: the kernel can't map it. Kernel: `kvm_vcpu_map`, `kvm_vcpu_map_readonly`.
    public func map(_ frame: GuestFrame, writable: Bool = true) throws(Errno) -> HostMap {
        guard let slot = slot(containing: frame), !slot.isInvalid, !(slot.flags.readOnly && writable) else {
            throw .EINVAL
        }
        if case .precise = policy, !SeriesPatch.mapsArePinned.isUndone {
            return try mapPinned(frame, slot, writable: writable)
        }
        return try mapReferenced(frame, slot, writable: writable)
    }

    /// Pinned; or, where get-user-pages has nothing and the VM allows it, mapped without anything. What can be pinned
    /// is never mapped with less (I-3). Spec: generic 2.3, 2.6 row 1.
    @export(interface)
    private func mapPinned(_ frame: GuestFrame, _ slot: MemorySlot, writable: Bool) throws(Errno) -> HostMap {
        let address = slot.userAddress(of: frame)
        do throws(GetUserPagesError) {
            let pin = try pin(address, write: writable || SeriesPatch.readOnlyMapsRead.isUndone)
            let found = pin.frame
            return HostMap(frame, found, writable: writable, .pin(pin), self)
        } catch {
            // Whatever else get-user-pages said, the memory may be PFN-mapped; that decides.
            if error == .interrupted || error == .again || error == .hardwarePoison { throw .EINVAL }
        }
        // Refused before any walk.
        guard allowUnsafeMappings || SeriesPatch.unpinnedMapsRefused.isUndone else { throw .EINVAL }
        let request = FollowRequest(frame: frame, write: writable, holder: .hostMap)
        switch throughPFNMap(address, request) {
        case .mapped(let found, _, _, _):
            guard canMap(found) else { throw .EFAULT }
            if let journal = memory.journal, !allowUnsafeMappings {
                journal.add(Finding(.i16, "memory is mapped that nothing keeps", frame: found, guest: frame))
            }
            return HostMap(frame, found, writable: writable, .nothing, self)
        case .page: throw .EINVAL
        case .failed: throw .EINVAL
        }
    }

    /// For write without locks where that suffices. Linux asks the slow lookup once more after that failed; all it could
    /// add is that the page is poisoned, which is refused all the same. Spec: generic 2.4, 2.5.
    private func pin(_ address: UserAddress, write: Bool) throws(GetUserPagesError) -> PagePin {
        if write { return try addressSpace.pinUserPageFast(address, write: true, holder: .hostMap) }
        var flags = LookupFlags()
        flags.hardwarePoison = true
        flags.honorNUMA = true
        return try addressSpace.pinUserPageUnlocked(address, flags, holder: .hostMap)
    }

    /// With a reference or with nothing, as the old policies do. Spec: generic 10.1, 10.2.
    @export(interface)
    private func mapReferenced(_ frame: GuestFrame, _ slot: MemorySlot, writable: Bool) throws(Errno) -> HostMap {
        switch follow(FollowRequest(frame: frame, write: writable, holder: .hostMap), in: slot) {
        case .page(let page, _):
            let found = page.frame
            return HostMap(frame, found, writable: writable, .page(page), self)
        case .mapped(let found, _, let guessed, _):
            switch policy {
            case .precise:
                guard allowUnsafeMappings else { throw .EINVAL }
                return HostMap(frame, found, writable: writable, .nothing, self)
            case .guess(let guess):
                guard guessed, let page = guess.claim(found, holder: .hostMap) else {
                    return HostMap(frame, found, writable: writable, .nothing, self)
                }
                return HostMap(frame, found, writable: writable, .page(page), self)
            case .tracked(let tracked):
                if let page = tracked.reference(found, holder: .hostMap) {
                    return HostMap(frame, found, writable: writable, .page(page), self)
                }
                // Not counted and not guarded by the notifier: v9 and later ask for the parameter.
                guard allowUnsafeMappings else { throw .EINVAL }
                return HostMap(frame, found, writable: writable, .nothing, self)
            }
        case .failed: throw .EINVAL
        }
    }
}
