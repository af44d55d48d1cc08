import Audit
import Frames
import GuestMemory
import HostMemory
import Synchronization
import Synchrony

/// Huge leaves that are never executable, against a processor that stops with a machine check when it fetches through a
/// huge page whose size changes. What the guest executes is mapped by 4 KiB. Kernel: `nx_huge_pages`. Spec: x86 3.11.
///
/// A table that such a fetch has made is *disallowed*: no huge leaf takes its place, or fetches and writes would undo each
/// other's mapping for ever. If nothing else stands against a huge leaf it is on a list, oldest first, from which the
/// recovery takes it now and then: perhaps the guest executes there no more. Tables for nested guests are on the same list.
extension TDPMMU {
    /// Whether a fetch must not find a huge leaf. Caller holds mmu_lock.
    func disallowsHugePage(_ fault: GuestFault) -> Bool { fault.access == .execute && nxHugePages }

    /// Whether the table at `position` may not be replaced by a huge leaf. Kernel: `disallowed_hugepage_adjust`. Caller:
    /// mmu_lock, in a section.
    func isDisallowed(_ position: RadixPosition) -> Bool {
        guard nxHugePages, EntryBits.isTable(position.value, position.level.rawValue) else { return false }
        return isDisallowedTable(at: position)
    }

    @inline(never)
    private func isDisallowedTable(at position: RadixPosition) -> Bool {
        TableInfo(vm.host.tableWords(EntryBits.field.frame(in: position.value))).isDisallowed
    }

    /// A fetch has linked `table`, and but for that it could be a huge leaf. Whoever has removed it meanwhile has also
    /// taken its mark, under `pages`. Kernel: `track_possible_nx_huge_page`.
    func trackPossibleHugePage(_ table: HostFrame) {
        pages.lock()
        defer { pages.unlock() }
        guard TableInfo(vm.host.tableWords(table)).isDisallowed else { return }
        possibleHugePages.add(PossibleHugePage(table: table, isShadow: false), vm)
    }

    /// The table is no longer disallowed. Caller holds `pages`. Kernel: `unaccount_nx_huge_page`.
    func allowHugePage(_ table: HostFrame) {
        let words = vm.host.tableWords(table)
        guard TableInfo(words).isDisallowed else { return }
        vm.host.setTableWords(table, words.0 & ~TableInfo.disallowed, words.1)
        possibleHugePages.remove(PossibleHugePage(table: table, isShadow: false), vm)
    }

    // MARK: What the administrator does

    /// See `VirtualMachine.changeNXHugePages`: nested guests' pages go too. No lock held; may sleep.
    public func setNXHugePages(_ on: Bool) {
        vm.changeNXHugePages(
            set: {
                defer { nxHugePages = on }
                return nxHugePages != on
            },
            zapAllFast: {
                replaceRoots()
                freeRemovedTables()
            })
    }

    /// One round of the recovery: unlinks the oldest tables, one in `ratio` (rounded up), so that the next fault may map
    /// a huge page, and zaps those of nested guests. Those of logged slots only leave the list: they would come back small.
    /// 0: none. Returns how many are gone. No lock held; may sleep. Kernel: `kvm_recover_nx_huge_pages`, which a worker calls
    /// once in a while.
    @discardableResult
    public func recoverNXHugePages(ratio: Int = 60) -> Int {
        guard ratio > 0 else { return 0 }
        let side = vm.slotReaders.enter()
        let guardian = vm.lockMMU()
        let section = tables.enter()
        var zapped = ZappedPages()
        let count = possibleHugePages.recover(ratio: ratio) {
            guard $0.isShadow, let nested else { return unlinkOrAllow($0.table) }
            return nested.endPossibleHugePage($0.table, &zapped)
        }
        // Before the section ends, and before a page is freed: of both kinds at once (F10, X30, X56).
        if count > 0 { vm.flushRemoteTLBs() }
        nested?.free(&zapped)
        tables.exit(section)
        guardian.unlock()
        vm.slotReaders.exit(side)
        freeRemovedTables()
        return count
    }

    /// Whether the table was unlinked. Kernel: `kvm_tdp_mmu_zap_sp`. Caller: mmu_lock for writing, in a section.
    private func unlinkOrAllow(_ table: HostFrame) -> Bool {
        let info = TableInfo(vm.host.tableWords(table))
        if let slot = vm.slot(containing: info.base, in: info.role.space), slot.isLogged {
            pages.lock()
            allowHugePage(table)
            pages.unlock()
            return false
        }
        let (above, index) = (HostFrame(info.parent >> pageShift), Int(info.parent & (pageSize - 1)) / 8)
        let parent = StageTwoEntry(vm.memory.entry(index, of: above), EntryBits.field)
        checkExclusive()
        let old = parent.exchange(forEmpty: EntryBits.empty)
        precondition(EntryBits.field.frame(in: old) == table, "a table does not hang where it says (X29)")
        remove(table, exclusive: true)
        return true
    }
}
