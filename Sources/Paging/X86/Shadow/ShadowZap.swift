import Audit
import Frames
import GuestMemory
import HostMemory
import Synchronization
import Synchrony

/// Pages that nothing points to any more and that no vCPU has as its root. Kernel: `invalid_list`.
struct ZappedPages {
    fileprivate(set) var pages: [ShadowPage] = []
    var isEmpty: Bool { pages.isEmpty }
}

/// Taking shadow pages away. Caller: mmu_lock for writing. Spec: x86 4.9.
extension ShadowMMU {
    /// Takes a page out of use: its entries, the pointers to it, what its guest table suffered. A root that vCPUs still
    /// have stays until they let it go, and then comes here again. Returns how many pages left the list.
    /// Kernel: `__kvm_mmu_prepare_zap_page`.
    @discardableResult
    func zap(_ page: ShadowPage, _ zapped: inout ZappedPages) -> Int {
        note(.shadowPageZapped, page)
        Statistics.bump(vm.statistics.mmu_shadow_zapped)
        var count = zapUnsyncChildren(of: page, &zapped)
        count += unlinkChildren(of: page, &zapped)
        unlinkParents(of: page)
        if !page.role.isInvalid, page.role.shadowsEntries { unaccount(page) }
        if page.isUnsync { markSynced(page) }
        if page.isHugePageDisallowed { allowHugePage(page) }
        if page.rootCount == 0 {
            count += 1
            zapped.pages.append(page)
            index.deactivate(page)
            usedPages -= 1
            page.role.isInvalid = true
            page.flushesWhenZapped = flushCount
            return count
        }
        index.deactivate(page)
        let wasCurrent = !isObsolete(page)
        page.role.isInvalid = true
        // After the mark: whoever serves the request must find it. Spec: X35.
        if wasCurrent { vm.makeAllCPUsRequest(VirtualCPU.Request.reloadRoot) }
        return count
    }

    /// Kernel: `mmu_zap_unsync_children`.
    private func zapUnsyncChildren(of page: ShadowPage, _ zapped: inout ZappedPages) -> Int {
        guard page.role.level > 1 else { return 0 }
        var count = 0
        while true {
            let found = unsyncPages(below: page)
            if found.isEmpty { return count }
            for path in found {
                zap(path.page, &zapped)
                clearParents(path)
                count += 1
            }
        }
    }

    /// A nested guest's pages that lose their last parent go too: no other root would find them soon.
    /// Kernel: `kvm_mmu_page_unlink_children`, `mmu_page_zap_pte`.
    private func unlinkChildren(of page: ShadowPage, _ zapped: inout ZappedPages) -> Int {
        var orphans: [ShadowPage] = []
        entry(page, 0).forEachIndex(below: 512, notHolding: EntryBits.empty) { i in
            let old = entry(page, i).peek()
            _ = emptyEntry(page, i)
            guard base != nil, EntryBits.isTable(old, page.role.level) else { return }
            let child = child(old)
            if child.role.isGuestMode, child.parents.isEmpty { orphans.append(child) }
        }
        var count = 0
        for child in orphans where !child.role.isInvalid { count += zap(child, &zapped) }
        return count
    }

    /// Empties whatever an entry holds; whether it was present. Kernel: `mmu_page_zap_pte`.
    @discardableResult
    func emptyEntry(_ page: ShadowPage, _ index: Int) -> Bool {
        let old = entry(page, index).load()
        guard EntryBits.isPresent(old) else {
            _ = entry(page, index).exchange(forEmpty: EntryBits.empty)
            return false
        }
        if EntryBits.isLeaf(old, page.role.level) {
            dropLeaf(page, index)
        } else {
            unlink(page, index)
        }
        return true
    }

    private func unlinkParents(of page: ShadowPage) {
        while let place = page.parents.last {
            let (parent, index) = holder(of: place)
            unlink(parent, index)
        }
    }

    /// Frees zapped pages, after every vCPU has left guest mode: none walks them then. Kernel:
    /// `kvm_mmu_commit_zap_page`. Spec: F10, X56.
    func commit(_ zapped: inout ZappedPages) {
        guard !zapped.isEmpty else { return }
        if !Defect.freedUnflushed.isOn { vm.flushRemoteTLBs() }
        free(&zapped)
    }

    /// The second half of `commit`: the flush is over.
    func free(_ zapped: inout ZappedPages) {
        for page in zapped.pages {
            if let journal = vm.memory.journal { checkFreed(page, journal) }
            index.remove(page)
            vm.host.freeTable(page.table)
        }
        zapped.pages = []
    }

    // MARK: All of them

    /// All pages are obsolete from now on, and no vCPU goes on with one. Caller: slots_lock; takes mmu_lock.
    /// Kernel: `kvm_mmu_zap_all_fast`. Spec: x86 3.7, 4.9.
    func zapAllFast() {
        let guardian = vm.lockMMU()
        makeObsolete()
        vm.makeAllCPUsRequest(VirtualCPU.Request.reloadRoot)
        zapObsolete()
        guardian.unlock()
    }

    /// No page is found any more. The caller has all vCPUs reload their roots before it drops mmu_lock, and then takes the
    /// pages away. Under slots_lock.
    func makeObsolete() {
        note(Event(.zapAllFast, value: UInt64(generation), extra: UInt64(usedPages)))
        generation ^= 1
    }

