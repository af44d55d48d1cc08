import Audit
import Frames
import Synchronization
import Synchrony

/// Counting: the four ways a page's count moves. A large folio counts in its head; `get` on a count of 0 is refused.
extension PhysicalMemory {
    /// Adds a reference unless the count is 0. Kernel: `folio_try_get`.
    @inlinable @inline(__always) func tryGet(_ page: UnsafeMutablePointer<PageFrame>) -> Bool {
        let head = head(of: page)
        schedulingPoint(.pageGet, frame(of: head).physicalAddress)
        return countUp(head, by: 1)
    }

    /// The same under the lists' lock, which orders it. Kernel: `folio_try_get` in `isolate_lru_folios`.
    func tryGetListed(_ head: UnsafeMutablePointer<PageFrame>) -> Bool {
        schedulingNote(.pageGet, frame(of: head).physicalAddress)
        return countUp(head, by: 1)
    }

    /// False: the count is 0, and stays.
    @inlinable @inline(__always)
    func countUp(_ head: UnsafeMutablePointer<PageFrame>, by step: Int32) -> Bool {
        var old = head.pointee.referenceCount.load(ordering: .relaxed)
        while old > 0 {
            let (done, seen) = head.pointee.referenceCount.weakCompareExchange(
                expected: old, desired: old + step, ordering: .acquiring)
            if done { return true }
            old = seen
        }
        return false
    }

    /// Adds a reference to a page that has one already. Kernel: `folio_get`.
    @inlinable func get(_ page: UnsafeMutablePointer<PageFrame>) {
        let head = head(of: page)
        schedulingNote(.pageGet, frame(of: head).physicalAddress)
        let old = head.pointee.referenceCount.add(1, ordering: .relaxed).oldValue
        precondition(old > 0, "a page with count 0 is referenced")
    }

    /// Drops a reference and frees the folio with the last. Kernel: `folio_put`.
    @inlinable @inline(__always) func put(_ page: UnsafeMutablePointer<PageFrame>) {
        let head = head(of: page)
        schedulingPoint(.pagePut, frame(of: head).physicalAddress)
        let old = head.pointee.referenceCount.wrappingSubtract(1, ordering: .acquiringAndReleasing).oldValue
        if old <= 0 { return refuse(head, old) }
        if old == 1 { freeFolio(head) }
    }

    /// A put too many: the end of a kernel, or, where a journal listens, a finding, and the run goes on.
    @usableFromInline func refuse(_ head: UnsafeMutablePointer<PageFrame>, _ old: Int32) {
        guard let journal else { preconditionFailure("a page with count 0 is put") }
        head.pointee.referenceCount.store(old, ordering: .relaxed)
        journal.add(Finding(.i2, "a page with count 0 is put", frame: frame(of: head)))
    }

    /// Whether the caller's entry has the only reference; what the swap device's cache holds without need is given up.
    /// Kernel: `wp_can_reuse_anon_folio`.
    func isReferencedOnce(_ head: UnsafeMutablePointer<PageFrame>, _ swap: SwapDevice?) -> Bool {
        if head.pointee.referenceCount.load(ordering: .acquiring) == 1 { return true }
        guard let swap, head.pointee.flags.load(ordering: .relaxed) & PageFlags.swapCache != 0,
            swap.forget(head, self)
        else { return false }
        return head.pointee.referenceCount.load(ordering: .acquiring) == 1
    }

    /// A page of a pool goes back to it.
    private func freeHuge(_ head: UnsafeMutablePointer<PageFrame>) {
        for pool in hugePools where pool.level.frames == 1 << UInt64(head.pointee.order) { return pool.give(head) }
        preconditionFailure("a huge page without its pool")
    }

    @usableFromInline func freeFolio(_ head: UnsafeMutablePointer<PageFrame>) {
        // A plain higher-order block is freed by its owner, who knows the order; a lost first reference frees one frame.
        let flags = head.pointee.flags.load(ordering: .relaxed)
        let compound = flags & PageFlags.head != 0
        if flags & PageFlags.hugeTLB != 0 { return freeHuge(head) }
        if flags & PageFlags.listed != 0, let lists { lists.remove(head) }
        freePages(frame(of: head), order: compound ? Int(head.pointee.order) : 0)
    }

