import Audit
import Frames
import Synchrony

// The public interface that the next steps fill in.
public final class MemoryObject: @unchecked Sendable {
    public let host: Host
    public init(host: Host, pages: Int, slow: Bool = false) { self.host = host }
    public var pages: Int { pending() }
    public func frame(of page: Int) -> HostFrame? { pending() }
    public func truncate(to pages: Int) { pending() }
    public func punchHole(_ pages: Range<Int>) { pending() }
    public func read(page: Int, offset: Int) throws(Errno) -> UInt64 { pending() }
    public func write(page: Int, offset: Int, _ value: UInt64) throws(Errno) { pending() }
}
open class DriverMapping: @unchecked Sendable {
    public let flags: VMAFlags
    public let wantsWriteNotification: Bool
    public init(flags: VMAFlags, wantsWriteNotification: Bool = false) {
        self.flags = flags
        self.wantsWriteNotification = wantsWriteNotification
    }
    open func fault(_ space: AddressSpace, _ vma: VMAInfo, _ address: UserAddress, write: Bool) -> DriverFault {
        .busError
    }
    open func makeWritable(_ space: AddressSpace, _ vma: VMAInfo, _ address: UserAddress) -> DriverFault { .inserted }
    open func waitForRetry() {}
    public func unmapMappings(pages: Range<Int>) { pending() }
}
func pending() -> Never { fatalError("pending") }
public final class AddressSpace: @unchecked Sendable {
    public let host: Host
    public let mmapLock = ReadWriteLock(.mmap, spinning: false)
    let pageTableLock = SpinLock(.pageTable)
    public let signals = SignalState()
    public init(host: Host) { self.host = host }
    public func map(at address: UserAddress, length: UInt64, protection: Protection, backing: Backing) throws(Errno) {
        pending()
    }
    public func unmap(_ range: Range<UserAddress>) throws(Errno) { pending() }
    public func protect(_ range: Range<UserAddress>, _ protection: Protection) throws(Errno) { pending() }
    public func advise(_ range: Range<UserAddress>, _ advice: Advice) throws(Errno) { pending() }
    public func fork() throws(Errno) -> AddressSpace { pending() }
    public func exit() { pending() }
    public func load(_ address: UserAddress) throws(Errno) -> UInt64 { pending() }
    public func store(_ address: UserAddress, _ value: UInt64) throws(Errno) { pending() }
    public func getUserPageFastOnly(_ address: UserAddress, write: Bool, holder: Holder) -> PageReference? { pending() }
    public func getUserPagesFastOnly(
        _ address: UserAddress, count: Int, write: Bool, holder: Holder, _ each: (Int, consuming PageReference) -> Void
    ) -> Int { pending() }
    public func pinUserPageFast(_ address: UserAddress, write: Bool, holder: Holder) throws(GetUserPagesError)
        -> PagePin
    { pending() }
    public func getUserPageUnlocked(_ address: UserAddress, _ flags: LookupFlags, holder: Holder)
        throws(GetUserPagesError) -> PageReference
    { pending() }
    public func pinUserPageUnlocked(_ address: UserAddress, _ flags: LookupFlags, holder: Holder)
        throws(GetUserPagesError) -> PagePin
    { pending() }
    public func vmaLookup(_ address: UserAddress) -> VMAInfo? { pending() }
    public func withPFNMapping<R>(of address: UserAddress, in vma: VMAInfo, _ body: (PFNMapping) -> R) -> R? {
        pending()
    }
    public func fixupUserFault(_ address: UserAddress, write: Bool) -> FixupResult { pending() }
    public func mappingLevel(of address: UserAddress) -> PageLevel { pending() }
    public func register(_ notifier: MMUNotifier) { pending() }
    public func unregister(_ notifier: MMUNotifier) { pending() }
    public func translate(_ address: UserAddress) -> HostTranslation? { pending() }
    public func insertFrame(_ frame: HostFrame, at address: UserAddress, in vma: VMAInfo, makeWritable: Bool = false)
        -> DriverFault
    { pending() }
    public func insertPage(_ frame: HostFrame, at address: UserAddress, in vma: VMAInfo) -> DriverFault { pending() }
}
extension Host {
    public func poison(_ frame: HostFrame) { pending() }
}
