import Frames
import HostMemory

/// A process's pipe with pages in it, each with a reference. Kernel: what `vmsplice` fills.
final class PagePipe {
    private var pages: [HeldPage] = []
    /// Kernel: `PIPE_DEF_BUFFERS`.
    private static let most = 16

    private final class HeldPage {
        private var page: PageReference?
        init(_ page: consuming PageReference) { self.page = consume page }
        func release() { if let page = page.take() { page.releaseUnused() } }
    }

    /// EAGAIN: it is full; EFAULT: no page that can be taken; EINVAL: half of one.
    func take(_ address: UInt64, _ space: AddressSpace) throws(Errno) {
        guard pages.count < Self.most else { throw .EAGAIN }
        guard address < UserAddress.end.value, address & (pageSize - 1) == 0 else { throw .EFAULT }
        do throws(GetUserPagesError) {
            let page = try space.getUserPageUnlocked(
                UserAddress(address), LookupFlags(write: false), holder: .driver)
            pages.append(HeldPage(page))
        } catch {
            throw error == .noMemory ? .ENOMEM : .EFAULT
        }
    }

    func drain() {
        for page in pages { page.release() }
        pages = []
    }
}
