import Audit
import Frames
import Synchronization
import Synchrony

/// The advices about how much pages are needed: cold, to be paged out, free to be taken.
extension AddressSpace {
    /// Calls `body` for the part of each area in `range`, `mmapLock` held for read. Errors: EINVAL for a PFN map, for
    /// secret memory and for huge pages of a pool; ENOMEM for a hole, after the rest was done. Kernel: `can_madv_lru_vma`.
    func forEachAgeable(
        _ range: Range<UserAddress>, _ body: (VMA, Range<UserAddress>) -> Void
    ) throws(Errno) {
        try forEachPart(of: range) { (vma, part) throws(Errno) in
            if vma.flags.pfnMap || vma.flags.locked || vma.hugeFile != nil { throw .EINVAL }
            body(vma, part)
        }
    }

    /// The pages of `range` count as not used lately. No notifier: nothing that anybody relies on changes.
    /// Kernel: `madvise_cold`.
    func cool(_ range: Range<UserAddress>) {
        forEachSmall(in: range) { word, _ in
            let seen = HostEntry(word.peek())
            guard seen.mapsFrame, !seen.isSpecial else { return }
            _ = word.fetchAnd(~HostEntry.accessed)
            memory.lists?.deactivate(memory.head(of: memory.page(seen.frame)))
        }
    }

    /// Kernel: `madvise_pageout`. The pages are taken off reclaim's lists first, and evicted without the lock.
    func pageOut(_ range: Range<UserAddress>) throws(Errno) {
        var pages: [UnsafeMutablePointer<PageFrame>] = []
        let lists = memory.lists
        defer { for page in pages { _ = host.evict(page, ignoringUse: true) } }
        try forEachAgeable(range) { _, part in
            if let lists { pages += isolatePages(part, lists, mappedOnce: true) }
        }
    }

    /// Takes the pages that `range` maps off reclaim's lists, each with a reference. `mmapLock` held.
    func isolatePages(
        _ range: Range<UserAddress>, _ lists: PageLists, mappedOnce: Bool
    ) -> [UnsafeMutablePointer<PageFrame>] {
        var pages: [UnsafeMutablePointer<PageFrame>] = []
        forEachSmall(in: range) { word, _ in
            let seen = HostEntry(word.peek())
            guard seen.mapsFrame, !seen.isSpecial else { return }
            let page = memory.page(seen.frame)
            if mappedOnce {
                guard page.pointee.mapCount.load(ordering: .relaxed) == 1 else { return }
                _ = word.fetchAnd(~HostEntry.accessed)
            }
            if memory.head(of: page) == page, lists.isolate(page) { pages.append(page) }
        }
        return pages
    }

    /// Calls `body` with each small entry of `range`, huge leaves that are anonymous split before. `pageTableLock` held in
    /// `body`.
    /// - Parameter splitsZeros: those of the huge page of zeros are split too, not passed over.
    func forEachSmall(
        in range: Range<UserAddress>, splitsZeros: Bool = false, _ body: (AtomicWord, UserAddress) -> Void
    ) {
        forEachMiddle(in: range) { part, word, table in
            let seen = HostEntry(word.load())
            if seen.isLargeLeaf, !seen.isSpecial || (splitsZeros && isHugeZero(seen)) {
                splitHuge(part.lowerBound, word, table)
            }
            let now = HostEntry(word.peek())
            guard now.isPresent, !now.isLargeLeaf else { return }
            pageTableLock.lock()
            defer { pageTableLock.unlock() }
            for page in part.lowerBound.page..<part.upperBound.page {
                body(memory.entry(Int(page & 511), of: now.frame), UserAddress(page << pageShift))
            }
        }
    }

    /// The content of private anonymous pages may go: reclaim drops those that nobody writes after this, and what is on the
    /// swap device is gone at once. Kernel: `madvise_free_single_vma`. Errors: EINVAL for other memory; ENOMEM for a hole.
    func free(_ range: Range<UserAddress>) throws(Errno) {
        try forEachPart(of: range) { (vma, part) throws(Errno) in
            guard case .anonymous = vma.backing else { throw .EINVAL }
            notifyStart(part)
            forEachSmall(in: part) { word, _ in free(word) }
            notifyEnd(part)
        }
    }

    /// Kernel: `madvise_free_pte_range`. `pageTableLock` held.
    private func free(_ word: AtomicWord) {
        let seen = HostEntry(word.peek())
        if seen.isSwapped || seen.isPoison {
            word.store(0)
            if seen.isSwapped { host.swap?.release(seen.slot, memory) }
            return
        }
        guard seen.mapsFrame, !seen.isSpecial else { return }
        let page = memory.page(seen.frame)
        let flags = page.pointee.flags.load(ordering: .relaxed)
        if flags & (PageFlags.swapCache | PageFlags.anyDirty) != 0 {
            guard page.pointee.mapCount.load(ordering: .relaxed) == 1 else { return }
            if let swap = host.swap, !swap.forget(page, memory) { return }
            page.pointee.flags.bitwiseAnd(~PageFlags.anyDirty, ordering: .relaxed)
        }
        if seen.isAccessed || seen.isDirty { _ = word.fetchAnd(~(HostEntry.accessed | HostEntry.dirty)) }
        memory.lists?.markLazilyFreed(page)
    }
}
