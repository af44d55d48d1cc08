import Audit
import Frames
import Synchronization
import Synchrony

/// A write to, or a pin through, a present entry that is not writable. Kernel: `do_wp_page`.
extension AddressSpace {
    func breakSharing(
        _ vma: VMA, _ address: UserAddress, _ word: AtomicWord, _ seen: HostEntry, _ access: FaultAccess
    ) -> FaultOutcome {
        if vma.flags.shared {
            return access == .write ? makeSharedWritable(vma, address, word, seen) : .done
        }
        // A pin that asks here wants a page that stays: zeros and a file's page are copied for it too.
        if seen.isSpecial {
            let isOrdinary = access == .write || seen.frame == host.zeroPage
            return isOrdinary ? copy(vma, address, word, seen, access) : .done
        }
        let page = memory.page(seen.frame)
        guard memory.isAnonymous(page) else { return copy(vma, address, word, seen, access) }
        switch reuse(address, word, seen, page, access) {
        case .done, .lostRace: return .done
        case .mustCopy: return copy(vma, address, word, seen, access)
        }
    }

    /// A shared mapping: the frame stays, the driver is asked. Kernel: `wp_pfn_shared`, `wp_page_shared`.
    private func makeSharedWritable(
        _ vma: VMA, _ address: UserAddress, _ word: AtomicWord, _ seen: HostEntry
    ) -> FaultOutcome {
        if case .driver(let driver, _, _) = vma.backing, let refused = askToWrite(driver, vma, address, seen) {
            return refused
        }
        pageTableLock.lock()
        if word.load() == seen.bits {
            // A file's page: it will have to be written to the disk. Kernel: `page_mkwrite`.
            if !seen.isSpecial { memory.mark(memory.page(seen.frame), PageFlags.dirty(.primaryEntry)) }
            setLeaf(word, seen.setting(Self.written), address)
        }
        pageTableLock.unlock()
        return .done
    }

    static let written = HostEntry.writable | HostEntry.dirty | HostEntry.accessed

    private enum Reuse { case done, lostRace, mustCopy }

    /// Keeps an anonymous page that is exclusive, or that only this entry references. No notifier: the frame stays.
    /// Kernel: `wp_can_reuse_anon_folio`, `wp_page_reuse`.
    private func reuse(
        _ address: UserAddress, _ word: AtomicWord, _ seen: HostEntry, _ page: UnsafeMutablePointer<PageFrame>,
        _ access: FaultAccess
    ) -> Reuse {
        pageTableLock.lock()
        defer { pageTableLock.unlock() }
        guard word.load() == seen.bits else { return .lostRace }
        if !memory.isExclusivelyAnonymous(page) {
            let head = memory.head(of: page)
            schedulingPoint(.pageUse, memory.frame(of: head).physicalAddress)
            let large = head.pointee.flags.load(ordering: .relaxed) & PageFlags.head != 0
            guard !large, !memory.isMerged(page), memory.isReferencedOnce(head, host.swap) else { return .mustCopy }
            page.pointee.flags.bitwiseOr(PageFlags.anonymousExclusive, ordering: .relaxed)
        }
        if access == .write { setLeaf(word, seen.setting(Self.written), address) }
        return .done
    }

    /// Puts a private copy in place of a shared frame: the notifier's start comes before the entry changes, its end
    /// after, and the old page loses the entry's reference last. Kernel: `wp_page_copy`.
    private func copy(
        _ vma: VMA, _ address: UserAddress, _ word: AtomicWord, _ seen: HostEntry, _ access: FaultAccess
    ) -> FaultOutcome {
        prepareAnonymous(vma)
        guard let new = newAnonymousPage(vma.backingPage(of: address)) else { return .failed(.outOfMemory) }
        guard let source = holdSource(word, seen) else {
            memory.put(memory.page(new))
            return .done
        }
        memory.copy(seen.frame, to: new)
        let page = address.aligned(to: .page4K)
        let range = page..<(page + pageSize)
        notifyStart(range)
        var entry = HostEntry.leaf(new, vma.flags, writable: false)
        if access == .write { entry = entry.setting(Self.written) }
        pageTableLock.lock()
        let won = word.load() == seen.bits
        if won {
            clearForCopy(word, seen, entry, address)
            setNewLeaf(word, entry, address)
            source.page?.pointee.mapCount.subtract(1, ordering: .relaxed)
        }
        pageTableLock.unlock()
        notifyEnd(range)
        if !won { memory.put(memory.page(new)) }
        guard let old = source.page else { return .done }
        if won { memory.put(old) }
        memory.put(old)
        return .done
    }

    /// Takes out the entry that `entry`, for a copy, replaces next: no other processor may see both translations.
    /// `pageTableLock` held. Kernel: `ptep_clear_flush`, `pmdp_huge_clear_flush`.
    func clearForCopy(_ word: AtomicWord, _ seen: HostEntry, _ entry: HostEntry, _ address: UserAddress) {
        word.store(0)
        memory.record(
            Event(
                .copyOnWrite, frame: entry.frame, guest: address.page, value: entry.bits, extra: seen.frame.number))
    }

    /// References the page that is to be copied, so that it stays while nobody holds the page-table lock. Nil: the
    /// entry has changed. A special entry's frame is held by its owner.
    private func holdSource(
        _ word: AtomicWord, _ seen: HostEntry
    ) -> (page: UnsafeMutablePointer<PageFrame>?, held: Bool)? {
        if seen.isSpecial { return (nil, false) }
        pageTableLock.lock()
        defer { pageTableLock.unlock() }
        guard word.load() == seen.bits else { return nil }
        let page = memory.page(seen.frame)
        memory.get(page)
        return (page, true)
    }
}
