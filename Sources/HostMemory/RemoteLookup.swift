import Frames

extension AddressSpace {
    /// Faults the page at `address` in for write, for a task that is none of the process's, and keeps nothing of it: no
    /// page is handed out, so no reference is taken. May sleep; no lock held. Kernel: `get_user_pages_remote` with
    /// FOLL_WRITE and without pages. Spec: generic 6.1.
    ///
    /// Whether it is there now. Nobody acts on a failure (PFN maps, holes, an address space that has ended): whoever
    /// wanted the page looks for himself.
    @discardableResult
    public func faultInRemotely(_ address: UserAddress) -> Bool {
        let page = address.aligned(to: .page4K)
        do throws(Errno) {
            try populate(page..<(page + pageSize), write: true)
            return true
        } catch {
            return false
        }
    }
}
