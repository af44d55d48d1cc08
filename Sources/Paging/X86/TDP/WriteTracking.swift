import Audit
import Frames
import GuestMemory
import HostMemory
import Synchrony

/// Frames that the guest must not write unheard. Spec: x86 2.4, 2.11 step 4, 3.8, X48.
extension TDPMMU {
    /// Whether a frame can be tracked: if somebody asked for that, or there are nested guests' tables.
    @inline(__always)
    var tracksFrames: Bool {
        configuration.tracksWrites || (configuration.nested && nested?.knowsSlots ?? false)
    }

    /// The slot's tracked frames; nil where the MMU was made without.
    @inline(__always)
    func trackedFrames(of slot: MemorySlot) -> TrackedFrames? {
        guard tracksFrames, let extra = slot.extra else { return nil }
        // Reverse maps are such too, and nothing else is made.
        return unsafeDowncast(extra, to: TrackedFrames.self)
    }

    /// Whether a write to `frame` must be emulated.
    func isTracked(_ frame: GuestFrame, in slot: MemorySlot?) -> Bool {
        guard tracksFrames, let slot else { return false }
        return trackedFrames(of: slot)?.isTracked(frame) ?? false
    }

    /// A write to `frame` faults from now on; returns when no vCPU can write it any more. No lock held. EINVAL: the MMU was
    /// made without tracking, or no slot contains the frame. Kernel: `kvm_write_track_add_gfn`.
    public func track(_ frame: GuestFrame, in space: UInt8 = 0) throws(Errno) {
        try changeTracking(of: frame, in: space, by: 1)
    }

    /// One reason less to track `frame`; entries become writable again with the next fault. Kernel:
    /// `kvm_write_track_remove_gfn`.
    public func untrack(_ frame: GuestFrame, in space: UInt8 = 0) throws(Errno) {
        try changeTracking(of: frame, in: space, by: -1)
    }

    private func changeTracking(of frame: GuestFrame, in space: UInt8, by change: Int) throws(Errno) {
        let side = vm.slotReaders.enter()
        defer { vm.slotReaders.exit(side) }
        guard configuration.tracksWrites,
            let slot = vm.slot(containing: frame, in: space), let tracked = trackedFrames(of: slot)
        else {
            throw .EINVAL
        }
        let guardian = vm.lockMMU()
        let isLegal = change > 0 || tracked.isTracked(frame)
        if isLegal { addTracking(change, frame, slot, tracked, holding: guardian) }
        guardian.unlock()
        if !isLegal { throw .EINVAL }
    }

    /// The count goes up before the entries lose W: a fault that holds the lock later sees it. A huge leaf stays, without
    /// W and MW, until a write to another of its frames splits it. The flush keys on MW: a leaf that logging had made
    /// read-only may still be writable in a TLB (F3). Kernel: `__kvm_write_track_add_gfn`.
    private func addTracking(
        _ change: Int, _ frame: GuestFrame, _ slot: MemorySlot, _ tracked: TrackedFrames,
        holding guardian: borrowing MMUGuard
    ) {
        tracked.add(change, frame)
        slot.largePages?.add(Int32(change), at: frame)
        guard change > 0 else { return }
        var flush = false
        for root in validRoots(of: slot.addressSpace) where protectLeaf(of: frame, root, from: .page4K) { flush = true }
        if flush { vm.flushRemoteTLBs() }
    }
}
