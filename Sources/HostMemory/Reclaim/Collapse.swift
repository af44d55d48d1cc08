import Audit
import Frames
import Synchronization
import Synchrony

/// Small pages become a huge one. Kernel: `khugepaged`, `MADV_COLLAPSE`.
extension AddressSpace {
    /// Makes a huge page of each whole 2 MiB of `range`. Errors: EINVAL where huge pages can't be, where nothing was ever
    /// written, or where guards are; EAGAIN if somebody holds a page; ENOMEM, also for a hole after the rest was done.
    /// Kernel: `madvise_collapse`.
    func collapse(_ range: Range<UserAddress>) throws(Errno) {
        var address = range.lowerBound
        var hasHole = false
        while address < range.upperBound {
            mmapLock.lockForRead()
            let index = firstIndex(endingAfter: address)
            let part = index < vmas.count ? Self.overlap(vmas[index].range, address..<range.upperBound) : nil
            let isAllowed = part != nil && vmas[index].mayCollapse
            mmapLock.unlockRead()
            guard let part else { throw .ENOMEM }
            guard isAllowed else { throw .EINVAL }
            if part.lowerBound > address { hasHole = true }
            try collapse(part: part)
            address = part.upperBound
        }
        if hasHole { throw .ENOMEM }
    }

    /// All of them are tried; the last error counts.
    private func collapse(part: Range<UserAddress>) throws(Errno) {
        let inside = PageLevel.page2M.bytes - 1
        var low = UserAddress((part.lowerBound.value + inside) & ~inside)
        let end = part.upperBound.aligned(to: .page2M)
        guard low <= end else { throw .EINVAL }
        var failure: Errno?
        while low < end {
            // An area may be terabytes, and all but empty.
            if case .missing(let level) = middleEntry(low) {
                failure = .EINVAL
                low = low.aligned(to: level) + level.bytes
                continue
            }
            do throws(Errno) { try collapse(at: low) } catch { failure = error }
            low = low + PageLevel.page2M.bytes
        }
        if let failure { throw failure }
    }

    /// Takes `mmapLock` for write. What is on the swap device is brought back first.
    /// - Parameter mostShared: with more pages than that which others map too it is left alone.
    func collapse(at low: UserAddress, mostShared: Int = 512) throws(Errno) {
        try bringBack(low..<(low + PageLevel.page2M.bytes))
        mmapLock.lockForWrite()
        defer { mmapLock.unlockWrite() }
        guard let vma = find(low), low + PageLevel.page2M.bytes <= vma.range.upperBound, vma.mayCollapse,
            vma.userFaults == nil, case .present(let word, let table) = middleEntry(low)
        else { throw .EINVAL }
        let seen = HostEntry(word.load())
        if seen.isLargeLeaf { return }
        guard seen.bits != 0 else { throw .EINVAL }
        guard let frame = memory.allocatePages(order: 9) else { throw .ENOMEM }
        try replace(vma, low, word, table, by: frame, mostShared)
    }

    /// The table is taken out, so that nobody can reach its pages; if then nobody else holds one, they are copied, and the
    /// huge leaf put in. Kernel: `collapse_huge_page`.
    private func replace(
        _ vma: VMA, _ low: UserAddress, _ word: AtomicWord, _ table: HostFrame, by frame: HostFrame, _ mostShared: Int
    ) throws(Errno) {
        let range = low..<(low + PageLevel.page2M.bytes)
        var gather = Gather()
        notifyStart(range)
        pageTableLock.lock()
        let seen = HostEntry(word.load())
        word.store(0)
        let obstacle = obstacle(in: seen.frame, mostShared)
        if obstacle == nil {
            copy(seen.frame, to: frame, low, &gather)
            let head = memory.page(frame)
            head.pointee.flags.bitwiseOr(PageFlags.anonymous | PageFlags.anonymousExclusive, ordering: .relaxed)
            head.pointee.mapCount.store(1, ordering: .relaxed)
            head.pointee.word0 = UInt64(vma.backingPage(of: low))
            deposit(seen.frame, in: table)
            let entry = HostEntry.leaf(frame, vma.flags, writable: vma.flags.write)
            setNewLeaf(word, entry.setting(HostEntry.large | HostEntry.dirty), low, .page2M)
        } else {
            word.store(seen.bits)
        }
        pageTableLock.unlock()
        notifyEnd(range)
        gather.flush(memory)
        guard let obstacle else { return }
        memory.put(memory.page(frame))
        throw obstacle
    }

    /// Why the pages of a table can't become one: EAGAIN where somebody holds one, or it was merged; EINVAL where something
    /// else than a page of anonymous memory stands, or nothing at all. Nil: they can. `pageTableLock` held.
    /// Kernel: `__collapse_huge_page_isolate`.
    private func obstacle(in table: HostFrame, _ mostShared: Int) -> Errno? {
        var isEmpty = true
        var shared = 0
        var lastHead: UnsafeMutablePointer<PageFrame>?
        for i in 0..<512 {
            let entry = HostEntry(memory.entry(i, of: table).peek())
            if entry.bits == 0 { continue }
            isEmpty = false
            if entry.mapsFrame, entry.isSpecial, entry.frame == host.zeroPage { continue }
            guard entry.mapsFrame, !entry.isSpecial, memory.isAnonymous(memory.page(entry.frame)) else {
                return .EINVAL
            }
            let page = memory.page(entry.frame)
            if page.pointee.mapCount.load(ordering: .relaxed) > 1 { shared += 1 }
            let head = memory.head(of: page)
            if head == lastHead { continue }
            if memory.isMerged(page) || memory.isHeld(head) { return .EAGAIN }
            lastHead = head
        }
        return isEmpty || shared > mostShared ? .EINVAL : nil
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
    /// holds its pages, and at most half of them are shared. Returns how many did. Kernel: `khugepaged_scan_mm_slot`, with
    /// `max_ptes_none` 511 and `max_ptes_shared` 256.
    @discardableResult
    public func collapseHugePages() -> Int {
        var collapsed = 0
        forEachSpace { space in
            for low in space.collapsibleBlocks(always: transparentHugePages) {
                do throws(Errno) {
                    try space.collapse(at: low, mostShared: 256)
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

extension VMA {
    /// Whether a huge page has room in it and is not unwanted, and something was written to it.
    /// Kernel: `thp_vma_allowable_order`.
    fileprivate var mayCollapse: Bool {
        guard case .anonymous = backing, !flags.noHugePage, mayHoldAnonymous else { return false }
        let inside = PageLevel.page2M.bytes - 1
        return ((range.lowerBound.value + inside) & ~inside) + PageLevel.page2M.bytes <= range.upperBound.value
    }
}

extension PhysicalMemory {
    /// Whether somebody refers to the folio besides entries and the swap device's cache.
    /// Kernel: `folio_expected_ref_count`.
    fileprivate func isHeld(_ head: UnsafeMutablePointer<PageFrame>) -> Bool {
        var expected: Int32 = 0
        for i in 0..<pageCount(head) { expected += (head + i).pointee.mapCount.load(ordering: .relaxed) }
        if head.pointee.flags.load(ordering: .relaxed) & PageFlags.swapCache != 0 { expected += 1 }
        return head.pointee.referenceCount.load(ordering: .acquiring) != expected
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
