import Frames
import GuestMemory

extension ShadowMMU {
    /// What the vCPU's tables say of `address`: the guest and the host frame of the leaf's first page, and its level.
    /// Nothing is set in them. For checks: nobody else runs.
    public func mapping(of cpu: VirtualCPU, at address: UInt64) -> (
        guest: GuestFrame, frame: HostFrame, level: PageLevel
    )? {
        guard var page = topPage(state(of: cpu), address) else { return nil }
        while true {
            let index = shadowIndex(address, page.role.level)
            let value = entry(page, index).peek()
            guard EntryBits.isPresent(value) else { return nil }
            if EntryBits.isLeaf(value, page.role.level) {
                return (page.guestFrame(of: index), EntryBits.field.frame(in: value), page.level)
            }
            page = child(value)
        }
    }
}
