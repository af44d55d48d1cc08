import Audit
import Frames
import Synchronization
import Synchrony

/// What the calls do with mappings of huge pages: whole pages only, and no splitting.
extension AddressSpace {
    /// Whether the areas that lie across the ends of `range` may be split there. `mmapLock` held.
    /// Kernel: `may_split`, as `hugetlb_vm_op_split`, which makes the call fail with EINVAL.
    func maySplit(_ range: Range<UserAddress>) -> Bool {
        for end in [range.lowerBound, range.upperBound] {
            guard let vma = find(end), vma.range.lowerBound < end else { continue }
            if vma.driver?.refusals.contains(.splits) == true { return false }
            if let file = vma.hugeFile, end.aligned(to: file.level) != end { return false }
        }
        return true
    }

    /// Visits the gigantic leaves of `range`.
    func forEachGigantic(in range: Range<UserAddress>, _ body: (UserAddress, AtomicWord) -> Void) {
        var low = range.lowerBound.aligned(to: .page1G)
        while low < range.upperBound {
            if let word = upperEntry(low), HostEntry(word.peek()).isLargeLeaf { body(low, word) }
            low = low + PageLevel.page1G.bytes
        }
    }

    /// Clears a leaf of the pool's; its page's references go with the gather. `pageTableLock` held.
    func clearHuge(_ word: AtomicWord, _ low: UserAddress, _ level: PageLevel, _ gather: inout Gather) {
        let old = HostEntry(word.exchange(0))
        memory.record(
            Event(.hostEntryCleared, frame: old.frame, guest: low.page, level: level.rawValue, value: old.bits))
        let page = memory.page(old.frame)
        memory.noteEntryBits(old, page)
        page.pointee.mapCount.subtract(1, ordering: .relaxed)
        gather.add(old.frame)
    }

    /// The child's entries for a private mapping of huge pages: shared and write-protected, or copied where the page may be
    /// pinned. False: no memory. Kernel: `copy_hugetlb_page_range`.
    func copyHugeFile(_ vma: VMA, _ file: HugePageFile, _ child: AddressSpace) -> Bool {
        var low = vma.range.lowerBound
        while low < vma.range.upperBound {
            if let word = hugeWord(low, file.level), HostEntry(word.peek()).isLargeLeaf {
                guard let target = child.makeHugeEntry(low, file.level), copyHugeEntry(file, low, word, target, child)
                else { return false }
            }
            low = low + file.level.bytes
        }
        return true
    }

    private func copyHugeEntry(
        _ file: HugePageFile, _ low: UserAddress, _ word: AtomicWord, _ target: AtomicWord, _ child: AddressSpace
    ) -> Bool {
        pageTableLock.lock()
        defer { pageTableLock.unlock() }
        let seen = HostEntry(word.load())
        guard seen.isLargeLeaf else { return true }
        let page = memory.page(seen.frame)
        if memory.isExclusivelyAnonymous(page) {
            if memory.maybePinned(page) { return copyPinned(file, low, seen, target, child) }
            page.pointee.flags.bitwiseAnd(~PageFlags.anonymousExclusive, ordering: .relaxed)
        }
        memory.get(page)
        page.pointee.mapCount.add(1, ordering: .relaxed)
        let old = HostEntry(word.fetchAnd(~HostEntry.writable))
        let shared = old.clearing(HostEntry.writable)
        child.setLeaf(target, shared.clearing(HostEntry.accessed), low, file.level)
        return true
    }

    /// Kernel: ENOMEM from fork, where the pool has none left.
    private func copyPinned(
        _ file: HugePageFile, _ low: UserAddress, _ seen: HostEntry, _ target: AtomicWord, _ child: AddressSpace
    ) -> Bool {
        guard let new = file.pool.take(promised: false) else { return false }
        new.pointee.flags.bitwiseOr(PageFlags.anonymous | PageFlags.anonymousExclusive, ordering: .relaxed)
        new.pointee.mapCount.store(1, ordering: .relaxed)
        for i in 0..<Int(file.level.frames) {
            memory.copy(seen.frame.advanced(by: i), to: memory.frame(of: new).advanced(by: i))
        }
        let entry = HostEntry(seen.bits & ~HostEntry.frameMask | memory.frame(of: new).physicalAddress)
        child.setLeaf(target, entry, low, file.level)
        return true
    }

    /// A table for each leaf that `moveHugeEntries` will move. False: no memory.
    func makeHugeTables(_ file: HugePageFile, from source: Range<UserAddress>, to target: UserAddress) -> Bool {
        for offset in stride(from: 0, to: source.upperBound.value - source.lowerBound.value, by: Int(file.level.bytes))
        where makeHugeEntry(target + offset, file.level) == nil {
            return false
        }
        return true
    }

    /// Kernel: `move_hugetlb_page_tables`.
    func moveHugeEntries(_ file: HugePageFile, _ source: Range<UserAddress>, _ target: UserAddress) {
        pageTableLock.lock()
        defer { pageTableLock.unlock() }
        for offset in stride(from: 0, to: source.upperBound.value - source.lowerBound.value, by: Int(file.level.bytes))
        {
            let low = source.lowerBound + offset
            guard let word = hugeWord(low, file.level), word.peek() != 0,
                let place = hugeWord(target + offset, file.level)
            else { continue }
            let entry = HostEntry(word.exchange(0))
            memory.record(
                Event(
                    .hostEntryCleared, frame: entry.frame, guest: low.page, level: file.level.rawValue,
                    value: entry.bits))
            setLeaf(place, entry, target + offset, file.level)
        }
    }

    private func hugeWord(_ address: UserAddress, _ level: PageLevel) -> AtomicWord? {
        level == .page1G ? upperEntry(address) : middleWord(address)
    }

    private func middleWord(_ address: UserAddress) -> AtomicWord? {
        if case .present(let word, _) = middleEntry(address) { word } else { nil }
    }
}

extension VMA {
    var hugeFile: HugePageFile? {
        if case .huge(let file, _, _) = backing { return file }
        return nil
    }

    /// Uses up one of the pages that the pool promised to this mapping. False: it has none left.
    func takePromise() -> Bool {
        var left = promises.load(ordering: .relaxed)
        while left > 0 {
            let (done, seen) = promises.compareExchange(expected: left, desired: left - 1, ordering: .relaxed)
            if done { return true }
            left = seen
        }
        return false
    }
}