    /// Kernel: `kvm_zap_obsolete_pages`.
    func zapObsolete() {
        var zapped = ZappedPages()
        // Oldest first; what is younger than a current page is current too. The list changes under the loop's feet.
        while let page = index.oldest, page.generation != generation, !Defect.obsoleteLeft.isOn { zap(page, &zapped) }
        commit(&zapped)
    }

    /// Newest first. Takes mmu_lock. Kernel: `kvm_mmu_zap_all`.
    func zapAll() {
        let guardian = vm.lockMMU()
        var zapped = ZappedPages()
        while let page = index.newest { zap(page, &zapped) }
        commit(&zapped)
        guardian.unlock()
    }

    // MARK: The quota

    /// Kernel: `kvm_mmu_calculate_default_mmu_pages`.
    var limit: Int { pageLimit > 0 ? pageLimit : max(64, Int(vm.pagesOfSlots / 50)) }

    /// Makes room if less than a fault may need is left: the oldest pages that are no roots go. False: there is none.
    /// Kernel: `make_mmu_pages_available`. Spec: x86 4.9.
    func makeRoom() -> Bool {
        let limit = limit
        let available = limit > usedPages ? limit - usedPages : 0
        guard available < 5 else { return true }
        var wanted = 25 - available
        var zapped = ZappedPages()
        var page = index.oldest
        while wanted > 0, let next = page {
            guard next.rootCount == 0 else {
                page = next.newer
                continue
            }
            let count = zap(next, &zapped)
            wanted -= count
            vm.statistics.mmu_recycled.add(UInt64(count), ordering: .relaxed)
            page = index.oldest
        }
        commit(&zapped)
        return limit > usedPages
    }

    /// What is mapped through a slot that goes, and the pages that shadow tables in it. The caller flushes if true.
    /// Kernel: `kvm_mmu_zap_memslot`. Spec: x86 3.7.
    func zapSlot(_ slot: MemorySlot) -> Bool {
        let flush = zapLeaves(of: slot.frames, in: slot.addressSpace)
        var shadowing: [ShadowPage] = []
        index.forEachPage {
            let isThere = $0.role.space == slot.addressSpace && slot.frames.contains($0.frame)
            if isThere, $0.role.shadowsEntries, !$0.role.isInvalid { shadowing.append($0) }
        }
        var zapped = ZappedPages()
        // One may go with another.
        for page in shadowing where !page.role.isInvalid { zap(page, &zapped) }
        commit(&zapped)
        return flush
    }

    // MARK: Leaves

    /// Kernel: `kvm_unmap_gfn_range`, for reverse maps. The caller flushes if true. Spec: F1.
    func zapLeaves(of frames: Range<GuestFrame>, in space: UInt8) -> Bool {
        var zapped = false
        forEachBlock(frames, in: space) { slot, frame, level in
            if zapLeaves(frame, level, slot) { zapped = true }
        }
        return zapped
    }

    /// Kernel: `kvm_zap_all_rmap_sptes`.
    func zapLeaves(_ frame: GuestFrame, _ level: PageLevel, _ slot: MemorySlot) -> Bool {
        let places = reverseMap(slot).entries(frame, level)
        for place in places {
            let (page, index) = holder(of: place)
            dropLeaf(page, index)
        }
        return !places.isEmpty
    }

    /// Kernel: `kvm_age_gfn`, `kvm_test_age_gfn`. Nothing is flushed: spec F6.
    func anyAccessed(_ frames: Range<GuestFrame>, in space: UInt8, clearing: Bool) -> Bool {
        var young = false
        forEachBlock(frames, in: space) { slot, frame, level in
            for place in reverseMap(slot).entries(frame, level) {
                let entry = entry(at: place)
                let old = entry.peek()
                guard old & bits.accessed != 0 else { continue }
                young = true
                guard clearing else { return }
                // Where the nested guest's tables have no A, its rights are set aside.
                let update = bits.ageing(old)
                let last = exchange(entry, update, old)
                noteChange(place, last, update.applied(to: last))
            }
        }
        return young
    }

    /// Calls `body` for every block of every level that has entries and that intersects `frames`.
    func forEachBlock(
        _ frames: Range<GuestFrame>, in space: UInt8, _ body: (MemorySlot, GuestFrame, PageLevel) -> Void
    ) {
        vm.forEachSlot(intersecting: frames, in: space) { slot in
            for level in [PageLevel.page4K, .page2M, .page1G] {
                forEachBlock(of: slot, level, in: frames) { frame in body(slot, frame, level) }
            }
        }
    }

    /// The same of one slot and one level. `body` gets the first frame of the block that lies in the slot.
    func forEachBlock(
        of slot: MemorySlot, _ level: PageLevel, in frames: Range<GuestFrame>, _ body: (GuestFrame) -> Void
    ) {
        guard knowsSlots, slot.extra != nil else { return }
        let map = reverseMap(slot)
        let end = min(slot.frames.upperBound, frames.upperBound).number
        var number = max(slot.baseFrame, frames.lowerBound).aligned(to: level).number
        while number < end {
            let frame = max(GuestFrame(number), slot.baseFrame)
            if !map.isEmpty(frame, level) { body(frame) }
            number += level.frames
        }
    }
}
