import Audit
import Frames
import GuestMemory
import HostMemory
import Synchrony

/// Finding, making and linking shadow pages. Caller: mmu_lock for writing. Spec: x86 4.1, 4.2.
extension ShadowMMU {
    /// The page for `frame` and `role`, found or made. Kernel: `kvm_mmu_get_shadow_page`.
    ///
    /// Another page of the same guest table that is out of sync is zapped, if the wanted one has a higher level: the table
    /// is about to be write-protected. One that is found out of sync is brought up to date here, without being marked so.
    func page(_ frame: GuestFrame, _ role: PageRole, _ cpu: VirtualCPU) -> ShadowPage {
        var zapped = ZappedPages()
        let (found, collisions) = find(frame, role, cpu, &zapped)
        commit(&zapped)
        Statistics.raise(vm.statistics.max_mmu_page_hash_collisions, to: UInt64(collisions))
        let page = found ?? make(frame, role, cpu)
        note(.shadowPageTaken, page, isNew: found == nil)
        return page
    }

    private func find(
        _ frame: GuestFrame, _ role: PageRole, _ cpu: VirtualCPU, _ zapped: inout ZappedPages
    ) -> (ShadowPage?, collisions: Int) {
        var collisions = 0
        var candidates: [ShadowPage] = []
        index.forEach(near: frame) { page in
            if isObsolete(page) { return true }
            if page.frame == frame { candidates.append(page) } else { collisions += 1 }
            return page.frame != frame || page.role != role
        }
        for page in candidates {
            guard page.role == role else {
                if role.level > 1, page.isUnsync { zap(page, &zapped) }
                continue
            }
            if role.isDirect { return (page, collisions) }
            if page.isUnsync {
                guard let flush = sync(page, cpu) else {
                    zap(page, &zapped)
                    break
                }
                if flush { vm.flushRemoteTLBs() }
            }
            page.floods = 0
            return (page, collisions)
        }
        Statistics.bump(vm.statistics.mmu_cache_miss)
        return (nil, collisions)
    }

    /// Kernel: `is_obsolete_sp`, and pages that are zapped already.
    func isObsolete(_ page: ShadowPage) -> Bool { page.role.isInvalid || page.generation != generation }

    private func make(_ frame: GuestFrame, _ role: PageRole, _ cpu: VirtualCPU) -> ShadowPage {
        let state = state(of: cpu)
        guard let table = state.stock.popLast() else { preconditionFailure("no table in reserve") }
        let page = ShadowPage(frame, role, table: table, generation: generation)
        vm.host.setTableWords(table, UInt64(UInt(bitPattern: Unmanaged.passUnretained(page).toOpaque())), 0)
        index.add(page)
        usedPages += 1
        pagesMade += 1
        page.serial = pagesMade
        if role.shadowsEntries { account(page) }
        return page
    }

    /// The guest's table is shadowed from now on: it can't be mapped by a large page, and not for writing unless the page
    /// is out of sync. Kernel: `account_shadowed`. Spec: X41, X48.
    private func account(_ page: ShadowPage) {
        indirectPages += 1
        guard let slot = slot(page.frame, page.role) else { return }
        slot.largePages?.add(1, at: page.frame)
        if page.role.level > 1 { reverseMap(slot).add(1, page.frame) }
        if writeProtect(page.frame, slot, tracking: true), !Defect.shadowedUnflushed.isOn { vm.flushRemoteTLBs() }
    }

    /// Kernel: `unaccount_shadowed`.
    func unaccount(_ page: ShadowPage) {
        indirectPages -= 1
        guard let slot = slot(page.frame, page.role) else { return }
        slot.largePages?.add(-1, at: page.frame)
        if page.role.level > 1 { reverseMap(slot).add(-1, page.frame) }
    }

    // MARK: Linking

    /// What the child of an entry is to be. Kernel: `kvm_mmu_child_role`.
    func childRole(_ parent: ShadowPage, _ index: Int, direct: Bool, _ rights: Rights) -> PageRole {
        var role = parent.role
        role.level -= 1
        role.access = rights
        role.isDirect = direct
        role.isPassthrough = false
        // A guest table of 1024 entries is shadowed by two pages.
        if role.has4ByteEntries { role.quadrant = UInt8(index & 1) }
        return role
    }

    /// The page for an entry, unless it is linked there. Another may be, if the guest's entry was changed from outside of
    /// the guest, which nobody told KVM. Kernel: `kvm_mmu_get_child_sp`.
    func child(
        _ parent: ShadowPage, _ index: Int, _ frame: GuestFrame, direct: Bool, _ rights: Rights, _ cpu: VirtualCPU
    ) -> ShadowPage? {
        let role = childRole(parent, index, direct: direct, rights)
        let old = entry(parent, index).load()
        if EntryBits.isTable(old, parent.role.level) {
            let linked = child(old)
            if linked.frame == frame, linked.role == role { return nil }
        }
        return page(frame, role, cpu)
    }

    /// Points an entry to a page. What stands there, a large leaf most likely, goes first, and from all TLBs.
    /// Kernel: `link_shadow_page`. Spec: F9, X50.
    func link(_ page: ShadowPage, _ parent: ShadowPage, _ index: Int) {
        let entry = entry(parent, index)
        let old = entry.load()
        if emptyEntry(parent, index) { vm.flushRemoteTLBs() }
        let attributes = bits.link(adDisabled: page.role.accessDirtyDisabled)
        let found = entry.link(vm.host.table(page.table), attributes: attributes, expected: entry.peek())
        precondition(found == nil, "an entry changed under mmu_lock")
        page.addParent(parent.place(of: index))
        note(
            Event(
                .tableLinked, frame: page.table, guest: parent.guestFrame(of: index).number, level: parent.role.level,
                value: attributes | EntryBits.field.bits(for: page.table), extra: old))
        if page.isUnsync || page.unsyncChildren > 0, !Defect.unsyncUnmarked.isOn { markUnsync(parent, index) }
    }

