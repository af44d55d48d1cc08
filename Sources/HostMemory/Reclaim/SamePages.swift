import Audit
import Frames
import Synchronization
import Synchrony

/// Pages of equal content become one. Kernel: KSM.
///
/// A merged page belongs to nobody: every write copies it. Here it is neither reclaimed nor migrated, since its places in
/// several mappings differ.
extension Host {
    private struct Candidate {
        let page: UnsafeMutablePointer<PageFrame>
        let space: UInt64
        let address: UserAddress
        let digest: UInt64
    }

    /// One pass over all memory that was advised to be merged. Returns how many pages were given up for an equal one.
    /// Kernel: a full scan of `ksmd`.
    @discardableResult
    public func mergeSamePages() -> Int {
        var merged = 0
        // What to merge with, each with a reference.
        var kept: [Candidate] = []
        forEachSpace { space in
            for address in space.mergeableAddresses() {
                guard let page = space.takeMergeable(at: address) else { continue }
                let found = Candidate(
                    page: page, space: space.number, address: address, digest: memory.digest(memory.frame(of: page)))
                switch merge(found, space, kept) {
                case .merged:
                    merged += 1
                    memory.put(page)
                case .alone: kept.append(found)
                case .busy: memory.put(page)
                }
            }
            return true
        }
        for candidate in kept { memory.put(candidate.page) }
        return merged
    }

    private enum MergeOutcome { case merged, alone, busy }

    private func merge(_ found: Candidate, _ space: AddressSpace, _ kept: [Candidate]) -> MergeOutcome {
        for other in kept where other.digest == found.digest {
            if other.page == found.page { return .busy }
            guard memory.isEqual(memory.frame(of: other.page), memory.frame(of: found.page)) else { continue }
            guard makeStable(other), space.replaceBySame(found.page, at: found.address, by: other.page) else {
                return .busy
            }
            return .merged
        }
        return .alone
    }

    /// Makes the page one that nobody can write: its one entry read-only, and its content fixed.
    private func makeStable(_ candidate: Candidate) -> Bool {
        let flags = candidate.page.pointee.flags.load(ordering: .relaxed)
        if flags & PageFlags.merged != 0 { return true }
        var stable = false
        forEachSpace { space in
            guard space.number == candidate.space else { return true }
            stable = space.fixContent(candidate.page, at: candidate.address)
            return false
        }
        return stable
    }
}

extension AddressSpace {
    /// Where small anonymous pages are mapped in areas that may be merged.
    fileprivate func mergeableAddresses() -> [UserAddress] {
        var result: [UserAddress] = []
        mmapLock.lockForRead()
        defer { mmapLock.unlockRead() }
        for vma in vmas where vma.flags.mergeable {
            forEachMiddle(in: vma.range) { part, word, _ in
                let table = HostEntry(word.load())
                guard table.isPresent, !table.isLargeLeaf else { return }
                for page in part.lowerBound.page..<part.upperBound.page
                where HostEntry(memory.entry(Int(page & 511), of: table.frame).peek()).isPresent {
                    result.append(UserAddress(page << pageShift))
                }
            }
        }
        return result
    }

    /// The small anonymous page at `address`, with a reference, if its area may be merged.
    fileprivate func takeMergeable(at address: UserAddress) -> UnsafeMutablePointer<PageFrame>? {
        mmapLock.lockForRead()
        defer { mmapLock.unlockRead() }
        guard let vma = find(address), vma.flags.mergeable else { return nil }
        pageTableLock.lock()
        defer { pageTableLock.unlock() }
        guard let leaf = leaf(address), leaf.level == .page4K, leaf.entry.isPresent, !leaf.entry.isSpecial else {
            return nil
        }
        let page = memory.page(leaf.entry.frame)
        let flags = memory.head(of: page).pointee.flags.load(ordering: .relaxed)
        guard flags & PageFlags.anonymous != 0, flags & (PageFlags.head | PageFlags.swapCache) == 0 else { return nil }
        memory.get(page)
        return page
    }

    /// Takes the right to write from the entry, and makes the page a merged one. False: somebody else holds it.
    /// Kernel: `write_protect_page`, `set_page_stable_node`.
    fileprivate func fixContent(_ page: UnsafeMutablePointer<PageFrame>, at address: UserAddress) -> Bool {
        mmapLock.lockForRead()
        defer { mmapLock.unlockRead() }
        return change(page, at: address) { entry in
            memory.lists?.remove(page)
            page.pointee.flags.bitwiseOr(PageFlags.merged, ordering: .relaxed)
            return entry.clearing(HostEntry.writable | HostEntry.dirty)
        }
    }

