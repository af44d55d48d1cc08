import Audit
import Frames
import HostMemory

/// v8 to v11: a software bit in the entry remembers "refcounted". Spec: generic 10.2.
public struct Tracked: ReferencePolicy {
    @usableFromInline let pages: LegacyPageLookup
    /// Only x86-64 TDP entries have the bit; without it every page counts as refcounted and others are refused.
    let entryHasSoftwareBit: Bool

    init(memory: PhysicalMemory, entryHasSoftwareBit: Bool) {
        pages = LegacyPageLookup(memory: memory)
        self.entryHasSoftwareBit = entryHasSoftwareBit
    }

    @inlinable @inline(__always)
    public func leafRemoved(_ frame: HostFrame, counted: Bool, accessed: Bool, dirty: Bool) {
        guard counted else { return }
        if accessed { pages.setPFNAccessed(frame) }
        if dirty { pages.setPFNDirty(frame) }
    }

    @inlinable @inline(__always)
    public func dirtyCleared(_ frame: @autoclosure () -> HostFrame, counted: @autoclosure () -> Bool) {
        if counted() { pages.setPFNDirty(frame()) }
    }

    /// A PFN-mapped frame: nil, the lookup fails; else whether the page is counted. The reference is put at once, since
    /// the mapping is guarded by the notifier. Caller holds the page-table lock.
    func classifyMapped(_ frame: HostFrame) -> Bool? {
        guard let page = pages.refcountedPage(of: frame) else { return false }
        guard page.tryGet() else { return entryHasSoftwareBit ? false : nil }
        page.put()
        return true
    }

    /// A caller with FOLL_GET: a reference to a PFN-mapped page that looks counted, or nil.
    func reference(_ frame: HostFrame, holder: Holder) -> PageReference? {
        guard let page = pages.refcountedPage(of: frame), page.tryGet() else { return nil }
        return pages.claim(frame, holder: holder)
    }

    /// The end of a fault: the page is marked although no reference is held. Under mmu_lock.
    func finish(_ frame: HostFrame, _ kind: ReleaseKind) {
        if kind != .unused { pages.setPFNAccessed(frame) }
        if kind == .dirty, !entryHasSoftwareBit { pages.setPFNDirty(frame) }
    }
}
