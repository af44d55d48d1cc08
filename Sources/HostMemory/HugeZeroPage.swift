import Audit
import Frames
import Synchronization
import Synchrony

/// The huge page of zeros: what a read of untouched anonymous memory maps where huge pages are wanted.
///
/// Its leaves are special entries, which no count knows of; get-user-pages takes an ordinary reference on the folio. It is
/// made when it is first needed and freed when the last address space that used it has gone. Kernel: `huge_zero_folio`,
/// `mm_get_huge_zero_folio`; there a shrinker frees it later.
final class HugeZeroPage: @unchecked Sendable {
    // Unchecked: `users` is touched only under `lock`.
    private let lock = SpinLock(.objectIndex)
    /// Its first frame; 0: there is none. Stays as long as somebody uses it.
    private let first = Atomic<UInt64>(0)
    private var users = 0

    /// For whoever has a leaf of it, or asks whether that is one.
    var frame: HostFrame? {
        let first = first.load(ordering: .acquiring)
        return first == 0 ? nil : HostFrame(first)
    }

    /// One user more, the page made if there is none. Nil: no memory.
    func use(_ memory: PhysicalMemory) -> HostFrame? {
        if let frame = useIfThere() { return frame }
        guard let fresh = memory.allocatePages(order: 9) else { return nil }
        memory.clear(fresh, count: 512)
        lock.lock()
        users += 1
        let seen = first.load(ordering: .relaxed)
        if seen == 0 { first.store(fresh.number, ordering: .releasing) }
        lock.unlock()
        guard seen != 0 else { return fresh }
        memory.put(memory.page(fresh))
        return HostFrame(seen)
    }

    private func useIfThere() -> HostFrame? {
        lock.lock()
        defer { lock.unlock() }
        guard let frame else { return nil }
        users += 1
        return frame
    }

    /// One user less; with the last the host's own reference goes.
    func leave(_ memory: PhysicalMemory) {
        lock.lock()
        users -= 1
        var gone: HostFrame?
        if users == 0 {
            gone = frame
            first.store(0, ordering: .releasing)
        }
        lock.unlock()
        if let gone { memory.put(memory.page(gone)) }
    }
}

extension AddressSpace {
    /// Whether a level-2 leaf shows the huge page of zeros. The leaf keeps a spare table, as one of memory of its own does.
    /// Kernel: `is_huge_zero_pmd`.
    func isHugeZero(_ entry: HostEntry) -> Bool {
        entry.isLargeLeaf && entry.isSpecial && entry.frame == host.hugeZeroPage.frame
    }

    /// Whether the leaf, of either size, shows one of the pages of zeros: special entries that get-user-pages takes.
    func isZeros(_ leaf: HostLeaf) -> Bool {
        leaf.level == .page4K ? leaf.entry.frame == host.zeroPage : isHugeZero(leaf.entry)
    }

    /// The address space is a user from now on, until it ends. Nil: no memory. Kernel: `MMF_HUGE_ZERO_FOLIO`.
    func useHugeZero() -> HostFrame? {
        if usesHugeZero.load(ordering: .acquiring) { return host.hugeZeroPage.frame }
        guard let frame = host.hugeZeroPage.use(memory) else { return nil }
        if usesHugeZero.exchange(true, ordering: .acquiringAndReleasing) { host.hugeZeroPage.leave(memory) }
        return frame
    }

    /// No leaf of it is left.
    func leaveHugeZero() {
        if usesHugeZero.exchange(false, ordering: .acquiringAndReleasing) { host.hugeZeroPage.leave(memory) }
    }

    /// A read of nothing. Nil: no memory for it; small pages will do. Kernel: `set_huge_zero_folio`.
    func fillHugeZero(
        _ vma: VMA, _ low: UserAddress, _ word: AtomicWord, _ table: HostFrame
    ) -> FaultOutcome? {
        guard let spare = newTable() else { return nil }
        guard let frame = useHugeZero() else {
            freeTable(spare)
            return nil
        }
        let entry = HostEntry.leaf(frame, vma.flags, writable: false, special: true)
        pageTableLock.lock()
        let won = word.load() == 0
        if won {
            deposit(spare, in: table)
            setLeaf(word, entry.setting(HostEntry.large), low, .page2M)
        }
        pageTableLock.unlock()
        if !won { freeTable(spare) }
        return .done
    }

    /// A write to it, or a pin for long: a huge page of its own takes its place, between the notifier's start and end; where
    /// there is none, small entries do, and the fault starts again (nil). Kernel: `do_huge_zero_wp_pmd`.
    func breakHugeZero(
        _ vma: VMA, _ address: UserAddress, _ word: AtomicWord, _ table: HostFrame, _ seen: HostEntry
    ) -> FaultOutcome? {
        let low = address.aligned(to: .page2M)
        guard let frame = newHugePage(vma, low) else {
            splitHuge(low, word, table)
            return nil
        }
        let range = low..<(low + PageLevel.page2M.bytes)
        let entry = HostEntry.leaf(frame, vma.flags, writable: vma.flags.write)
            .setting(HostEntry.large | HostEntry.dirty)
        notifyStart(range)
        pageTableLock.lock()
        let won = word.load() == seen.bits
        if won {
            clearForCopy(word, seen, entry, low)
            setNewLeaf(word, entry, low, .page2M)
        }
        pageTableLock.unlock()
        notifyEnd(range)
        if !won { memory.put(memory.page(frame)) }
        return .done
    }

    /// 512 small entries of zeros in place of the leaf. `pageTableLock` held. Kernel: `__split_huge_zero_page_pmd`.
    func spreadZeros(_ seen: HostEntry, _ word: AtomicWord, _ table: HostFrame, _ low: UserAddress) {
        let last = withdraw(from: table)
        let small = seen.clearing(HostEntry.large | HostEntry.frameMask).bits | host.zeroPage.physicalAddress
        for i in 0..<512 { memory.entry(i, of: last).store(small) }
        word.store(HostEntry.table(last))
        memory.record(
            Event(.hostEntrySet, frame: last, guest: low.page, level: 2, value: HostEntry.table(last), extra: seen.bits)
        )
    }

    /// The child shows it too. `pageTableLock` held; its spare is handed over. False: no memory.
    func copyHugeZero(
        _ seen: HostEntry, _ address: UserAddress, _ target: (word: AtomicWord, table: HostFrame), _ spare: HostFrame,
        _ child: AddressSpace
    ) -> Bool {
        guard child.useHugeZero() != nil else { return false }
        child.deposit(spare, in: target.table)
        child.setLeaf(target.word, seen.clearing(HostEntry.accessed), address, .page2M)
        return true
    }
}
