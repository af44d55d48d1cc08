import Audit
import Frames
import GuestMemory
import HostMemory
import Synchrony

/// Removing what is mapped. Spec: x86 3.7.
///
/// The loops over entries exist once for each policy, so that `precise`, which does nothing for an entry, pays nothing:
/// one atomic instruction for a present entry, counts kept for a whole run.
extension TDPMMU {
    // MARK: The notifier, and a single slot

    /// Removes every leaf that intersects `frames`, from invalid roots too, since they are still walked by notifiers
    /// and may hold the frames back (X11). Whether TLBs must be flushed: an invalid root is in nobody's TLB.
    /// Caller holds mmu_lock for writing. Kernel: `kvm_tdp_mmu_unmap_gfn_range`.
    ///
    /// Linux gives the lock up now and then if the notifier may block; this does not.
    func zapLeaves(of frames: Range<GuestFrame>, in space: UInt8) -> Bool {
        var flush = false
        for root in roots(of: space) where zapLeaves(of: frames, root) > 0 && isValid(root) { flush = true }
        return flush
    }

    /// Removes everything that is mapped; the tables stay. Returns how many leaves. Takes mmu_lock, flushes.
    /// Kernel: `kvm_tdp_mmu_zap_leafs` over all of memory, as `kvm_zap_gfn_range` uses it.
    @discardableResult
    public func zapAllLeaves() -> Int {
        let guardian = vm.lockMMU()
        var count = 0
        for root in allRoots { count += zapLeaves(of: GuestFrame(0)..<view(root).end, root) }
        if count > 0 { vm.flushRemoteTLBs() }
        guardian.unlock()
        return count
    }

    /// Ends what is mapped through a slot that is being deleted or moved. Takes mmu_lock; may sleep. By default all
    /// roots go: the quirk `SLOT_ZAP_ALL`. Kernel: `kvm_arch_flush_shadow_memslot`. Spec: x86 3.7.
    func removeSlot(_ slot: MemorySlot) {
        guard zapsOnlySlot else {
            replaceRoots()
            return freeRemovedTables()
        }
        let guardian = vm.lockMMU()
        let isNestedZapped = nested?.zapSlot(slot) ?? false
        if zapLeaves(of: slot.frames, in: slot.addressSpace) || isNestedZapped { vm.flushRemoteTLBs() }
        guardian.unlock()
    }

    private func zapLeaves(of frames: Range<GuestFrame>, _ root: HostFrame) -> Int {
        switch vm.policy {
        case .precise(let policy): zapLeaves(of: frames, root, policy)
        case .tracked(let policy): zapLeaves(of: frames, root, policy)
        case .guess(let policy): zapLeaves(of: frames, root, policy)
        }
    }

    private func zapLeaves<P: ReferencePolicy>(of frames: Range<GuestFrame>, _ root: HostFrame, _ policy: P) -> Int {
        let loop = LeafLoop(self)
        var count = 0
        for run in view(root).runs(in: frames) { count += loop.zap(run, policy, shared: false) }
        return count
    }

    // MARK: Whole roots

    /// Empties every root and unlinks its tables. No vCPU runs guest code on them again without a new translation: the
    /// vCPUs are kicked here if the VM goes on. Takes mmu_lock for writing. Kernel: `kvm_tdp_mmu_zap_all`.
    ///
    /// Linux does not flush (Spec: F17), because the process is gone with its last vCPU; a vCPU of the model may outlive
    /// its address space.
    func zapAllRoots() {
        let guardian = vm.lockMMU()
        let section = tables.enter()
        for root in allRoots {
            let first = StageTwoEntry(vm.memory.entry(0, of: root), EntryBits.field)
            first.forEachIndex(below: 512, notHolding: EntryBits.empty) { i in
                let old = first.following(i).exchange(forEmpty: EntryBits.empty)
                precondition(EntryBits.isTable(old, configuration.levels), "a root holds nothing but tables")
                remove(EntryBits.field.frame(in: old), exclusive: true)
            }
        }
        vm.flushRemoteTLBs()
        tables.exit(section)
        guardian.unlock()
    }

