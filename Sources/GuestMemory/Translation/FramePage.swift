import Audit
import Frames
import HostMemory
import Synchrony

/// A page handed out for itself, for callers that need the page and not the mapping. Spec: generic 2.10.
extension VirtualMachine {
    /// The page behind a guest frame, with one reference, or nil: on every failure, and for all PFN-mapped memory even
    /// if it has page frames. Not guarded by the notifier. Kernel: `__gfn_to_page`.
    @export(interface)
    public func page(of frame: GuestFrame, write: Bool = true) -> PageReference? {
        let slot = slot(containing: frame)
        let write = write || SeriesPatch.pageForReading.isUndone
        switch follow(FollowRequest(frame: frame, write: write, holder: .framePage), in: slot) {
        case .page(let page, _): return page
        case .mapped(let found, _, let guessed, _):
            // PFN-mapped memory has no page for the caller, even if it has a page frame; the old policies gave one.
            switch policy {
            case .precise:
                guard guessed || takesMapped(found) else { return nil }
                return Guess(memory: memory).claim(found, holder: .framePage)
            case .guess(let guess): return guessed ? guess.claim(found, holder: .framePage) : nil
            case .tracked(let tracked): return tracked.reference(found, holder: .framePage)
            }
        case .failed: return SeriesPatch.nilForNoPage.isUndone ? host.errorPage(holder: .framePage) : nil
        }
    }

    /// Never, but as it was before the series.
    private func takesMapped(_ frame: HostFrame) -> Bool {
        SeriesPatch.noPageOfPFNMap.isUndone && Guess(memory: memory).takeMapped(frame)
    }

    /// Grabs up to `count` pages from `frame` on, for write, without sleeping; `each` owns one reference per call.
    /// Returns how many; -1 where the slot is missing, invalid or read-only; 0 where the slot ends before.
    /// May be called with mmu_lock held. Kernel: `kvm_prefetch_pages`. Spec: generic 2.11.
    public func prefetchPages(
        _ frame: GuestFrame, slot: MemorySlot?, count: Int, _ each: (Int, consuming PageReference) -> Void
    ) -> Int {
        guard let slot, !slot.isInvalid, !slot.flags.readOnly else { return -1 }
        guard frame.number + UInt64(count) <= slot.frames.upperBound.number else { return 0 }
        return addressSpace.getUserPagesFastOnly(
            slot.userAddress(of: frame), count: count, write: true, holder: .prefetch, each)
    }
}
