import Audit
import Frames
import Synchronization
import Synchrony

/// Transparent huge pages: 2 MiB leaves over one order-9 folio. The leaf owns one reference and one map count, both at
/// the folio's head; after a split each of the 512 entries owns one of each.
extension AddressSpace {
    private static let order = 9

    /// Fills an empty level-2 entry with a huge page, or lets the driver do it. Nil: no huge page here; use small ones.
    /// Kernel: `create_huge_pmd`.
    func fillHuge(
        _ vma: VMA, _ address: UserAddress, _ word: AtomicWord, _ table: HostFrame, _ access: FaultAccess
    ) -> FaultOutcome? {
        let low = address.aligned(to: .page2M)
        guard vma.range.lowerBound <= low, low + PageLevel.page2M.bytes <= vma.range.upperBound else { return nil }
        switch vma.backing {
        case .anonymous:
            guard vma.userFaults == nil, !vma.flags.noHugePage, host.transparentHugePages || vma.flags.hugePage else {
                return nil
            }
            return fillHugeAnonymous(vma, low, word, table, access)
        case .driver(let driver, _, _):
            let answer =
                driver.forced.next() ?? driver.hugeFault(self, vma.info, address, write: access == .write)
            return answer.map { settle($0, driver, address) }
        case .anonymousShared, .object, .huge: return nil
        }
    }

    /// Nil: no order-9 block is left.
    /// Kernel: `do_huge_pmd_anonymous_page`.
    private func fillHugeAnonymous(
        _ vma: VMA, _ low: UserAddress, _ word: AtomicWord, _ table: HostFrame, _ access: FaultAccess
    ) -> FaultOutcome? {
        prepareAnonymous(vma)
        if access == .read { return fillHugeZero(vma, low, word, table) }
        guard let spare = newTable() else { return nil }
        guard let frame = newHugePage(vma, low) else {
            freeTable(spare)
            return nil
        }
        var entry = HostEntry.leaf(frame, vma.flags, writable: vma.flags.write)
        entry = entry.setting(HostEntry.large | HostEntry.dirty)
        pageTableLock.lock()
        let won = word.load() == 0
        if won {
            deposit(spare, in: table)
            setNewLeaf(word, entry, low, .page2M)
        }
        pageTableLock.unlock()
        if !won {
            freeTable(spare)
            memory.put(memory.page(frame))
        }
        return .done
    }

    /// A huge page of zeros of the mapping's own, exclusive, counted as mapped once. Nil: no order-9 block is left.
    func newHugePage(_ vma: VMA, _ low: UserAddress) -> HostFrame? {
        guard let frame = memory.allocatePages(order: Self.order) else { return nil }
        memory.clear(frame, count: 512)
        let head = memory.page(frame)
        head.pointee.flags.bitwiseOr(PageFlags.anonymous | PageFlags.anonymousExclusive, ordering: .relaxed)
        head.pointee.mapCount.store(1, ordering: .relaxed)
        head.pointee.word0 = UInt64(vma.backingPage(of: low))
        return frame
    }

    /// A fault on a huge leaf. Nil: it was split; start again. Kernel: `do_huge_pmd_wp_page`.
    func hugeFault(
        _ vma: VMA, _ address: UserAddress, _ word: AtomicWord, _ table: HostFrame, _ seen: HostEntry,
        _ access: FaultAccess
    ) -> FaultOutcome? {
        if seen.isProtectNone {
            restoreHinted(vma, address, word, seen, .page2M)
            return .done
        }
        guard access != .read, !seen.isWritable else { return .done }
        if isHugeZero(seen) { return breakHugeZero(vma, address, word, table, seen) }
        if seen.isSpecial { return breakHugeSpecial(vma, address, word, seen, access) }
        if reuseHuge(address, word, seen, access) { return .done }
        splitHuge(address, word, table)
        return nil
    }

    private func breakHugeSpecial(
        _ vma: VMA, _ address: UserAddress, _ word: AtomicWord, _ seen: HostEntry, _ access: FaultAccess
    ) -> FaultOutcome {
        guard case .driver(let driver, _, _) = vma.backing, access == .write else { return .done }
        if let refused = askToWrite(driver, vma, address, seen, .page2M) { return refused }
        pageTableLock.lock()
        if word.load() == seen.bits { setLeaf(word, seen.setting(Self.written), address, .page2M) }
        pageTableLock.unlock()
        return .done
    }

    /// Keeps a huge page that is exclusive or referenced by this leaf alone. True: done, or another task was faster.
    private func reuseHuge(
        _ address: UserAddress, _ word: AtomicWord, _ seen: HostEntry, _ access: FaultAccess
    ) -> Bool {
        pageTableLock.lock()
        defer { pageTableLock.unlock() }
        guard word.load() == seen.bits else { return true }
        let head = memory.page(seen.frame)
        if !memory.isExclusivelyAnonymous(head) {
            guard head.pointee.referenceCount.load(ordering: .acquiring) == 1 else { return false }
            head.pointee.flags.bitwiseOr(PageFlags.anonymousExclusive, ordering: .relaxed)
        }
        if access == .write { setLeaf(word, seen.setting(Self.written), address, .page2M) }
        return true
    }

    /// Replaces a huge leaf by 512 small entries for the same frames. A driver's huge leaf is only removed: the next
    /// access faults again. Kernel: `__split_huge_pmd`, which notifies although no translation changes.
    func splitHuge(_ address: UserAddress, _ word: AtomicWord, _ table: HostFrame) {
        let low = address.aligned(to: .page2M)
        let range = low..<(low + PageLevel.page2M.bytes)
        notifyStart(range)
        pageTableLock.lock()
        let seen = HostEntry(word.load())
        if seen.isLargeLeaf {
            if isHugeZero(seen) {
                spreadZeros(seen, word, table, low)
            } else if seen.isSpecial {
                word.store(0)
                memory.record(
                    Event(.hostEntryCleared, frame: seen.frame, guest: low.page, level: 2, value: seen.bits))
            } else {
                spread(seen, word, table, low)
            }
        }
        pageTableLock.unlock()
        notifyEnd(range)
    }

    /// Kernel: `__split_huge_pmd_locked`. `pageTableLock` held.
    private func spread(_ seen: HostEntry, _ word: AtomicWord, _ table: HostFrame, _ low: UserAddress) {
        let last = withdraw(from: table)
        let head = memory.page(seen.frame)
        let exclusive = head.pointee.flags.load(ordering: .relaxed) & PageFlags.anonymousExclusive
        head.pointee.referenceCount.add(511, ordering: .relaxed)
        head.pointee.mapCount.subtract(1, ordering: .relaxed)
        let small = seen.clearing(HostEntry.large | HostEntry.frameMask).bits
        for i in 0..<512 {
            let frame = seen.frame.advanced(by: i)
            let page = memory.page(frame)
            page.pointee.mapCount.add(1, ordering: .relaxed)
            if exclusive != 0 { page.pointee.flags.bitwiseOr(exclusive, ordering: .relaxed) }
            memory.entry(i, of: last).store(small | frame.physicalAddress)
        }
        word.store(HostEntry.table(last))
        memory.record(
            Event(.hostEntrySet, frame: last, guest: low.page, level: 2, value: HostEntry.table(last), extra: seen.bits)
        )
    }
}
