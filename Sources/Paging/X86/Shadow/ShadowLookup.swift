import Frames
import GuestMemory

extension ShadowMMU {
    /// The leaf of the vCPU's own tables that translates `address`, the guest frame of its first page, and its level.
    /// Nothing is set in them. For checks: nobody else runs.
    public func leaf(of cpu: VirtualCPU, at address: UInt64) -> (entry: UInt64, guest: GuestFrame, level: PageLevel)? {
        guard var page = topPage(state(of: cpu), address) else { return nil }
        while true {
            let index = shadowIndex(address, page.role.level)
            let value = entry(page, index).peek()
            guard EntryBits.isPresent(value) else { return nil }
            if EntryBits.isLeaf(value, page.role.level) { return (value, page.guestFrame(of: index), page.level) }
            page = child(value)
        }
    }
}
