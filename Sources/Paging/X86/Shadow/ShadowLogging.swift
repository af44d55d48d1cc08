import Frames
import GuestMemory
import HostMemory
import Synchrony

/// Dirty logging by W. Spec: x86 3.8, for reverse maps.
extension ShadowMMU {
    /// Small leaves: large ones lost W when logging began, or lose it now if logging began with a bitmap of ones; MW goes
    /// too, so the next write makes small ones. Caller: mmu_lock for writing; flushes.
    /// Kernel: `kvm_arch_mmu_enable_log_dirty_pt_masked`. Spec: x86 3.8, F3x.
    func protectPages(_ slot: MemorySlot, _ first: GuestFrame, _ mask: UInt64) {
        if vm.manualProtect.initiallySet, mask != 0 {
            // 64 frames lie in two blocks at most.
            for bit in [mask.trailingZeroBitCount, 63 - mask.leadingZeroBitCount] {
                let frame = GuestFrame(first.number + UInt64(bit))
                _ = writeProtect(frame, slot, tracking: true, from: .page2M)
            }
        }
        var rest = mask
        while rest != 0 {
            let frame = GuestFrame(first.number + UInt64(rest.trailingZeroBitCount))
            rest &= rest - 1
            for place in reverseMap(slot).entries(frame, .page4K) { _ = protect(at: place, tracking: false) }
        }
    }

    /// Takes W from every leaf of the slot. MW stays. Takes mmu_lock. Kernel: `kvm_mmu_slot_remove_write_access`.
    func startLogging(_ slot: MemorySlot) {
        guard !slot.flags.readOnly else { return }
        let initiallySet = vm.manualProtect.initiallySet
        if !initiallySet {
            let guardian = vm.lockMMU()
            for level in [PageLevel.page4K, .page2M, .page1G] {
                forEachBlock(of: slot, level, in: slot.frames) { frame in
                    for place in reverseMap(slot).entries(frame, level) { _ = protect(at: place, tracking: false) }
                }
            }
            guardian.unlock()
            vm.flushRemoteTLBs()
        }
    }

    /// Small leaves where large ones would do go, so that the next fault makes a large one. Takes mmu_lock.
    /// Kernel: `kvm_rmap_zap_collapsible_sptes`. Spec: x86 3.10.
    func dropSmallLeaves(_ slot: MemorySlot) {
        let guardian = vm.lockMMU()
        var dropped = false
        for level in [PageLevel.page4K, .page2M] {
            forEachBlock(of: slot, level, in: slot.frames) { frame in
                for place in reverseMap(slot).entries(frame, level) {
                    let (page, index) = holder(of: place)
                    guard page.role.isDirect, couldBeLarger(frame, level, slot) else { continue }
                    dropLeaf(page, index)
                    dropped = true
                }
            }
        }
        if dropped { vm.flushRemoteTLBs() }
        guardian.unlock()
    }

    private func couldBeLarger(_ frame: GuestFrame, _ level: PageLevel, _ slot: MemorySlot) -> Bool {
        guard level < direct?.largestPage ?? .page1G, let counts = slot.largePages, counts.allows(frame, level.above)
        else { return false }
        return vm.addressSpace.mappingLevel(of: slot.userAddress(of: frame)) > level
    }
}
