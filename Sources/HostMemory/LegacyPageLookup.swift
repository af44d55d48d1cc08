import Audit
import Frames
import Synchronization

/// From a frame number to a page, as the policies `guess` and `tracked` do it. Only their files may name this type: it
/// is what the precise policy exists to forbid (Spec: I-4). Spec: generic 10.1, the heuristic H.
@frozen
public struct LegacyPageLookup: @unchecked Sendable {
    // Unchecked: a pointer to shared memory that is itself safe to share.
    @usableFromInline let memory: Unmanaged<PhysicalMemory>

    /// `memory` must outlive the lookup.
    @inlinable public init(memory: PhysicalMemory) { self.memory = Unmanaged.passUnretained(memory) }

    /// H(pfn): no page frame: none; not reserved: the page; the zero page: the page; otherwise none.
    /// Kernel: `kvm_pfn_to_refcounted_page`.
    @inlinable @inline(__always)
    public func refcountedPage(of frame: HostFrame) -> LegacyPage? {
        memory._withUnsafeGuaranteedRef { memory in
            guard memory.hasPageFrame(frame) else { return nil }
            let page = memory.page(frame)
            let flags = page.pointee.flags.load(ordering: .relaxed)
            if flags & PageFlags.reserved != 0, flags & PageFlags.zeroPage == 0 { return nil }
            return LegacyPage(memory: self.memory, page: page)
        }
    }

    /// Tells the journal that the owner of a guessed reference went out of scope without a release (Spec: I-17).
    public func noteForgotten(_ frame: HostFrame) {
        memory._withUnsafeGuaranteedRef { $0.record(Event(.forgotten, holder: .heuristic, frame: frame)) }
    }

    /// Kernel: `kvm_set_pfn_dirty` of 6.12: a page frame exists and is not reserved. No reference is held.
    @inlinable @inline(__always)
    public func setPFNDirty(_ frame: HostFrame) {
        memory._withUnsafeGuaranteedRef { memory in
            guard memory.hasPageFrame(frame) else { return }
            LegacyPage(memory: self.memory, page: memory.page(frame)).setDirty()
        }
    }

    /// Kernel: `kvm_set_pfn_accessed` of 6.12.
    @inlinable @inline(__always)
    public func setPFNAccessed(_ frame: HostFrame) {
        memory._withUnsafeGuaranteedRef { memory in
            guard memory.hasPageFrame(frame) else { return }
            LegacyPage(memory: self.memory, page: memory.page(frame)).setAccessed()
        }
    }
}

/// A page that the heuristic found; owns nothing.
@frozen
public struct LegacyPage {
    @usableFromInline let memory: Unmanaged<PhysicalMemory>
    @usableFromInline let page: UnsafeMutablePointer<PageFrame>

    @inlinable @inline(__always)
    init(memory: Unmanaged<PhysicalMemory>, page: UnsafeMutablePointer<PageFrame>) {
        self.memory = memory
        self.page = page
    }

    @inlinable public var frame: HostFrame { memory._withUnsafeGuaranteedRef { $0.frame(of: page) } }

    /// Adds 1 to this very page's counter, not its folio head's, unless it is 0: every tail page refuses.
    /// Kernel: `get_page_unless_zero(page)` in `kvm_try_get_pfn`.
    @inlinable @inline(__always)
    public func tryGet() -> Bool {
        memory._withUnsafeGuaranteedRef { memory in
            var old = page.pointee.referenceCount.load(ordering: .relaxed)
            while old > 0 {
                let (done, seen) = page.pointee.referenceCount.weakCompareExchange(
                    expected: old, desired: old + 1, ordering: .acquiring)
                if done {
                    memory.record(Event(.referenceTaken, holder: .heuristic, frame: memory.frame(of: page)))
                    return true
                }
                old = seen
            }
            return false
        }
    }

    /// Drops a reference of the page's folio. Kernel: `put_page`.
    @inlinable @inline(__always)
    public func put() {
        memory._withUnsafeGuaranteedRef { memory in
            memory.record(Event(.referenceDropped, holder: .heuristic, frame: memory.frame(of: page)))
            memory.put(page)
        }
    }

    /// Kernel: `SetPageDirty`; a reserved page is left alone.
    @inlinable @inline(__always)
    public func setDirty() {
        memory._withUnsafeGuaranteedRef { memory in
            if memory.mark(memory.head(of: page), PageFlags.dirty(.kvm)) {
                memory.record(Event(.markedDirty, holder: .heuristic, frame: memory.frame(of: page)))
            }
        }
    }

    /// Kernel: `mark_page_accessed`; a reserved page is left alone.
    @inlinable @inline(__always)
    public func setAccessed() {
        memory._withUnsafeGuaranteedRef { memory in
            if memory.mark(memory.head(of: page), PageFlags.accessed(.kvm)) {
                memory.record(Event(.markedAccessed, holder: .heuristic, frame: memory.frame(of: page)))
            }
        }
    }
}
