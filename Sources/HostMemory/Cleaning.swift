import Audit
import Frames
import Synchrony

/// Write-protecting pages that are written out, so that the next write to them is heard of.
extension MappingList {
    /// Takes W and D from the entries that show `pages` in shared mappings; whether one was dirty.
    /// Kernel: `folio_mkclean`, `pfn_mkclean_range`.
    func clean(_ pages: Range<Int>) -> Bool {
        var wasDirty = false
        forEach(pages) { space, vma, range in
            if vma.flags.shared, space.cleanNotified(range) { wasDirty = true }
        }
        return wasDirty
    }
}

extension AddressSpace {
    /// The backing's mapping lock held. Kernel: `page_vma_mkclean_one`.
    fileprivate func cleanNotified(_ range: Range<UserAddress>) -> Bool {
        var wasDirty = false
        notifyStart(range)
        forEachMiddle(in: range) { part, middle, _ in
            let table = HostEntry(middle.load())
            guard table.isPresent, !table.isLargeLeaf else { return }
            pageTableLock.lock()
            for page in part.lowerBound.page..<part.upperBound.page
            where clean(memory.entry(Int(page & 511), of: table.frame), page) {
                wasDirty = true
            }
            pageTableLock.unlock()
        }
        notifyEnd(range)
        return wasDirty
    }

    private func clean(_ word: AtomicWord, _ page: UInt64) -> Bool {
        let seen = HostEntry(word.load())
        guard seen.mapsFrame, seen.isWritable || seen.isDirty else { return false }
        // The processor may set A or D meanwhile.
        let old = HostEntry(word.fetchAnd(~(HostEntry.writable | HostEntry.dirty)))
        let new = old.clearing(HostEntry.writable | HostEntry.dirty)
        memory.record(
            Event(.hostEntrySet, frame: new.frame, guest: page, level: 1, value: new.bits, extra: old.bits))
        return old.isDirty
    }
}
