import Frames
import GuestMemory
import HostMemory
import Synchrony

/// Neighbours of a leaf that was just made. Nothing sleeps: what is not there is left out. Caller: mmu_lock for writing.
/// Kernel: `FNAME(pte_prefetch)`, `__direct_pte_prefetch`. Spec: x86 4.5.
extension ShadowMMU {
    func prefetch(
        _ page: ShadowPage, _ index: Int, _ walk: GuestWalk, _ cpu: VirtualCPU, holding guardian: borrowing MMUGuard
    ) {
        guard page.role.level == 1, let permit = guardian.prefetchPermit() else { return }
        // A page without A can't say which of its leaves nobody uses. Kernel: `sp_ad_disabled` in `direct_pte_prefetch`.
        if direct != nil, page.role.accessDirtyDisabled { return }
        if page.role.isDirect {
            prefetchDirect(page, index, cpu, permit)
        } else if walk.neighbours.count == 8 {
            prefetchShadowed(page, index, walk.neighbours, cpu, permit)
        }
    }

    /// Each run of empty entries among the eight, in ascending order.
    private func prefetchDirect(_ page: ShadowPage, _ index: Int, _ cpu: VirtualCPU, _ permit: borrowing PrefetchPermit)
    {
        let first = index & ~7
        var start: Int?
        for i in first..<first + 8 {
            if i == index || EntryBits.isPresent(entry(page, i).peek()) {
                if let begin = start {
                    guard prefetchRun(page, begin..<i, page.role.access, cpu, permit) else { return }
                }
                start = nil
            } else if start == nil {
                start = i
            }
        }
        if let begin = start { _ = prefetchRun(page, begin..<first + 8, page.role.access, cpu, permit) }
    }

    private func prefetchShadowed(
        _ page: ShadowPage, _ index: Int, _ neighbours: [UInt64], _ cpu: VirtualCPU, _ permit: borrowing PrefetchPermit
    ) {
        let format = state(of: cpu).format
        let first = index & ~7
        for i in first..<first + 8 where i != index && !EntryBits.isPresent(entry(page, i).peek()) {
            let guestEntry = neighbours[i - first]
            guard format.isUsable(guestEntry) else {
                emptyEntry(page, i)
                return
            }
            let rights = format.withoutWriteIfClean(
                page.role.access.intersection(format.rights(guestEntry)), guestEntry)
            // KVM makes an entry of EPT's that permits nothing; it helps nobody, and looks like one whose rights are set aside.
            if format.isNothing(rights) { continue }
            page.setTranslation(i, format.frame(guestEntry, 1), rights)
            guard prefetchRun(page, i..<i + 1, rights, cpu, permit) else { return }
        }
    }

    /// Maps what pages there are for a run of empty entries. False: none; nothing further need be tried.
    /// Kernel: `kvm_mmu_prefetch_sptes`.
    private func prefetchRun(
        _ page: ShadowPage, _ run: Range<Int>, _ rights: Rights, _ cpu: VirtualCPU, _ permit: borrowing PrefetchPermit
    ) -> Bool {
        let frame = page.guestFrame(of: run.lowerBound)
        guard let slot = cpu.slot(containing: frame), !slot.isInvalid else { return false }
        // Kernel: `gfn_to_memslot_dirty_bitmap`.
        if rights.contains(.write), slot.isLogged { return false }
        let permit = copy permit
        let count = vm.prefetchPages(frame, slot: slot, count: run.count) { i, found in
            let install = permit.permit(for: found, at: GuestFrame(frame.number + UInt64(i)))
            _ = setLeaf(install, page, run.lowerBound + i, slot, rights, nil, by: cpu)
            let isUnmarked = page.role.isDirect && SeriesPatch.prefetchedIsAccessed.isUndone
            if isUnmarked { found.releaseUnused() } else { found.releaseDirty(stabilisedBy: .mmuLock) }
        }
        return count > 0
    }
}