    /// Empties a root that no vCPU uses, from the leaves up, so that removing a table is never more than 512 entries of
    /// work for each table. Gives the lock up after each batch. Kernel: `tdp_mmu_zap_root`. Spec: x86 3.7.
    func emptyInvalidRoot(_ root: HostFrame) {
        var cursor: GuestFrame? = GuestFrame(0)
        while let start = cursor {
            let guardian = vm.lockMMUForRead()
            let section = tables.enter()
            cursor = zapSomeLeaves(of: root, from: start, shared: true)
            tables.exit(section)
            guardian.unlock()
        }
        for level in UInt8(2)...configuration.levels {
            cursor = GuestFrame(0)
            while let start = cursor {
                let guardian = vm.lockMMUForRead()
                let section = tables.enter()
                cursor = unlinkSomeTables(of: root, at: PageLevel(level), from: start)
                tables.exit(section)
                guardian.unlock()
            }
        }
    }

    /// Tables or runs between two chances for others to take the lock.
    private static var batch: Int { 64 }

    /// Zaps the leaves of up to `batch` runs; where to go on, or nil at the end. Caller: mmu_lock, in a section.
    private func zapSomeLeaves(of root: HostFrame, from start: GuestFrame, shared: Bool) -> GuestFrame? {
        switch vm.policy {
        case .precise(let policy): zapSomeLeaves(of: root, from: start, shared: shared, policy)
        case .tracked(let policy): zapSomeLeaves(of: root, from: start, shared: shared, policy)
        case .guess(let policy): zapSomeLeaves(of: root, from: start, shared: shared, policy)
        }
    }

    private func zapSomeLeaves<P: ReferencePolicy>(
        of root: HostFrame, from start: GuestFrame, shared: Bool, _ policy: P
    ) -> GuestFrame? {
        let loop = LeafLoop(self)
        let view = view(root)
        var runs = view.runs(in: start..<view.end)
        for _ in 0..<Self.batch {
            guard let run = runs.next() else { return nil }
            _ = loop.zap(run, policy, shared: shared)
        }
        return runs.cursor
    }

    /// Unlinks and removes up to `batch` tables that hang from entries of `level`; as above.
    private func unlinkSomeTables(of root: HostFrame, at level: PageLevel, from start: GuestFrame) -> GuestFrame? {
        let view = view(root)
        var cursor = start
        var left = Self.batch
        while cursor < view.end {
            if left == 0 { return cursor }
            let position = view.descend(to: cursor, until: level)
            let base = cursor.aligned(to: position.level).number
            guard position.level == level, view.format.isTable(position.value, level.rawValue) else {
                cursor = GuestFrame(base + UInt64(view.empties(from: position)) * position.level.frames)
                continue
            }
            cursor = GuestFrame(base + position.level.frames)
            left -= 1
            unlink(position)
        }
        return nil
    }

    private func unlink(_ position: RadixPosition) {
        var seen = position.value
        // The processor may set A in the link meanwhile.
        while let now = position.entry.clear(to: EntryBits.empty, expected: seen) {
            guard EntryBits.isTable(now, position.level.rawValue) else { return }
            seen = now
        }
        remove(EntryBits.field.frame(in: seen))
    }

    // MARK: Looking

    /// Calls `body` for each present leaf, with nobody else running.
    func visitLeaves(of root: HostFrame, _ body: (StageTwoLeaf) -> Void) {
        let space = info(ofRoot: root).space
        for run in view(root).runs(in: GuestFrame(0)..<view(root).end) {
            let first = StageTwoEntry(vm.memory.entry(run.firstIndex, of: run.table), EntryBits.field)
            for i in 0..<run.count {
                let entry = first.following(i).peek()
                guard EntryBits.isLeaf(entry, run.level.rawValue) else { continue }
                body(
                    StageTwoLeaf(
                        guestFrame: GuestFrame(run.base.number + UInt64(i) * run.level.frames), space: space,
                        frame: EntryBits.field.frame(in: entry), level: run.level,
                        writable: entry & EntryBits.write != 0,
                        accessed: entry & bits.accessed != 0, dirty: entry & bits.dirty != 0, entry: entry))
            }
        }
    }
}
