import Frames
import Synchronization
import Synchrony

/// How often a page was used since reclaim last looked.
struct PageUse {
    /// Entries, host's and secondary MMUs', that were accessed.
    var entries = 0
    /// One of them by a mapping that may execute.
    var executable = false
}

/// Ageing: the accessed bits of every entry that maps a page are read and cleared, and the secondary MMUs asked for theirs.
/// Kernel: `folio_referenced`.
extension Host {
    func testAndClearUse(_ page: UnsafeMutablePointer<PageFrame>) -> PageUse {
        var use = PageUse()
        if memory.isAnonymous(page) {
            forEachArea(anonymous: page) { space, vma, address in
                space.testAndClearUse(page, vma, at: address, &use)
                return true
            }
        } else {
            memory.lists?.withObject(of: page) { object, index in
                object.mappings.forEach(index..<index + 1) { space, vma, range in
                    space.testAndClearUse(page, vma, at: range.lowerBound, &use)
                }
            }
        }
        return use
    }
}

extension AddressSpace {
    /// Kernel: `folio_referenced_one`, `ptep_clear_flush_young_notify`.
    fileprivate func testAndClearUse(
        _ page: UnsafeMutablePointer<PageFrame>, _ vma: VMA, at address: UserAddress, _ use: inout PageUse
    ) {
        pageTableLock.lock()
        guard let leaf = leaf(address), leaf.entry.mapsFrame, !leaf.entry.isSpecial,
            leaf.frame(of: address) == memory.frame(of: page)
        else { return pageTableLock.unlock() }
        var young = HostEntry(leaf.word.fetchAnd(~HostEntry.accessed)).isAccessed
        pageTableLock.unlock()
        let low = address.aligned(to: leaf.level)
        if clearFlushYoung(low..<(low + leaf.level.bytes)) { young = true }
        guard young else { return }
        use.entries += 1
        if vma.flags.execute { use.executable = true }
    }
}
