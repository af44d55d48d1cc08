import Audit
import Frames
import HostMemory
import Synchrony

/// A frame between its translation for a frame cache and the moment at which the cache is valid. Under `precise` a page
/// that get-user-pages gave is referenced so long, and PFN-mapped memory never. Spec: generic 2.14, 2.20.
struct HeldFrame: ~Copyable {
    let frame: HostFrame
    private let hold: Hold

    fileprivate enum Hold: ~Copyable {
        /// PFN-mapped, or of `tracked`, whose reference is put at once where the notifier guards the mapping.
        case nothing
        case page(PageReference)
        case guessed(GuessedReference)
    }

    fileprivate init(_ frame: HostFrame, _ hold: consuming Hold) {
        self.frame = frame
        self.hold = hold
    }

    /// Puts the page. Nobody marks it dirty here.
    consuming func release(_ kind: ReleaseKind) {
        switch consume hold {
        case .nothing: break
        case .page(let page):
            if kind == .unused {
                page.releaseUnused()
            } else {
                // The cache's lock: an invalidation that cleans the page waits for it.
                page.releaseClean(stabilisedBy: .pageLock)
            }
        case .guessed(let reference): reference.release(kind, underLock: false)
        }
    }

    /// The pass that took it is refused. Up to 6.12 the page was marked accessed all the same. Spec: generic 10.1.
    consuming func releaseRefused() {
        switch consume hold {
        case .nothing: break
        case .page(let page):
            if SeriesPatch.refusedIsUnused.isUndone {
                page.releaseClean(stabilisedBy: .exclusiveOwner)
            } else {
                page.releaseUnused()
            }
        case .guessed(let reference): reference.release(.clean, underLock: false)
        }
    }
}

extension VirtualMachine {
    /// The frame behind `address`, for writing. Nil: there is none. May sleep. Kernel: `hva_to_pfn`, as `pfncache.c` calls
    /// it: memory that is mapped by frame number is taken whatever `allow_unsafe_mappings` says, for the notifier guards it.
    @export(interface)
    func translateForCache(_ address: UserAddress) -> HeldFrame? {
        let request = FollowRequest(frame: GuestFrame(0), write: true, holder: .frameCache)
        switch translate(address, request) {
        case .failed: return nil
        case .page(let page, _): return hold(page)
        case .mapped(let frame, _, let guessed, _):
            return guessed
                ? HeldFrame(frame, .guessed(GuessedReference(Guess(memory: memory), frame)))
                : HeldFrame(frame, .nothing)
        }
    }

    @export(interface)
    private func hold(_ page: consuming PageReference) -> HeldFrame {
        let frame = page.frame
        guard case .guess(let guess) = policy else { return HeldFrame(frame, .page(page)) }
        return HeldFrame(frame, .guessed(forget(page, guess)))
    }
}