    /// Adds a FOLL_PIN. The zero page is not counted. Kernel: `try_grab_folio(FOLL_PIN)`. Spec: generic 1.9.
    func tryPin(_ page: UnsafeMutablePointer<PageFrame>) -> Bool {
        let head = head(of: page)
        let flags = head.pointee.flags.load(ordering: .relaxed)
        if flags & PageFlags.zeroPage != 0 { return true }
        schedulingPoint(.pageGet, frame(of: head).physicalAddress)
        let isLarge = flags & PageFlags.head != 0
        guard countUp(head, by: isLarge ? 1 : PageFrame.pinBias) else { return false }
        if isLarge { head.pointee.pinCount.add(1, ordering: .relaxed) }
        return true
    }

    func unpin(_ page: UnsafeMutablePointer<PageFrame>) {
        let head = head(of: page)
        let flags = head.pointee.flags.load(ordering: .relaxed)
        if flags & PageFlags.zeroPage != 0 { return }
        schedulingPoint(.pagePut, frame(of: head).physicalAddress)
        let large = flags & PageFlags.head != 0
        if large { head.pointee.pinCount.subtract(1, ordering: .relaxed) }
        let step: Int32 = large ? 1 : PageFrame.pinBias
        let old = head.pointee.referenceCount.subtract(step, ordering: .acquiringAndReleasing).oldValue
        precondition(old >= step, "a page that was not pinned is unpinned")
        if old == step { freeFolio(head) }
    }

    /// Whether somebody may have pinned the folio for DMA; may be true by mistake. Kernel: `folio_maybe_dma_pinned`.
    func maybePinned(_ page: UnsafeMutablePointer<PageFrame>) -> Bool {
        let head = head(of: page)
        if head.pointee.flags.load(ordering: .relaxed) & PageFlags.head != 0 {
            return head.pointee.pinCount.load(ordering: .relaxed) > 0
        }
        return head.pointee.referenceCount.load(ordering: .relaxed) >= PageFrame.pinBias
    }
}

/// One reference to a page, owned. Kernel: a `FOLL_GET` reference. Spec: generic 2.9, 2.10, I-1, I-2.
///
/// It ends in exactly one of the three releases. One that is dropped without is released as unused, and the journal
/// reports it. Nothing turns it into a `PagePin` (Spec: I-3).
@frozen
public struct PageReference: ~Copyable {
    @usableFromInline let memory: Unmanaged<PhysicalMemory>
    @usableFromInline let page: UnsafeMutablePointer<PageFrame>
    public let holder: Holder

    /// Takes over a reference that has been counted.
    init(adopting page: UnsafeMutablePointer<PageFrame>, of memory: PhysicalMemory, holder: Holder) {
        self.init(adopting: page, of: Unmanaged.passUnretained(memory), holder: holder)
    }

    init(adopting page: UnsafeMutablePointer<PageFrame>, of memory: Unmanaged<PhysicalMemory>, holder: Holder) {
        self.memory = memory
        self.page = page
        self.holder = holder
        memory._withUnsafeGuaranteedRef {
            $0.record(Event(.referenceTaken, holder: holder, frame: $0.frame(of: page)))
        }
    }

    deinit {
        memory._withUnsafeGuaranteedRef { memory in
            if !SeriesPatch.pageIsRequired.isUndone {
                memory.record(Event(.forgotten, holder: holder, frame: memory.frame(of: page)))
            }
            memory.drop(page, holder, .unused, underLock: true)
        }
    }

    /// The frame that is referenced: the exact page, also inside a large folio.
    public var frame: HostFrame { memory._withUnsafeGuaranteedRef { $0.frame(of: page) } }

    /// Whether the page is one of a folio of several. Kernel: `folio_test_large`.
    public var isPartOfLargeFolio: Bool {
        page.pointee.headDistance.load(ordering: .relaxed) != 0
            || page.pointee.flags.load(ordering: .relaxed) & PageFlags.head != 0
    }

    /// Kernel: `kvm_release_page_unused`. Flags stay as they are.
    public consuming func releaseUnused() {
        finish(SeriesPatch.releaseUnused.isUndone ? .clean : .unused, underLock: false)
    }

    /// Kernel: `kvm_release_page_clean`: marks the page accessed.
    /// - Parameter stability: what keeps the page from being cleaned or freed under the caller.
    public consuming func releaseClean(stabilisedBy stability: PageStability) {
        finish(.clean, underLock: stability == .mmuLock && isHeld(.mmu))
    }