    /// Puts the merged page in the place of an equal one. False: the content changed, or somebody else holds it.
    /// Kernel: `replace_page`.
    fileprivate func replaceBySame(
        _ page: UnsafeMutablePointer<PageFrame>, at address: UserAddress, by same: UnsafeMutablePointer<PageFrame>
    ) -> Bool {
        mmapLock.lockForRead()
        defer { mmapLock.unlockRead() }
        var replaced = false
        let fixed = change(page, at: address) { entry in
            let readOnly = entry.clearing(HostEntry.writable | HostEntry.dirty)
            guard memory.isEqual(memory.frame(of: page), memory.frame(of: same)) else { return readOnly }
            replaced = true
            memory.get(same)
            same.pointee.mapCount.add(1, ordering: .relaxed)
            page.pointee.mapCount.subtract(1, ordering: .relaxed)
            return HostEntry(readOnly.bits & ~HostEntry.frameMask | memory.frame(of: same).physicalAddress)
        }
        if replaced { memory.put(page) }
        return fixed && replaced
    }

    /// Replaces the entry of a page that only it and the caller hold, between the notifier's start and end. While `body`
    /// runs the entry is gone. The page is no longer exclusive then. False: it is another page, or somebody holds it.
    private func change(
        _ page: UnsafeMutablePointer<PageFrame>, at address: UserAddress, _ body: (HostEntry) -> HostEntry
    ) -> Bool {
        guard let leaf = entry(of: page, at: address) else { return false }
        let range = address..<(address + pageSize)
        notifyStart(range)
        defer { notifyEnd(range) }
        pageTableLock.lock()
        defer { pageTableLock.unlock() }
        guard HostEntry(leaf.word.load()).isPresent, HostEntry(leaf.word.load()).frame == memory.frame(of: page) else {
            return false
        }
        let old = HostEntry(leaf.word.exchange(0))
        let isShared = page.pointee.flags.load(ordering: .relaxed) & PageFlags.merged != 0
        let expected = page.pointee.mapCount.load(ordering: .relaxed) + 1
        guard isShared || page.pointee.referenceCount.load(ordering: .acquiring) == expected else {
            leaf.word.store(old.bits)
            return false
        }
        page.pointee.flags.bitwiseAnd(~PageFlags.anonymousExclusive, ordering: .relaxed)
        let new = body(old)
        setLeaf(leaf.word, new, address)
        return true
    }

    /// Gives each merged page of `range` a copy of its own. `mmapLock` held. Kernel: `break_ksm`.
    func unmerge(_ vma: VMA, _ range: Range<UserAddress>) throws(Errno) {
        var address = range.lowerBound
        while address < range.upperBound {
            if let leaf = leaf(address), leaf.level == .page4K, leaf.entry.mapsFrame, !leaf.entry.isSpecial,
                memory.isMerged(memory.page(leaf.entry.frame))
            {
                if case .failed(let error) = handleFault(vma, address, .unshare) { throw error.errno }
                continue
            }
            address = address + pageSize
        }
    }
}

extension PhysicalMemory {
    func isMerged(_ page: UnsafeMutablePointer<PageFrame>) -> Bool {
        page.pointee.flags.load(ordering: .relaxed) & PageFlags.merged != 0
    }

    /// A number that is equal for equal contents. FNV-1a over words.
    fileprivate func digest(_ frame: HostFrame) -> UInt64 {
        let words = bytes(of: frame).assumingMemoryBound(to: UInt64.self)
        var result: UInt64 = 0xcbf2_9ce4_8422_2325
        for i in 0..<Int(pageSize / 8) { result = (result ^ words[i]) &* 0x100_0000_01b3 }
        return result
    }

    fileprivate func isEqual(_ one: HostFrame, _ other: HostFrame) -> Bool {
        let first = bytes(of: one).assumingMemoryBound(to: UInt64.self)
        let second = bytes(of: other).assumingMemoryBound(to: UInt64.self)
        for i in 0..<Int(pageSize / 8) where first[i] != second[i] { return false }
        return true
    }
}
