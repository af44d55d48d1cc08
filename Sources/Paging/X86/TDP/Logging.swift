import Frames
import GuestMemory
import HostMemory
import Synchrony

/// Write protection for the dirty log. Spec: x86 3.8. MW stays, so that the lockless path may give W back.
///
/// Linux holds mmu_lock for reading in the walks over a whole slot, and gives it up now and then; here it is held for
/// writing, so that one fetch-and an entry is enough.
extension TDPMMU {
    /// How writes to the leaves of a tree are seen: D, where the processor logs the pages itself, else W.
    /// Spec: x86 3.8, X46.
    func seenBy(_ role: PageRole) -> UInt64 {
        configuration.modificationLogEntries != 0 && !role.isGuestMode ? bits.dirty : EntryBits.write
    }

    /// Logging was turned on: splits huge leaves to 4 KiB, takes D or W from every leaf and W from what is still huge,
    /// flushes once, whatever was found: an earlier protection may still wait for its flush. Takes mmu_lock.
    /// Kernel: `kvm_mmu_slot_apply_flags`.
    func startLogging(_ slot: MemorySlot) {
        let guardian = vm.lockMMU()
        for root in validRoots(of: slot.addressSpace) {
            if configuration.eagerSplit { _ = splitHugeLeaves(in: slot.frames, root, holding: guardian) }
            switch vm.policy(for: .cleared) {
            case .precise(let policy): startLogging(slot, root, policy)
            case .tracked(let policy): startLogging(slot, root, policy)
            case .guess(let policy): startLogging(slot, root, policy)
            }
        }
        guardian.unlock()
        vm.flushRemoteTLBs()
    }

    /// A write to a huge leaf must fault, to be logged for its own page alone (X39). Kernel: of PML hosts,
    /// `kvm_mmu_slot_leaf_clear_dirty` and `kvm_mmu_slot_remove_write_access` from 2 MiB on; else the latter from 4 KiB on.
    private func startLogging<P: ReferencePolicy>(_ slot: MemorySlot, _ root: HostFrame, _ policy: P) {
        let loop = LeafLoop(self)
        let lost = seenBy(role(ofRoot: root))
        for run in view(root).runs(in: slot.frames) {
            _ = loop.clear(run.level > .page4K ? lost | EntryBits.write : lost, in: run, policy)
        }
    }

    /// Takes D or W from the 4 KiB leaves of the frames that `mask` names. The caller flushes, after mmu_lock, before it
    /// tells anyone (F4, F5). A slot that began with an all-ones bitmap may still have huge leaves here: they are split,
    /// and what is huge still at the ends loses W and MW, with the same late flush (F3x). Caller holds mmu_lock for
    /// writing. Kernel: `kvm_arch_mmu_enable_log_dirty_pt_masked`.
    func protectPages(
        _ slot: MemorySlot, _ first: GuestFrame, _ mask: UInt64, holding guardian: borrowing MMUGuard
    ) {
        guard mask != 0 else { return }
        let start = first.advanced(by: mask.trailingZeroBitCount)
        let end = first.advanced(by: 64 - mask.leadingZeroBitCount)
        for root in validRoots(of: slot.addressSpace) {
            if vm.manualProtect.initiallySet {
                if configuration.eagerSplit { _ = splitHugeLeaves(in: start..<end, root, holding: guardian) }
                _ = protectLeaf(of: start, root, from: .page2M)
                _ = protectLeaf(of: end.advanced(by: -1), root, from: .page2M)
            }
            switch vm.policy(for: .cleared) {
            case .precise(let policy): protectPages(start..<end, first, mask, root, policy)
            case .tracked(let policy): protectPages(start..<end, first, mask, root, policy)
            case .guess(let policy): protectPages(start..<end, first, mask, root, policy)
            }
        }
    }

    private func protectPages<P: ReferencePolicy>(
        _ frames: Range<GuestFrame>, _ first: GuestFrame, _ mask: UInt64, _ root: HostFrame, _ policy: P
    ) {
        let loop = LeafLoop(self)
        let lost = seenBy(role(ofRoot: root))
        for run in view(root).runs(in: frames) where run.level == .page4K {
            _ = loop.clear(lost, in: run, mask: mask >> (run.base.number - first.number), policy)
        }
    }

    /// Takes W and MW from the leaf that maps `frame`, if it is `smallest` or larger: whether it had one of them. The
    /// caller flushes, also if W was gone already: an earlier loss of W may still wait for its flush (F3). Caller holds
    /// mmu_lock for writing. Kernel: `kvm_tdp_mmu_write_protect_gfn`.
    func protectLeaf(of frame: GuestFrame, _ root: HostFrame, from smallest: PageLevel) -> Bool {
        guard frame < view(root).end, let leaf = view(root).leaf(of: frame), leaf.level >= smallest else {
            return false
        }
        let run = LeafRun(
            table: leaf.table, level: leaf.level, firstIndex: leaf.index, count: 1, base: frame.aligned(to: leaf.level))
        let loop = LeafLoop(self)
        let lost = EntryBits.write | bits.mmuWritable
        switch vm.policy(for: .cleared) {
        case .precise(let policy): return loop.clear(lost, in: run, policy)
        case .tracked(let policy): return loop.clear(lost, in: run, policy)
        case .guess(let policy): return loop.clear(lost, in: run, policy)
        }
    }