    /// Kernel: `kvm_release_page_dirty`: marks the page dirty and accessed.
    public consuming func releaseDirty(stabilisedBy stability: PageStability) {
        finish(.dirty, underLock: stability == .mmuLock && isHeld(.mmu))
    }

    private consuming func finish(_ kind: ReleaseKind, underLock: Bool) {
        let memory = memory
        let page = page
        let holder = holder
        discard self
        memory._withUnsafeGuaranteedRef { $0.drop(page, holder, kind, underLock: underLock) }
    }
}

/// What stabilises a page while its state is changed. Spec: generic 2.9 ("or page otherwise stabilised by caller").
public enum PageStability: UInt8, Sendable {
    /// `mmu_lock` is held, and the retry check has passed.
    case mmuLock
    /// The page's own lock, or a lock that keeps its mapping from being cleaned.
    case pageLock
    /// The caller owns the only mapping (vSIE, ultravisor sharing).
    case exclusiveOwner
}

/// One FOLL_PIN on a page, owned. Spec: generic 1.9, 2.12, I-3.
@frozen
public struct PagePin: ~Copyable {
    @usableFromInline let memory: Unmanaged<PhysicalMemory>
    @usableFromInline let page: UnsafeMutablePointer<PageFrame>
    public let holder: Holder

    init(adopting page: UnsafeMutablePointer<PageFrame>, of memory: PhysicalMemory, holder: Holder) {
        self.memory = Unmanaged.passUnretained(memory)
        self.page = page
        self.holder = holder
        memory.record(Event(.pinTaken, holder: holder, frame: memory.frame(of: page)))
    }

    deinit {
        memory._withUnsafeGuaranteedRef { memory in
            memory.record(Event(.forgotten, holder: holder, frame: memory.frame(of: page)))
            memory.record(Event(.pinDropped, holder: holder, frame: memory.frame(of: page)))
            memory.unpin(page)
        }
    }

    public var frame: HostFrame { memory._withUnsafeGuaranteedRef { $0.frame(of: page) } }

    /// Kernel: `unpin_user_page`, after `set_page_dirty` (if `dirty`) and `mark_page_accessed`. The pin itself
    /// stabilises the page: file systems treat it as possibly written by DMA. Spec: generic 2.12.
    public consuming func unpin(dirty: Bool) {
        let memory = memory
        let page = page
        let holder = holder
        discard self
        memory._withUnsafeGuaranteedRef { memory in
            if dirty { memory.markDirty(page, holder) }
            memory.markAccessed(page, holder)
            memory.record(Event(.pinDropped, holder: holder, frame: memory.frame(of: page)))
            memory.unpin(page)
        }
    }
}

extension PhysicalMemory {
    @usableFromInline func markDirty(_ page: UnsafeMutablePointer<PageFrame>, _ holder: Holder) {
        let changed = mark(head(of: page), PageFlags.dirty(holder.isKVM ? .kvm : .driver))
        if changed { record(Event(.markedDirty, holder: holder, frame: frame(of: page))) }
    }

    @usableFromInline func markAccessed(_ page: UnsafeMutablePointer<PageFrame>, _ holder: Holder) {
        let changed = mark(head(of: page), PageFlags.accessed(holder.isKVM ? .kvm : .driver))
        if changed { record(Event(.markedAccessed, holder: holder, frame: frame(of: page))) }
    }

    @usableFromInline func drop(
        _ page: UnsafeMutablePointer<PageFrame>, _ holder: Holder, _ kind: ReleaseKind, underLock: Bool
    ) {
        let frame = frame(of: page)
        // One look where all marks are there already.
        let originator: Originator = holder.isKVM ? .kvm : .driver
        let wanted =
            (kind == .dirty ? PageFlags.dirty(originator) : 0)
            | (kind != .unused ? PageFlags.accessed(originator) : 0)
        if head(of: page).pointee.flags.load(ordering: .relaxed) & wanted != wanted {
            if kind == .dirty { markDirty(page, holder) }
            markAccessed(page, holder)
        }
        record(
            Event(.released, holder: holder, frame: frame, value: UInt64(kind.rawValue) | (underLock ? 0x100 : 0)))
        record(Event(.referenceDropped, holder: holder, frame: frame))
        put(page)
    }
}
