import Audit
import Frames
import GuestMemory
import HostMemory
import Synchronization
import Synchrony

/// A page that is out of sync, and the entries that lead to it, topmost first.
struct UnsyncPath {
    var page: ShadowPage
    var way: [(page: ShadowPage, index: Int)]
}

/// Guest page tables that the guest may write without KVM's knowing, until it flushes. Spec: x86 4.7.
/// Caller: mmu_lock for writing, unless said otherwise.
extension ShadowMMU {
    /// Whether an entry may let the guest write `frame`: not if it is a table above the lowest level. Tables of the lowest
    /// are out of sync from now on. Kernel: `mmu_try_to_unsync_pages`. Spec: X48, X49, X57.
    ///
    /// - Parameters:
    ///   - synchronizing: the guest's flush is being emulated: nothing may become writable underneath.
    ///   - prefetch: no guest waits for it.
    func letGuestWrite(_ frame: GuestFrame, _ slot: MemorySlot, synchronizing: Bool, prefetch: Bool) -> Bool {
        if reverseMap(slot).isTracked(frame) { return false }
        var allowed = true
        index.forEach(near: frame) { page in
            guard page.frame == frame, page.role.shadowsEntries, !isObsolete(page) else { return true }
            if synchronizing || (!page.isUnsync && prefetch) {
                allowed = false
                return false
            }
            if !page.isUnsync { loseSync(page) }
            return true
        }
        return allowed
    }

    /// Kernel: `kvm_unsync_page`.
    private func loseSync(_ page: ShadowPage) {
        precondition(
            page.role.level == 1 && !page.role.isDirect, "only a lowest table of the guest's can be unsync (X49)")
        unsyncPages.lock()
        // Another fault of a guest hypervisor's, which holds mmu_lock for reading too, may have been first.
        if !page.isUnsync {
            note(.shadowPageUnsynced, page)
            vm.statistics.mmu_unsync.add(1, ordering: .relaxed)
            page.isUnsync = true
            markParentsUnsync(page)
        }
        unsyncPages.unlock()
    }

    /// Kernel: `kvm_unlink_unsync_page`.
    func markSynced(_ page: ShadowPage) {
        note(.shadowPageSynced, page)
        page.isUnsync = false
        vm.statistics.mmu_unsync.subtract(1, ordering: .relaxed)
    }

    // MARK: Finding them

    /// Up to 16 pages below `page` that are out of sync, each once; marks that lead nowhere are taken off.
    /// Kernel: `mmu_unsync_walk`.
    func unsyncPages(below page: ShadowPage) -> [UnsyncPath] {
        guard page.unsyncChildren > 0 else { return [] }
        var found: [UnsyncPath] = []
        collect(page, [], &found)
        return found
    }

    private func collect(_ page: ShadowPage, _ way: [(page: ShadowPage, index: Int)], _ found: inout [UnsyncPath]) {
        var index = 0
        while let i = page.unsyncChild(from: index), found.count < 16 {
            index = i + 1
            let value = entry(page, i).peek()
            guard EntryBits.isTable(value, page.role.level) else {
                page.clearUnsyncChild(i)
                continue
            }
            let child = child(value)
            if child.unsyncChildren > 0 {
                let before = found.count
                collect(child, way + [(page, i)], &found)
                if found.count == before, child.unsyncChildren == 0 { page.clearUnsyncChild(i) }
            } else if child.isUnsync {
                if !found.contains(where: { $0.page === child }) {
                    found.append(UnsyncPath(page: child, way: way + [(page, i)]))
                }
            } else {
                page.clearUnsyncChild(i)
            }
        }
    }

    /// Takes off the marks on the way to a page that is in sync again. Kernel: `mmu_pages_clear_parents`.
    func clearParents(_ path: UnsyncPath) {
        for step in path.way.reversed() {
            step.page.clearUnsyncChild(step.index)
            if step.page.unsyncChildren > 0 { return }
        }
    }

    // MARK: Bringing them up to date

    /// Everything below `page`. Kernel: `mmu_sync_children`.
    func syncChildren(of page: ShadowPage, _ cpu: VirtualCPU) {
        while true {
            let found = unsyncPages(below: page)
            if found.isEmpty { return }
            // The guest must not write while its entries are read.
            var protected = false
            for path in found {
                guard let slot = slot(path.page.frame, path.page.role) else { continue }
                guard !Defect.syncUnprotected.isOn else { continue }
                if writeProtect(path.page.frame, slot, tracking: true) { protected = true }
            }
            if protected { vm.flushRemoteTLBs() }
            var flush = false
            var zapped = ZappedPages()
            for path in found {
                markSynced(path.page)
                if let changed = sync(path.page, cpu) {
                    flush = flush || changed
                } else {
                    zap(path.page, &zapped)
                }
                clearParents(path)
            }
            if !zapped.isEmpty {
                commit(&zapped)
            } else if flush, !Defect.syncUnflushed.isOn {
                vm.flushRemoteTLBs()
            }
        }
    }

    /// Reads the guest's entries again for every entry that is made. Whether TLBs must be flushed; nil: the page can't be
    /// used any more. Kernel: `kvm_sync_page`, `FNAME(sync_page)`.
    func sync(_ page: ShadowPage, _ cpu: VirtualCPU) -> Bool? {
        let state = state(of: cpu)
        guard !page.role.isDirect, page.role.canSync(under: state.role) else { return nil }
        var flush = false
        var failed = false
        for i in 0..<512 {
            switch syncEntry(page, i, cpu) {
            case .kept: break
            case .flush: flush = true
            case .failed: failed = true
            }
        }
        return failed ? nil : flush
    }

    enum Synced { case kept, flush, failed }

