import Frames
import GuestMemory

/// All shadow pages of a VM: found by guest frame and role, and in the order of their making.
/// Kernel: `mmu_page_hash`, `active_mmu_pages`. Spec: x86 4.1. Under mmu_lock held for writing.
final class PageIndex {
    /// Kernel: `KVM_MMU_HASH_SHIFT`.
    private static let chainCount = 4096
    private var chains = [ShadowPage?](repeating: nil, count: chainCount)
    private(set) unowned(unsafe) var newest: ShadowPage?
    private(set) unowned(unsafe) var oldest: ShadowPage?

    /// Kernel: `hash_64(gfn, 12)`.
    private static func chain(of frame: GuestFrame) -> Int {
        Int((frame.number &* 0x61c8_8646_80b5_83eb) >> 52)
    }

    func add(_ page: ShadowPage) {
        let chain = Self.chain(of: page.frame)
        page.next = chains[chain]
        chains[chain] = page
        activate(page)
    }

    /// Takes the page out of its chain, which gives up the last reference that the index holds.
    func remove(_ page: ShadowPage) {
        deactivate(page)
        let chain = Self.chain(of: page.frame)
        guard chains[chain] !== page else {
            chains[chain] = page.next
            page.next = nil
            return
        }
        var before = chains[chain]
        while let found = before, found.next !== page { before = found.next }
        before?.next = page.next
        page.next = nil
    }

    /// Calls `body` for each page of the chain of `frame`, newest first, until it returns false.
    func forEach(near frame: GuestFrame, _ body: (ShadowPage) -> Bool) {
        var page = chains[Self.chain(of: frame)]
        while let found = page {
            page = found.next
            if !body(found) { return }
        }
    }

    private func activate(_ page: ShadowPage) {
        page.older = newest
        page.newer = nil
        if let newest { newest.newer = page } else { oldest = page }
        newest = page
        page.isActive = true
    }

    /// Takes the page off the list of active ones.
    func deactivate(_ page: ShadowPage) {
        guard page.isActive else { return }
        if let newer = page.newer { newer.older = page.older } else { newest = page.older }
        if let older = page.older { older.newer = page.newer } else { oldest = page.newer }
        page.newer = nil
        page.older = nil
        page.isActive = false
    }

    /// The pages of `frames`, active or not, in no order. For checks.
    func forEachPage(in frames: Range<GuestFrame>, _ body: (ShadowPage) -> Void) {
        guard frames.upperBound.number - frames.lowerBound.number < UInt64(Self.chainCount) else {
            return forEachPage { if frames.contains($0.frame) { body($0) } }
        }
        for number in frames.lowerBound.number..<frames.upperBound.number {
            forEach(near: GuestFrame(number)) {
                if $0.frame.number == number { body($0) }
                return true
            }
        }
    }

    /// Every page that is in a chain, active or not. For checks.
    func forEachPage(_ body: (ShadowPage) -> Void) {
        for chain in chains {
            var page = chain
            while let found = page {
                page = found.next
                body(found)
            }
        }
    }
}
