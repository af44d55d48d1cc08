import Audit
import Frames
import Synchronization
import Synchrony

/// Broken memory. Kernel: `memory_failure`.
extension Host {
    /// The frame has an uncorrectable error: it is taken out of every page table, each address space's notifier told,
    /// and never handed out again. Private anonymous entries become poison markers; an object's page stays the
    /// object's, and faults on it fail. Of a page of a file that no process maps only the file is told. A frame that nobody
    /// holds, or that is reserved, a page table, or part of the huge page of zeros, is left alone.
    ///
    /// No lock held. The address spaces are searched entry by entry, which finds merged pages too; the kernel goes by its
    /// reverse maps.
    ///
    /// False: it was left alone, or was broken before.
    @discardableResult
    public func poison(_ frame: HostFrame) -> Bool {
        guard memory.hasPageFrame(frame) else { return false }
        let page = memory.page(frame)
        let flags = page.pointee.flags.load(ordering: .relaxed)
        guard flags & (PageFlags.reserved | PageFlags.table | PageFlags.free | PageFlags.poisoned) == 0 else {
            return false
        }
        if frame.aligned(to: .page2M) == hugeZeroPage.frame { return false }
        // The reference is never put: that is what keeps the frame out of the allocator.
        guard memory.tryGet(page) else { return false }
        page.pointee.flags.bitwiseOr(PageFlags.poisoned, ordering: .relaxed)
        memory.lists?.remove(memory.head(of: page))
        if flags & PageFlags.inaccessible != 0 {
            tellFile(of: page)
            return true
        }
        forEachSpace { space in
            space.replaceByPoison(frame)
            return true
        }
        return true
    }
}

extension AddressSpace {
    /// Replaces this space's entries for `frame`.
    func replaceByPoison(_ frame: HostFrame) {
        mmapLock.lockForRead()
        defer { mmapLock.unlockRead() }
        for vma in vmas {
            if let file = vma.hugeFile {
                replaceHugeByPoison(vma, file, frame)
                continue
            }
            forEachMiddle(in: vma.range) { part, word, table in
                let seen = HostEntry(word.peek())
                if seen.isLargeLeaf, !seen.isSpecial {
                    guard frame.aligned(to: .page2M) == seen.frame else { return }
                    splitHuge(part.lowerBound, word, table)
                }
                let now = HostEntry(word.peek())
                guard now.isPresent, !now.isLargeLeaf else { return }
                for page in part.lowerBound.page..<part.upperBound.page {
                    replaceByPoison(frame, memory.entry(Int(page & 511), of: now.frame), page)
                }
            }
        }
    }

    /// The whole huge page is lost: its part can't be taken out of an entry that is never split.
    private func replaceHugeByPoison(_ vma: VMA, _ file: HugePageFile, _ frame: HostFrame) {
        let head = frame.aligned(to: file.level)
        var low = vma.range.lowerBound
        while low < vma.range.upperBound {
            if let leaf = leaf(low), leaf.level == file.level, leaf.entry.mapsFrame, leaf.entry.frame == head {
                let range = low..<(low + file.level.bytes)
                var gather = Gather()
                notifyStart(range)
                pageTableLock.lock()
                if HostEntry(leaf.word.load()).isLargeLeaf {
                    clearHuge(leaf.word, low, file.level, &gather)
                    leaf.word.store(head.physicalAddress | HostEntry.poison)
                }
                pageTableLock.unlock()
                notifyEnd(range)
                memory.page(head).pointee.flags.bitwiseOr(PageFlags.poisoned, ordering: .relaxed)
                gather.flush(memory)
            }
            low = low + file.level.bytes
        }
    }

    private func replaceByPoison(_ frame: HostFrame, _ word: AtomicWord, _ page: UInt64) {
        let seen = HostEntry(word.load())
        guard seen.mapsFrame, !seen.isSpecial, seen.frame == frame else { return }
        let address = UserAddress(page << pageShift)
        let range = address..<(address + pageSize)
        var gather = Gather()
        notifyStart(range)
        pageTableLock.lock()
        let now = HostEntry(word.load())
        if now.mapsFrame, now.frame == frame {
            clear(word, page, &gather)
            if memory.isAnonymous(memory.page(frame)) {
                word.store(frame.physicalAddress | HostEntry.poison)
            }
        }
        pageTableLock.unlock()
        notifyEnd(range)
        gather.flush(memory)
    }
}

extension PhysicalMemory {
    func isPoisoned(_ page: UnsafeMutablePointer<PageFrame>) -> Bool {
        page.pointee.flags.load(ordering: .relaxed) & PageFlags.poisoned != 0
    }
}
