import Audit
import Frames
import GuestMemory
import HostMemory
import Synchrony

/// Huge pages come back, in place, after dirty logging. Kernel: `kvm_tdp_mmu_recover_huge_pages`. Spec: x86 3.10, E2.
///
/// It is the one place that maps frames without a permit, and it cannot name one: the huge leaf takes its frame from a
/// leaf of the table that it replaces, which `StageTwoEntry.replaceTable` rounds down.
extension TDPMMU {
    /// Replaces each table whose block can be a huge leaf by that leaf. Takes mmu_lock for reading and gives it up
    /// between batches, each with its flush while still inside the section, so that the tables are freed after both
    /// (F8, X30). May sleep. Returns how many.
    @discardableResult
    public func recoverHugePages(_ slot: MemorySlot) -> Int {
        guard !slot.isLogged else { return 0 }
        var count = 0
        for level in UInt8(2)...3 where PageLevel(level) <= largestPage {
            for root in roots(of: slot.addressSpace) { count += recover(root, slot, PageLevel(level)) }
        }
        freeRemovedTables()
        return count
    }

    private func recover(_ root: HostFrame, _ slot: MemorySlot, _ level: PageLevel) -> Int {
        var count = 0
        var cursor: GuestFrame? = slot.baseFrame
        while let start = cursor {
            let guardian = vm.lockMMUForRead()
            let section = tables.enter()
            // A root found before may be gone by now: whoever is on the list has a reference while the lock is held.
            let (recovered, next) =
                isListedAndValid(root) ? recoverSome(root, slot, level, from: start, holding: guardian) : (0, nil)
            if recovered > 0 { vm.flushRemoteTLBs() }
            tables.exit(section)
            guardian.unlock()
            count += recovered
            cursor = next
        }
        return count
    }

    private func isListedAndValid(_ root: HostFrame) -> Bool {
        pages.lock()
        defer { pages.unlock() }
        return roots.contains(root) && !info(ofRoot: root).isInvalid
    }

    /// Blocks between two flushes.
    private static var batch: Int { 512 }

    private func recoverSome(
        _ root: HostFrame, _ slot: MemorySlot, _ level: PageLevel, from start: GuestFrame,
        holding guardian: borrowing MMUGuard
    ) -> (Int, GuestFrame?) {
        let view = view(root)
        let end = min(slot.frames.upperBound, view.end)
        var cursor = start
        var count = 0
        while cursor < end {
            if count == Self.batch { return (count, cursor) }
            let position = view.descend(to: cursor, until: level)
            let block = cursor.aligned(to: position.level)
            cursor = GuestFrame(block.number + position.level.frames)
            guard position.level == level, view.format.isTable(position.value, level.rawValue) else { continue }
            if recover(position, block, slot, holding: guardian) { count += 1 }
        }
        return (count, nil)
    }

    private func recover(
        _ position: RadixPosition, _ block: GuestFrame, _ slot: MemorySlot, holding guardian: borrowing MMUGuard
    ) -> Bool {
        let level = position.level
        guard block >= slot.baseFrame, canBeHuge(block, slot, level) else { return false }
        let table = EntryBits.field.frame(in: position.value)
        guard let leaf = congruentLeaf(of: table, block, level, holding: guardian) else { return false }
        // X40.
        let update = EntryUpdate(
            set: EntryBits.large | (nxHugePages ? bits.noExecute : 0), clear: nxHugePages ? bits.execute : 0)
        guard position.entry.replaceTable(byJoining: leaf, level: level, update, expected: position.value) == nil
        else { return false }
        vm.statistics.addPages(level: level.rawValue, 1)
        let frame = EntryBits.field.frame(in: leaf.value).aligned(to: level)
        record(
            Event(
                .entryInstalled, frame: frame, guest: block.number, level: level.rawValue,
                value: EntryBits.field.bits(for: frame) | update.applied(to: leaf.value) & ~EntryBits.field.mask,
                extra: position.value))
        remove(table)
        return true
    }

    /// Kernel: `kvm_mmu_max_mapping_level`. The host's level is a fact only while no invalidation is under way: what is
    /// about to be unmapped still looks mapped. Linux need not ask, for splitting a host's huge page notifies for all of
    /// it; asking keeps X12 to the letter.
    private func canBeHuge(_ block: GuestFrame, _ slot: MemorySlot, _ level: PageLevel) -> Bool {
        vm.invalidationsInProgress == 0 && !vm.isPrivate(block) && largestLeaf(at: block, in: slot) >= level
            && vm.addressSpace.mappingLevel(of: slot.userAddress(of: block)) >= level
    }

    /// Any leaf of the table, which tells the frame and the bits of the whole; nil if there is none, or if its frame
    /// does not stand where a huge page would put it. Tables below count too.
    @_lifetime(borrow guardian)
    private func congruentLeaf(
        of table: HostFrame, _ block: GuestFrame, _ level: PageLevel, holding guardian: borrowing MMUGuard
    ) -> ObservedEntry? {
        let below = level.below
        for i in 0..<512 {
            let seen = StageTwoEntry(vm.memory.entry(i, of: table), EntryBits.field).observe(holding: guardian)
            let entry = seen.value
            let guest = GuestFrame(block.number + UInt64(i) * below.frames)
            if EntryBits.isTable(entry, below.rawValue) {
                guard let leaf = congruentLeaf(of: EntryBits.field.frame(in: entry), guest, below, holding: guardian)
                else {
                    continue
                }
                return leaf
            }
            guard EntryBits.isLeaf(entry, below.rawValue) else { continue }
            let inside = guest.number & (level.frames - 1)
            return EntryBits.field.frame(in: entry).number & (level.frames - 1) == inside ? seen : nil
        }
        return nil
    }
}