    /// Marks an entry, and those above it, as having something out of sync below. Kernel: `mark_unsync`.
    func markUnsync(_ page: ShadowPage, _ index: Int) {
        guard page.setUnsyncChild(index), page.unsyncChildren == 1 else { return }
        markParentsUnsync(page)
    }

    func markParentsUnsync(_ page: ShadowPage) {
        for place in page.parents {
            let (parent, index) = holder(of: place)
            markUnsync(parent, index)
        }
    }

    // MARK: Leaves and the reverse map

    /// Puts the leaf into the reverse map of its frame; a chain that has grown beyond all measure goes as a whole.
    /// Kernel: `rmap_add`. Spec: F13.
    func addToMap(_ page: ShadowPage, _ index: Int, _ frame: GuestFrame, _ slot: MemorySlot) {
        vm.statistics.addPages(level: page.role.level, 1)
        let before = reverseMap(slot).add(page.place(of: index), frame, page.level)
        Statistics.raise(vm.statistics.max_mmu_rmap_size, to: UInt64(before))
        guard before > longestChain else { return }
        _ = zapLeaves(frame, page.level, slot)
        vm.flushRemoteTLBs()
    }

    /// Empties a leaf, and takes it out of the reverse map. The caller flushes. Kernel: `drop_spte`.
    func dropLeaf(_ page: ShadowPage, _ index: Int) {
        let old = entry(page, index).exchange(forEmpty: EntryBits.empty)
        let frame = page.guestFrame(of: index)
        if let slot = slot(frame, page.role), !reverseMap(slot).remove(page.place(of: index), frame, page.level) {
            leafNotFound(old, frame)
        }
        vm.statistics.addPages(level: page.role.level, -1)
        markPage(of: old)
        note(
            Event(
                .entryZapped, frame: EntryBits.field.frame(in: old), guest: frame.number, level: page.role.level,
                value: EntryBits.empty, extra: old))
    }

    /// A leaf goes that was in no reverse map. Linux ends the VM there; here it is a finding where a journal listens, and
    /// stops else. Spec: X53.
    private func leafNotFound(_ leaf: UInt64, _ frame: GuestFrame) {
        guard let journal = vm.memory.journal else { preconditionFailure("an entry is in no reverse map (X53)") }
        journal.add(
            Finding(
                .x53, "a leaf goes that was not in the reverse map of its frame",
                frame: EntryBits.field.frame(in: leaf), guest: frame))
    }

    /// The old policies mark the page when its leaf goes. Spec: x86 0.1 (E0), generic 10.1, 10.2.
    private func markPage(of leaf: UInt64) {
        let frame = EntryBits.field.frame(in: leaf)
        let (accessed, dirty) = (leaf & bits.accessed != 0, leaf & bits.dirty != 0)
        switch vm.policy {
        case .precise: break
        case .tracked(let policy):
            policy.leafRemoved(frame, counted: leaf & Self.counted != 0, accessed: accessed, dirty: dirty)
        case .guess(let policy): policy.leafRemoved(frame, counted: false, accessed: accessed, dirty: dirty)
        }
    }

    /// Empties an entry that points to a page. The caller flushes. Kernel: `drop_parent_pte`.
    func unlink(_ parent: ShadowPage, _ index: Int) {
        let old = entry(parent, index).exchange(forEmpty: EntryBits.empty)
        child(old).removeParent(parent.place(of: index))
        note(
            Event(
                .tableRemoved, frame: EntryBits.field.frame(in: old), guest: parent.guestFrame(of: index).number,
                level: parent.role.level - 1))
    }

    /// Takes W from every entry that maps `frame`; while its table is tracked MW too, so that no fast path gives it back.
    /// Whether TLBs must be flushed: also if only MW went, for an earlier loss of W may not be flushed yet.
    /// Kernel: `kvm_mmu_slot_gfn_write_protect`. Spec: F3, F4.
    func writeProtect(_ frame: GuestFrame, _ slot: MemorySlot, tracking: Bool, from smallest: PageLevel = .page4K)
        -> Bool
    {
        var changed = false
        // Of both kinds of tables: a guest hypervisor writes through the other.
        for level in [PageLevel.page4K, .page2M, .page1G] where level >= smallest {
            for place in reverseMap(slot).entries(frame, level) where protect(at: place, tracking: tracking) {
                changed = true
            }
        }
        if let base {
            for root in base.validRoots(of: slot.addressSpace) where base.protectLeaf(of: frame, root, from: smallest) {
                changed = true
            }
        }
        return changed
    }

    /// Kernel: `spte_write_protect`.
    func protect(at place: UInt64, tracking: Bool) -> Bool {
        let entry = entry(at: place)
        let old = entry.peek()
        let taken = EntryBits.write | (tracking ? bits.mmuWritable : 0)
        guard old & taken != 0 else { return false }
        let last = entry.clear(bits: taken)
        noteChange(place, last, last & ~taken)
        return last & EntryBits.write != 0 || !Defect.protectionUnflushed.isOn
    }

    func noteChange(_ place: UInt64, _ old: UInt64, _ new: UInt64) {
        guard let journal = vm.memory.journal else { return }
        let (page, index) = holder(of: place)
        journal.record(
            Event(
                .entryChanged, frame: EntryBits.field.frame(in: new),
                guest: page.guestFrame(of: index).number, level: page.role.level, value: new, extra: old))
    }
}
