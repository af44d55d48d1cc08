import Audit
import Frames
import Synchronization
import Synchrony

/// Small pages become a huge one. Kernel: `khugepaged`, `MADV_COLLAPSE`.
extension AddressSpace {
    /// Makes a huge page of each whole 2 MiB of `range`. Errors: EINVAL where huge pages can't be; EAGAIN if somebody
    /// holds a page; ENOMEM. Kernel: `madvise_collapse`.
    func collapse(_ range: Range<UserAddress>) throws(Errno) {
        let bytes = PageLevel.page2M.bytes
        var low = UserAddress((range.lowerBound.value + bytes - 1) & ~(bytes - 1))
        let end = range.upperBound.aligned(to: .page2M)
        guard low <= end else { throw .EINVAL }
        var failure: Errno?
        while low < end {
            do throws(Errno) { try collapse(at: low) } catch { failure = error }
            low = low + bytes
        }
        if let failure { throw failure }
    }

    /// Takes `mmapLock` for write. What is on the swap device is brought back first.
    func collapse(at low: UserAddress) throws(Errno) {
        try bringBack(low..<(low + PageLevel.page2M.bytes))
        mmapLock.lockForWrite()
        defer { mmapLock.unlockWrite() }
        guard let vma = find(low), low + PageLevel.page2M.bytes <= vma.range.upperBound, case .anonymous = vma.backing,
            !vma.flags.noHugePage, vma.userFaults == nil
        else { throw .EINVAL }
        prepareAnonymous(vma)
        guard let (word, table) = makeMiddleEntry(low) else { throw .ENOMEM }
        let seen = HostEntry(word.load())
        if seen.isLargeLeaf { return }
        guard let spare = seen.bits == 0 ? newTable() : seen.frame else { throw .ENOMEM }
        guard let frame = memory.allocatePages(order: 9) else {
            if seen.bits == 0 { freeTable(spare) }
            throw .ENOMEM
        }
        try replace(vma, low, word, table, by: frame, spare, isNew: seen.bits == 0)
    }

    /// The table is taken out, so that nobody can reach its pages; if then nobody else holds one, they are copied, and the
    /// huge leaf put in. Kernel: `collapse_huge_page`.
    private func replace(
        _ vma: VMA, _ low: UserAddress, _ word: AtomicWord, _ table: HostFrame, by frame: HostFrame, _ spare: HostFrame,
        isNew: Bool
    ) throws(Errno) {
        let range = low..<(low + PageLevel.page2M.bytes)
        var gather = Gather()
        notifyStart(range)
        pageTableLock.lock()
        let seen = word.load()
        word.store(0)
        let fits = isNew || isCollapsible(spare)
        if fits {
            copy(spare, to: frame, low, &gather)
            let head = memory.page(frame)
            head.pointee.flags.bitwiseOr(PageFlags.anonymous | PageFlags.anonymousExclusive, ordering: .relaxed)
            head.pointee.mapCount.store(1, ordering: .relaxed)
            head.pointee.word0 = UInt64(vma.backingPage(of: low))
            deposit(spare, in: table)
            let entry = HostEntry.leaf(frame, vma.flags, writable: vma.flags.write)
            setNewLeaf(word, entry.setting(HostEntry.large | HostEntry.dirty), low, .page2M)
        } else {
            word.store(seen)
        }
        pageTableLock.unlock()
        notifyEnd(range)
        gather.flush(memory)
        if !fits {
            memory.put(memory.page(frame))
            throw .EAGAIN
        }
    }

    /// Whether every entry is empty, or maps a page that nobody else maps, holds, or was merged with.
    /// Kernel: `__collapse_huge_page_isolate`.
    private func isCollapsible(_ table: HostFrame) -> Bool {
        for i in 0..<512 {
            let entry = HostEntry(memory.entry(i, of: table).peek())
            if entry.bits == 0 || (entry.mapsFrame && entry.isSpecial && entry.frame == host.zeroPage) { continue }
            guard entry.mapsFrame, !entry.isSpecial else { return false }
            let page = memory.page(entry.frame)
            let head = memory.head(of: page)
            let isLarge = head.pointee.flags.load(ordering: .relaxed) & PageFlags.head != 0
            let expected: Int32 = isLarge ? 512 : 1
            guard memory.isAnonymous(page), !memory.isMerged(page),
                page.pointee.mapCount.load(ordering: .relaxed) == 1,
                head.pointee.referenceCount.load(ordering: .acquiring) == expected
            else { return false }
        }
        return true
    }

    /// Copies what the table maps into the huge page, and empties the table.
    private func copy(_ table: HostFrame, to frame: HostFrame, _ low: UserAddress, _ gather: inout Gather) {
        for i in 0..<512 {
            let word = memory.entry(i, of: table)
            let target = frame.advanced(by: i)
            let entry = HostEntry(word.peek())
            if entry.mapsFrame, !entry.isSpecial {
                memory.copy(entry.frame, to: target)
            } else {
                memory.clear(target, count: 1)
            }
            if entry.bits != 0 { clear(word, low.page + UInt64(i), &gather) }
        }
    }

    /// Faults in what is on the swap device. Kernel: `__collapse_huge_page_swapin`.
    private func bringBack(_ range: Range<UserAddress>) throws(Errno) {
        var address = range.lowerBound
        while address < range.upperBound {
            mmapLock.lockForRead()
            guard let vma = find(address), let leaf = leaf(address), leaf.entry.isSwapped else {
                mmapLock.unlockRead()
                address = address + pageSize
                continue
            }
            let outcome = handleFault(vma, address, .read)
            mmapLock.unlockRead()
            if case .failed(let error) = outcome { throw error.errno }
            outcome.wait()
        }
    }
}

extension Host {
    /// One pass over all memory that may have huge pages: each whole 2 MiB with at least one page becomes one, where nobody
    /// holds its pages. Returns how many did. Kernel: `khugepaged_scan_mm_slot`, with `max_ptes_none` 511.
    @discardableResult
    public func collapseHugePages() -> Int {
        var collapsed = 0
        forEachSpace { space in
            for low in space.collapsibleBlocks(always: transparentHugePages) {
                do throws(Errno) {
                    try space.collapse(at: low)
                    collapsed += 1
                } catch {
                    // Not now: it stays as it is.
                }
            }
            return true
        }
        return collapsed
    }
}

extension AddressSpace {
    fileprivate func collapsibleBlocks(always: Bool) -> [UserAddress] {
        var result: [UserAddress] = []
        mmapLock.lockForRead()
        defer { mmapLock.unlockRead() }
        for vma in vmas where vma.flags.hugePage || (always && !vma.flags.noHugePage) {
            guard case .anonymous = vma.backing else { continue }
            forEachMiddle(in: vma.range) { part, word, _ in
                let isWhole = part.upperBound.value - part.lowerBound.value == PageLevel.page2M.bytes
                guard isWhole, !HostEntry(word.peek()).isLargeLeaf else { return }
                result.append(part.lowerBound)
            }
        }
        return result
    }
}
