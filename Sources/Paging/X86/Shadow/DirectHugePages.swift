import Audit
import Frames
import GuestMemory
import HostMemory
import Synchronization
import Synchrony

/// Huge leaves of direct tables that are never executable; see `TDP/NXHugePages.swift`. Pages that shadow a guest
/// hypervisor's tables keep no account of them. Caller: mmu_lock for writing, unless said otherwise. Spec: x86 3.11.
extension ShadowMMU {
    /// Whether a fetch must not find a huge leaf.
    func disallowsHugePage(_ fault: GuestFault) -> Bool { fault.access == .execute && nxHugePages }

    /// Whether the entry points to a page that may not be replaced by a huge leaf. Kernel: `disallowed_hugepage_adjust`.
    func isDisallowed(_ page: ShadowPage, _ index: Int) -> Bool {
        guard nxHugePages, page.role.level > 1 else { return false }
        let value = entry(page, index).load()
        return EntryBits.isTable(value, page.role.level) && child(value).isHugePageDisallowed
    }

    /// A fetch has linked the page. If nothing else stands against a huge leaf it joins the list.
    /// Kernel: `account_nx_huge_page`.
    func disallowHugePage(_ page: ShadowPage, isOnlyReason: Bool) {
        page.isHugePageDisallowed = true
        guard isOnlyReason, !possibleHugePages.contains(where: { $0 === page }) else { return }
        possibleHugePages.append(page)
        vm.statistics.nx_lpage_splits.add(1, ordering: .relaxed)
    }

    /// Kernel: `unaccount_nx_huge_page`.
    func allowHugePage(_ page: ShadowPage) {
        page.isHugePageDisallowed = false
        guard let index = possibleHugePages.firstIndex(where: { $0 === page }) else { return }
        possibleHugePages.remove(at: index)
        vm.statistics.nx_lpage_splits.subtract(1, ordering: .relaxed)
    }

    /// Changes the module's parameter: whatever is mapped is mapped anew. No lock held; may sleep. Takes slots_lock.
    /// Kernel: `set_nx_huge_pages`.
    public func setNXHugePages(_ on: Bool) {
        precondition(direct != nil, "the TDP MMU's to change, or nobody's")
        vm.slotsLock.lock()
        defer { vm.slotsLock.unlock() }
        let guardian = vm.lockMMU()
        let changes = executesNoHugePage != on
        executesNoHugePage = on
        guardian.unlock()
        if changes { zapAllFast() }
    }

    /// One round of the recovery: zaps the oldest pages of the list, one in `ratio` (rounded up). Those of logged slots only
    /// leave the list. 0: none. Returns how many were zapped. No lock held; may sleep.
    /// Kernel: `kvm_recover_nx_huge_pages`.
    @discardableResult
    public func recoverNXHugePages(ratio: Int = 60) -> Int {
        guard ratio > 0 else { return 0 }
        let side = vm.slotReaders.enter()
        let guardian = vm.lockMMU()
        var zapped = ZappedPages()
        var count = 0
        var left = (possibleHugePages.count + ratio - 1) / ratio
        while left > 0, let page = possibleHugePages.first {
            left -= 1
            if slot(page.frame, page.role)?.isLogged ?? false {
                allowHugePage(page)
            } else {
                zap(page, &zapped)
                count += 1
            }
        }
        commit(&zapped)
        guardian.unlock()
        vm.slotReaders.exit(side)
        return count
    }
}
