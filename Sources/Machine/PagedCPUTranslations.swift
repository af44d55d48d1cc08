import Audit
import Frames
import GuestMemory
import Hardware
import Paging
import Synchrony

// What a vCPU under shadow paging keeps of translations, for checks; and the walks that nobody asked for.

extension PagedCPU {
    /// As `GuestCPU.speculate`, at a linear address.
    public func speculate(_ address: UInt64) {
        schedulingPoint(.conditionRead, identity.value)
        guard isExecuting, root != nil else { return }
        let session = entries
        guard case .translated(let translation) = walker.walk(address, .read) else { return }
        buffer.fill(address, translation) { isExecuting && entries == session }
    }

    /// Remembers which guest frame is behind a linear page that is not its own. The processor doesn't know it, and KVM's
    /// entry may be gone when a check asks.
    func noteGuestFrame(at address: UInt64) {
        guard let found = mmu.leaf(of: self, at: address) else { return }
        let frame = EntryBits.field.frame(in: found.entry)
        let page = address >> pageShift & ~(found.level.frames - 1)
        guard found.guest.number != page else { return }
        if reachedFrames.contains(where: { $0.page == page && $0.frame == frame && $0.guest == found.guest }) {
            return
        }
        reachedFrames.append((page, found.level.frames, frame, found.guest))
    }

    /// The guest frame behind a linear page that is translated to `frame`: the last that it was known for.
    func guestFrame(at address: UInt64, _ frame: HostFrame) -> GuestFrame {
        let page = address >> pageShift
        for known in reachedFrames.reversed() where known.page <= page && page - known.page < known.count {
            if known.frame.number &+ (page - known.page) == frame.number {
                return GuestFrame(known.guest.number + (page - known.page))
            }
        }
        return GuestFrame(page)
    }

    /// What the TLB holds, by guest frames.
    var cachedLeaves: [LeafMirror.Leaf] {
        buffer.entries.map { entry in
            let translation = entry.translation
            let level: PageLevel =
                translation.bytes >= PageLevel.page1G.bytes
                ? .page1G : translation.bytes >= PageLevel.page2M.bytes ? .page2M : .page4K
            return LeafMirror.Leaf(
                guest: guestFrame(at: entry.first, translation.frame), frame: translation.frame, level: level,
                writable: translation.rights.writable && translation.dirty)
        }
    }
}
