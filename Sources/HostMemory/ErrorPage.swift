import Audit
import Frames

extension Host {
    /// What stands for "no page" where `SeriesPatch.nilForNoPage` is taken back: something that is not nil. Its own page of
    /// zeros, so that who takes it for a page harms nobody. Kernel: `KVM_ERR_PTR_BAD_PAGE`, which was gone with the patch.
    public func errorPage(holder: Holder) -> PageReference {
        let page = memory.page(zeroPage)
        memory.get(page)
        return PageReference(adopting: page, of: memory, holder: holder)
    }
}
