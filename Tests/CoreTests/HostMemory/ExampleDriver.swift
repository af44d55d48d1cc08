// The example of "Writing a driver" in the documentation, compiled and run; a test compares the two.

// begin example
import Frames
import HostMemory
import Synchrony

/// A page that the device writes and processes read, after a page of commands that processes write.
final class Mailbox: DriverMapping, @unchecked Sendable {
    // Unchecked: `isOpen` is touched only under `lock`.
    private let owned: DriverPages
    private let lock = SleepingLock(.buffer)
    private var isOpen = true

    /// Nil: no memory.
    init?(_ host: Host) {
        guard let owned = DriverPages(host, count: 2) else { return nil }
        self.owned = owned
        super.init(name: "mailbox", flags: .frames)
        claim(owned)
    }

    override func mapped(_ space: AddressSpace, _ vma: VMAInfo) -> Errno? {
        vma.flags.shared && vma.range.upperBound.page - vma.range.lowerBound.page <= 2 ? nil : .EINVAL
    }

    override func fault(
        _ space: AddressSpace, _ vma: VMAInfo, _ address: UserAddress, write: Bool
    ) -> DriverFault {
        lock.lock()
        defer { lock.unlock() }
        let page = vma.backingPage(of: address)
        guard isOpen, page < owned.frames.count else { return .busError }
        return space.insertFrame(owned.frames[page], at: address, in: vma)
    }

    /// From now on every access is a SIGBUS, and the pages are the host's again.
    func close() {
        lock.lock()
        isOpen = false
        unmapMappings(pages: 0..<2)
        owned.free(from: self)
        lock.unlock()
    }
}
// end example
