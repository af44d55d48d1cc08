import Audit
import Frames
import GuestMemory
import HostMemory
import Synchronization
import Synchrony

/// Huge leaves that are never executable; see `TDP/NXHugePages.swift`. Of second-stage tables: all of them, or those of
/// nested guests, which the TDP MMU's worker recovers with its own. Caller: mmu_lock for writing, unless said otherwise.
/// Spec: x86 3.11.
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
        let possible = PossibleHugePage(table: page.table, isShadow: true)
        guard isOnlyReason, !possibleHugePages.list.contains(possible) else { return }
        possibleHugePages.add(possible, vm)
    }

    /// Kernel: `unaccount_nx_huge_page`.
    func allowHugePage(_ page: ShadowPage) {
        page.isHugePageDisallowed = false
        possibleHugePages.remove(PossibleHugePage(table: page.table, isShadow: true), vm)
    }

    /// Zaps a page of the list; false: its slot is logged, and it only leaves the list: it would come back small.
    /// Kernel: a part of `kvm_recover_nx_huge_pages`.
    func endPossibleHugePage(_ table: HostFrame, _ zapped: inout ZappedPages) -> Bool {
        let page = page(of: table)
        guard slot(page.frame, page.role)?.isLogged != true else {
            allowHugePage(page)
            return false
        }
        zap(page, &zapped)
        return true
    }

    /// Whether a page of the list may stand there: it is in use, and disallowed. For checks. Spec: X42.
    func isDisallowedPage(_ table: HostFrame) -> Bool {
        var found = false
        index.forEachPage { if $0.table == table, !$0.role.isInvalid, $0.isHugePageDisallowed { found = true } }
        return found
    }

    // MARK: What the administrator does, without the TDP MMU

    /// See `VirtualMachine.changeNXHugePages`. No lock held; may sleep.
    public func setNXHugePages(_ on: Bool) {
        precondition(direct != nil, "the TDP MMU's to change, or nobody's")
        vm.changeNXHugePages(
            set: {
                defer { executesNoHugePage = on }
                return executesNoHugePage != on
            }, zapAllFast: { zapAllFast() })
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
        let count = possibleHugePages.recover(ratio: ratio) { endPossibleHugePage($0.table, &zapped) }
        commit(&zapped)
        guardian.unlock()
        vm.slotReaders.exit(side)
        return count
    }
}
