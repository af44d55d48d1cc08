import Audit
import Frames
import HostMemory

/// Up to 6.12: whether a frame is counted is guessed from its number, at every step. Spec: generic 10.1.
public struct Guess: ReferencePolicy {
    @usableFromInline let pages: LegacyPageLookup
    /// What of an entry's end is told to the page. All, but where a single patch is taken back (`policy(for:)`).
    @usableFromInline let marksAccessed: Bool
    @usableFromInline let marksDirty: Bool

    init(memory: PhysicalMemory, marksAccessed: Bool = true, marksDirty: Bool = true) {
        pages = LegacyPageLookup(memory: memory)
        self.marksAccessed = marksAccessed
        self.marksDirty = marksDirty
    }

    @inlinable @inline(__always)
    public func leafRemoved(_ frame: HostFrame, counted: Bool, accessed: Bool, dirty: Bool) {
        if accessed, marksAccessed { pages.setPFNAccessed(frame) }
        if dirty, marksDirty { pages.setPFNDirty(frame) }
    }

    @inlinable @inline(__always)
    public func dirtyCleared(_ frame: @autoclosure () -> HostFrame, counted: @autoclosure () -> Bool) {
        if marksDirty { pages.setPFNDirty(frame()) }
    }

    /// A PFN-mapped frame was found: takes a reference if the heuristic says "counted".
    /// False: the count is 0, the lookup fails. Caller holds the page-table lock. Kernel: `kvm_try_get_pfn`.
    func takeMapped(_ frame: HostFrame) -> Bool {
        guard let page = pages.refcountedPage(of: frame) else { return true }
        return page.tryGet()
    }

    /// The reference that GUP gave is forgotten; only the frame number remains.
    func forget(_ reference: consuming PageReference) { pages.adopt(reference) }

    /// Turns the reference that `takeMapped` may have taken into an owned one; nil if the heuristic says there is none.
    func claim(_ frame: HostFrame, holder: Holder) -> PageReference? { pages.claim(frame, holder: holder) }

    /// Kernel: `kvm_release_pfn_*`: what was taken is guessed again.
    func release(_ frame: HostFrame, _ kind: ReleaseKind, underLock: Bool) {
        guard let page = pages.refcountedPage(of: frame) else { return }
        if kind == .dirty { page.setDirty() }
        if kind != .unused { page.setAccessed() }
        page.put()
    }
}

/// What a fault holds under `guess`: maybe a reference.
@frozen @usableFromInline
struct GuessedReference: ~Copyable {
    // Frozen, or Embedded Swift refuses `discard self`.
    let policy: Guess
    let frame: HostFrame

    init(_ policy: Guess, _ frame: HostFrame) {
        self.policy = policy
        self.frame = frame
    }

    deinit {
        policy.pages.noteForgotten(frame)
        policy.release(frame, .unused, underLock: true)
    }

    consuming func release(_ kind: ReleaseKind, underLock: Bool) {
        let policy = policy
        let frame = frame
        discard self
        policy.release(frame, kind, underLock: underLock)
    }
}
