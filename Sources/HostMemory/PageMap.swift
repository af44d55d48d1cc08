import Frames
import Synchronization
import Synchrony

/// What a process may know of one of its pages. Kernel: an entry of `/proc/PID/pagemap`.
public struct PageMapEntry: Sendable, Equatable {
    /// Bit 63. An entry that the process may not use now (PROT_NONE) counts.
    public var isPresent = false
    /// Bit 62: the page is on the swap device, or something else stands in its place.
    public var isSwapped = false
    /// Bit 58: a guard.
    public var isGuard = false
    /// Bit 61: the page belongs to a file or to shared memory.
    public var isFile = false
    /// Bit 56: no other entry of any process maps the page.
    public var isExclusive = false
}

extension AddressSpace {
    /// The state of the page at `address`. Takes the page-table lock. Kernel: `pagemap_read`.
    public func pageMapEntry(_ address: UserAddress) -> PageMapEntry {
        pageTableLock.lock()
        defer { pageTableLock.unlock() }
        var result = PageMapEntry()
        guard let leaf = leaf(address) else { return result }
        guard leaf.entry.mapsFrame else {
            result.isSwapped = leaf.entry.bits != 0
            result.isGuard = leaf.entry.isGuard
            return result
        }
        result.isPresent = true
        guard !leaf.entry.isSpecial else { return result }
        let page = memory.page(leaf.frame(of: address))
        result.isFile = !memory.isAnonymous(page)
        result.isExclusive = memory.head(of: page).pointee.mapCount.load(ordering: .relaxed) == 1
        return result
    }
}
