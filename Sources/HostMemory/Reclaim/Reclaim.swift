import Audit
import Frames
import Synchronization
import Synchrony

/// Making room: old pages are aged, written out, and freed. Kernel: `shrink_lruvec`, `shrink_folio_list`.
///
/// Any task that holds no lock may call it: one of the host's own (`kswapd`), or one that found no memory.
extension Host {
    /// Frees up to `pages` frames, oldest first; the accessed ones get another turn. Returns how many were freed.
    /// Passes over the lists grow until enough is found or everything was looked at twice.
    @discardableResult
    public func reclaim(pages: Int) -> Int {
        guard let lists = memory.lists else { return 0 }
        var freed = 0
        var priority = 3
        while freed < pages, priority >= 0 {
            for (active, inactive) in reclaimable() {
                deactivate(lists, active, inactive)
                freed += shrink(lists, inactive, lists.count(inactive) >> priority, pages - freed)
            }
            priority -= 1
        }
        return freed
    }

    /// For a task that found no memory, and holds no lock: whether it is worth trying again.
    /// Kernel: `__alloc_pages_direct_reclaim`.
    func makeRoom() -> Bool {
        guard memory.lists != nil, memory.freeFrames < Self.lowFrames else { return false }
        return reclaim(pages: Self.lowFrames) > 0
    }

    private static let lowFrames = 16

    /// Objects' pages first: most can be had without writing. Anonymous ones only with a place to write them to.
    private func reclaimable() -> [(PageLists.List, PageLists.List)] {
        let objects = (PageLists.List.activeObject, PageLists.List.inactiveObject)
        return swap == nil ? [objects] : [objects, (.activeAnonymous, .inactiveAnonymous)]
    }

    /// Refills the inactive list while the active one is the longer. A page that was used stays active only if it is code.
    /// Kernel: `shrink_active_list`.
    private func deactivate(_ lists: PageLists, _ active: PageLists.List, _ inactive: PageLists.List) {
        var left = lists.count(active)
        while left > 0, lists.count(active) > lists.count(inactive), let page = lists.isolateOldest(active) {
            left -= 1
            let use = testAndClearUse(page)
            if use.entries > 0, use.executable, !memory.isAnonymous(page) {
                lists.putBack(page)
            } else {
                page.pointee.flags.bitwiseAnd(~PageFlags.active, ordering: .relaxed)
                lists.putBack(page)
            }
        }
    }

    /// Kernel: `shrink_inactive_list`.
    private func shrink(_ lists: PageLists, _ list: PageLists.List, _ most: Int, _ wanted: Int) -> Int {
        var freed = 0
        var left = max(most, 1)
        while left > 0, freed < wanted, let page = lists.isolateOldest(list) {
            left -= 1
            if evict(page, ignoringUse: false) { freed += memory.pageCount(page) }
        }
        return freed
    }

    private enum Verdict { case evict, keep, activate }

    /// Kernel: `folio_check_references`.
    private func judge(_ page: UnsafeMutablePointer<PageFrame>) -> Verdict {
        let use = testAndClearUse(page)
        let marks = PageFlags.referenced | PageFlags.anyAccessed
        let marked = page.pointee.flags.bitwiseAnd(~marks, ordering: .relaxed).oldValue & marks != 0
        guard use.entries > 0 else { return .evict }
        page.pointee.flags.bitwiseOr(PageFlags.referenced, ordering: .relaxed)
        if marked || use.entries > 1 { return .activate }
        return use.executable && !memory.isAnonymous(page) ? .activate : .keep
    }

    /// Frees an isolated page if it can be done; else it goes back to its list. The reference is gone either way.
    /// - Parameter ignoringUse: also if it was accessed lately.
    func evict(_ page: UnsafeMutablePointer<PageFrame>, ignoringUse: Bool) -> Bool {
        guard let lists = memory.lists else { return false }
        if !ignoringUse {
            switch judge(page) {
            case .evict: break
            case .keep:
                lists.putBack(page)
                return false
            case .activate:
                page.pointee.flags.bitwiseOr(PageFlags.active, ordering: .relaxed)
                lists.putBack(page)
                return false
            }
        }
        // A large folio is made small first; its parts are as old, and come next.
        if page.pointee.flags.load(ordering: .relaxed) & PageFlags.head != 0 {
            splitFolio(page)
            return false
        }
        if memory.isAnonymous(page) { return evictAnonymous(page, lists) }
        let gone =
            lists.withObject(of: page) { object, index in object.evict(page, index, isAsked: ignoringUse) } ?? false
        if !gone { lists.putBack(page) }
        return gone
    }

    private func evictAnonymous(_ page: UnsafeMutablePointer<PageFrame>, _ lists: PageLists) -> Bool {
        let flags = page.pointee.flags.load(ordering: .relaxed)
        if flags & PageFlags.lazilyFreed != 0 { return drop(page, lists) }
        guard let swap, !memory.maybePinned(page), let slot = swap.hold(page, memory) else {
            page.pointee.flags.bitwiseOr(PageFlags.active, ordering: .relaxed)
            lists.putBack(page)
            return false
        }
        // Where nothing names the slot by then it isn't needed.
        defer { swap.release(slot, memory) }
        guard unmap(anonymous: page, leaving: .swap(swap, slot)) else {
            page.pointee.flags.bitwiseOr(PageFlags.active, ordering: .relaxed)
            lists.putBack(page)
            return false
        }
        if writeOut(page, swap, slot), swap.evict(page, memory) { return true }
        lists.putBack(page)
        return false
    }

    /// Makes what the slot holds equal to the page. Kernel: `pageout`.
    private func writeOut(_ page: UnsafeMutablePointer<PageFrame>, _ swap: SwapDevice, _ slot: Int) -> Bool {
        let old = page.pointee.flags.bitwiseAnd(~PageFlags.anyDirty, ordering: .relaxed).oldValue
        if swap.isWritten(slot), old & PageFlags.anyDirty == 0 { return true }
        if swap.write(slot, from: memory.frame(of: page), memory) { return true }
        page.pointee.flags.bitwiseOr(old & PageFlags.anyDirty, ordering: .relaxed)
        return false
    }

    /// A page whose content was given up. If it was written since, it is an ordinary page again.
    private func drop(_ page: UnsafeMutablePointer<PageFrame>, _ lists: PageLists) -> Bool {
        if unmap(anonymous: page, leaving: .nothing), memory.freeze(page, at: 1) {
            memory.freeFolio(page)
            return true
        }
        page.pointee.flags.bitwiseAnd(~PageFlags.lazilyFreed, ordering: .relaxed)
        page.pointee.flags.bitwiseOr(PageFlags.active, ordering: .relaxed)
        lists.putBack(page)
        return false
    }
}

extension PhysicalMemory {
    /// 4 KiB pages of the folio.
    func pageCount(_ head: UnsafeMutablePointer<PageFrame>) -> Int {
        head.pointee.flags.load(ordering: .relaxed) & PageFlags.head != 0 ? 1 << Int(head.pointee.order) : 1
    }

    /// Takes the count to 0 if it is `expected`, so that nobody can take a reference. Kernel: `folio_ref_freeze`.
    func freeze(_ page: UnsafeMutablePointer<PageFrame>, at expected: Int32) -> Bool {
        schedulingPoint(.pagePut, frame(of: page).physicalAddress)
        return page.pointee.referenceCount.compareExchange(
            expected: expected, desired: 0, ordering: .acquiringAndReleasing
        ).exchanged
    }
}