    /// One entry of level 1. The frame stays and no page is touched: only rights change, or the entry goes.
    /// Kernel: `FNAME(sync_spte)`. Spec: X57, X60.
    func syncEntry(_ page: ShadowPage, _ index: Int, _ cpu: VirtualCPU) -> Synced {
        let entry = entry(page, index)
        let old = entry.peek()
        guard old != EntryBits.empty else { return .kept }
        let format = state(of: cpu).format
        guard let guestEntry = readEntry(cpu, guestPlace(page, index, format), format, atomically: true) else {
            return .failed
        }
        guard format.isUsable(guestEntry), EntryBits.isPresent(old) else {
            emptyEntry(page, index)
            return EntryBits.isPresent(old) ? .flush : .kept
        }
        let frame = format.frame(guestEntry, 1)
        let rights = format.withoutWriteIfClean(page.role.access.intersection(format.rights(guestEntry)), guestEntry)
        guard frame == page.guestFrame(of: index), !format.isNothing(rights) else {
            emptyEntry(page, index)
            return .flush
        }
        if rights == page.rights(of: index) {
            if let journal = vm.memory.journal { checkRights(page, index, journal) }
            return .kept
        }
        guard let slot = slot(frame, page.role) else {
            emptyEntry(page, index)
            return .flush
        }
        page.setTranslation(index, frame, rights)
        let attributes = leafAttributes(
            LeafRequest(
                page: page, slot: slot, host: EntryBits.field.frame(in: old), frame: frame, rights: rights, old: old,
                prefetch: true, synchronizing: true,
                writable: old & bits.hostWritable != 0 || Defect.hostWriteAssumed.isOn), by: cpu
        ).attributes
        let update = EntryUpdate(set: attributes, clear: ~(EntryBits.frameMask | Self.counted | attributes))
        guard update.applied(to: old) != old else { return .kept }
        let last = exchange(entry, update, old)
        noteChange(page.place(of: index), last, update.applied(to: last))
        if let journal = vm.memory.journal {
            checkSynced(last, update.applied(to: last), frame, slot, rights, journal)
            checkRights(page, index, journal)
        }
        return last & bits.mmuWritable != 0 && attributes & bits.mmuWritable == 0 ? .flush : .kept
    }

    /// Writes an entry whose frame stays; the value that was really replaced. Hardware may set A and D meanwhile.
    func exchange(_ entry: StageTwoEntry, _ update: EntryUpdate, _ old: UInt64) -> UInt64 {
        var seen = old
        while let found = entry.apply(update, expected: seen) { seen = found }
        return seen
    }

    /// Where the guest entry behind an entry of a lowest page lies. Kernel: `FNAME(get_level1_sp_gpa)`.
    func guestPlace(_ page: ShadowPage, _ index: Int, _ format: GuestEntryFormat) -> GuestAddress {
        var number = UInt64(index)
        if page.role.has4ByteEntries { number += UInt64(page.role.quadrant) * 512 }
        return GuestAddress(page.frame.address.value + number * format.entrySize)
    }

    // MARK: The guest flushes

    /// The guest's flush of everything: afterwards no entry gives more than the guest's own do. Takes mmu_lock. Caller: the
    /// vCPU's task, outside of guest mode. Kernel: `kvm_mmu_sync_roots`. Spec: X51.
    public func syncRoots(_ cpu: VirtualCPU) {
        let state = state(of: cpu)
        guard state.format.isPaged else { return }
        syncCurrentRoot(cpu)
        dropEarlierUnsyncRoots(cpu)
    }

    func syncCurrentRoot(_ cpu: VirtualCPU) {
        let state = state(of: cpu)
        guard state.format.isPaged else { return }
        vm.withSlots {
            let guardian = vm.lockMMU()
            if let root = state.root { syncChildren(of: root.page, cpu) }
            for case let page? in state.fourRoots { syncChildren(of: page, cpu) }
            guardian.unlock()
        }
    }

    /// The guest's flush of one address. Caller as above. Kernel: `kvm_mmu_invlpg`. Spec: x86 4.7.
    public func invalidatePage(_ cpu: VirtualCPU, _ address: UInt64) {
        CPUStatistics.bump(cpu.statistics.invlpg)
        invalidate(address, cpu, earlierRoots: { _ in true })
    }

    /// Below the current root, and below those earlier ones that `isMeant` names. Kernel: `kvm_mmu_invalidate_addr`.
    func invalidate(_ address: UInt64, _ cpu: VirtualCPU, earlierRoots isMeant: (ShadowRoot) -> Bool) {
        let state = state(of: cpu)
        guard state.format.isPaged else { return }
        vm.withSlots {
            let guardian = vm.lockMMU()
            if let page = topPage(state, address) { invalidate(page, address, cpu) }
            for root in state.earlierRoots where isMeant(root) && !isObsolete(root.page) {
                invalidate(root.page, address, cpu)
            }
            guardian.unlock()
        }
        cpu.dropTranslations()
    }

    func invalidate(_ top: ShadowPage, _ address: UInt64, _ cpu: VirtualCPU) {
        var page = top
        while true {
            let i = shadowIndex(address, page.role.level)
            if page.isUnsync {
                switch syncEntry(page, i, cpu) {
                case .kept: break
                case .flush: vm.flushRemoteTLBs()
                case .failed: if emptyEntry(page, i) { vm.flushRemoteTLBs() }
                }
            }
            let value = entry(page, i).load()
            guard page.unsyncChildren > 0, EntryBits.isTable(value, page.role.level) else { return }
            page = child(value)
        }
    }

    /// Which entry of a shadow table of `level` translates `address`.
    func shadowIndex(_ address: UInt64, _ level: UInt8) -> Int { Int(address >> (12 + 9 * UInt64(level - 1)) & 511) }
}