    // MARK: Whole slots

    /// Takes W from every leaf of the slot; whether any had it. Takes mmu_lock, flushes.
    /// Kernel: `kvm_tdp_mmu_wrprot_slot`.
    @discardableResult
    public func writeProtect(_ slot: MemorySlot) -> Bool { clearInSlot(EntryBits.write, slot) }

    /// Takes D from every leaf of the slot, as PML hosts do (W where the hardware keeps no D); whether any had it.
    /// Takes mmu_lock, flushes. Kernel: `kvm_tdp_mmu_clear_dirty_slot`.
    @discardableResult
    public func clearDirty(_ slot: MemorySlot) -> Bool { clearInSlot(loggingBit, slot) }

    private func clearInSlot(_ lost: UInt64, _ slot: MemorySlot) -> Bool {
        let guardian = vm.lockMMU()
        let any = clearLeaves(lost, in: slot)
        guardian.unlock()
        if any { vm.flushRemoteTLBs() }
        return any
    }

    private func clearLeaves(_ lost: UInt64, in slot: MemorySlot) -> Bool {
        switch vm.policy(for: .cleared) {
        case .precise(let policy): clearLeaves(lost, in: slot, policy)
        case .tracked(let policy): clearLeaves(lost, in: slot, policy)
        case .guess(let policy): clearLeaves(lost, in: slot, policy)
        }
    }

    private func clearLeaves<P: ReferencePolicy>(_ lost: UInt64, in slot: MemorySlot, _ policy: P) -> Bool {
        let loop = LeafLoop(self)
        var any = false
        for root in validRoots(of: slot.addressSpace) {
            for run in view(root).runs(in: slot.frames) where loop.clear(lost, in: run, policy) { any = true }
        }
        return any
    }

    // MARK: Splitting

    /// Splits every huge leaf of the slot to 4 KiB. False: memory is used up, and the rest stays huge. Takes mmu_lock.
    /// Kernel: `kvm_mmu_slot_try_split_huge_pages`.
    public func splitHugeLeaves(of slot: MemorySlot) -> Bool {
        let guardian = vm.lockMMU()
        var isDone = true
        for root in validRoots(of: slot.addressSpace) {
            isDone = splitHugeLeaves(in: slot.frames, root, holding: guardian) && isDone
        }
        guardian.unlock()
        return isDone
    }

    /// Splits the huge leaves that intersect `frames` to 4 KiB. False: memory is used up, and the rest stays huge.
    /// Caller holds mmu_lock for writing. Kernel: `kvm_tdp_mmu_try_split_huge_pages`. Spec: x86 3.6.
    ///
    /// Linux drops the lock to allocate; the model's allocator never sleeps. Several tables are written, then linked: at
    /// each link the processor waits for the stores before it.
    func splitHugeLeaves(
        in frames: Range<GuestFrame>, _ root: HostFrame, holding guardian: borrowing MMUGuard
    ) -> Bool {
        let view = view(root)
        let role = role(ofRoot: root)
        let end = min(frames.upperBound, view.end)
        var found: [HugeLeaf] = []
        var isDone = true
        var cursor = frames.lowerBound
        while cursor < end, isDone {
            let position = view.descend(to: cursor, until: .page4K)
            if position.level > .page4K, view.format.isLeaf(position.value, position.level.rawValue) {
                found.append(HugeLeaf(position: position, frame: cursor))
                if found.count == 8 || position.level > .page2M {
                    isDone = split(&found, root, role, holding: guardian)
                }
                // What 1 GiB was split into is split next.
                if position.level > .page2M { continue }
            }
            let step = max(position.level, .page2M)
            cursor = GuestFrame(cursor.aligned(to: step).number + step.frames)
        }
        return split(&found, root, role, holding: guardian) && isDone
    }

    private struct HugeLeaf {
        let position: RadixPosition
        let frame: GuestFrame
    }

    /// Splits all of `leaves`, which are gone from the array then. One that has changed meanwhile, by an A or D that the
    /// processor set, is split anew. False: memory is used up.
    private func split(
        _ leaves: inout [HugeLeaf], _ root: HostFrame, _ role: PageRole, holding guardian: borrowing MMUGuard
    ) -> Bool {
        let vm = vm
        let host = vm.host
        var tables: [HostFrame] = []
        while tables.count < leaves.count, let table = host.allocateUnwrittenTable() { tables.append(table) }
        for (leaf, table) in zip(leaves, tables) {
            let seen = leaf.position.entry.observe(holding: guardian)
            write(table, at: leaf.position, leaf.frame, role, seen: seen, vm)
        }
        var isDone = tables.count == leaves.count
        for (leaf, table) in zip(leaves, tables) {
            let seen = leaf.position.entry.observe(holding: guardian)
            if linkWritten(table, at: leaf.position, leaf.frame, role, seen: seen, vm) { continue }
            host.freeTable(table)
            isDone = splitHugeLeaves(in: leaf.frame..<leaf.frame.advanced(by: 1), root, holding: guardian) && isDone
        }
        leaves.removeAll(keepingCapacity: true)
        return isDone
    }
}
