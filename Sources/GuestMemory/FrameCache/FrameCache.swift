// Frame caches: guest pages that KVM itself reads and writes again and again, at their host frames: clocks, runstate,
// shared info. What guards such a mapping is the notifier, not a reference.
//
// Read next `Refresh.swift`, then `CacheInvalidation.swift`; `CachedBytes.swift` is what users of a cache see.

import Frames
import HostMemory
import Synchrony

/// Up to one page of guest memory, or of the process's, with the frame behind it. Kernel: `struct gfn_to_pfn_cache`.
/// Spec: generic 2.14, I-24.
///
/// It holds no reference. Its bytes are used under its lock, held for reading, after a check that it still is valid; an
/// invalidation takes the lock for writing and so waits for whoever is using them. `lockForUse()` is the only way in.
///
/// States, changed with `lock` held for writing:
/// 1. *inactive*: not in the VM's list, maps nothing;
/// 2. *active, invalid*: in the list; must be refreshed before use. It may still have the kernel mapping of the frame it
///    had, which the next refresh uses again or drops;
/// 3. *active, valid*: the frame is what the process maps there now.
///
/// 1 → 2 `activate`; 2 → 3 `refresh`; 3 → 2 an invalidation, a failing refresh; 2, 3 → 1 `deactivate`. That a cache is
/// valid is half the story: of guest memory it is also of the slots' generation, and a later one makes the check fail.
public final class FrameCache: @unchecked Sendable {
    // Unchecked: what is below changes with `lock` held for writing, and but for `isValid` only by the holder of
    // `refreshLock`, who may therefore read all else without `lock`.
    public let vm: VirtualMachine
    /// Kernel: `gpc->lock`.
    let lock = ReadWriteLock(.frameCache, spinning: true)
    /// Kernel: `gpc->refresh_lock`.
    let refreshLock = SleepingLock(.frameCacheRefresh)

    /// Nil: the cache is of the process's memory, or was never told of any. Kernel: `gpc->gpa`.
    var guestAddress: GuestAddress?
    /// The slots' generation at the last look at them. Kernel: `gpc->generation`.
    var generation: UInt64 = 0
    /// Kernel: `gpc->memslot`.
    var slot: MemorySlot?
    /// The first cached byte; nil: none was found. Kernel: `gpc->uhva`.
    var userAddress: UserAddress?
    /// Kernel: `gpc->pfn` and `gpc->khva`.
    var mapping: KernelMapping?
    /// Kernel: `gpc->active`.
    var isActive = false
    /// Kernel: `gpc->valid`.
    var isValid = false

    /// Kernel: `kvm_gpc_init`.
    public init(_ vm: VirtualMachine) { self.vm = vm }

    /// What to cache.
    enum Place: Equatable {
        case guest(GuestAddress)
        case user(UserAddress)

        var offset: UInt64 {
            switch self {
            case .guest(let address): address.offset
            case .user(let address): address.offset
            }
        }

        /// Whether `length` bytes from here on lie in one page.
        func fits(_ length: UInt64) -> Bool { length <= pageSize && offset + length <= pageSize }
    }

    /// Caches `length` bytes of guest memory from `address` on, which must lie in one page of a slot that can be written.
    /// An active cache goes to the new place. May sleep; no lock held.
    ///
    /// EINVAL: no address, or more than one page; nothing has changed. EFAULT: there is no such memory now; the cache is
    /// active all the same, and a refresh may succeed later. Kernel: `kvm_gpc_activate`.
    public func activate(_ address: GuestAddress, length: UInt64) throws(Errno) {
        guard address.value != .max else { throw .EINVAL }
        try activate(.guest(address), length)
    }

    /// The same for the process's own memory, in a slot or not. Kernel: `kvm_gpc_activate_hva`.
    public func activate(user address: UserAddress, length: UInt64) throws(Errno) {
        guard address < UserAddress.end else { throw .EINVAL }
        try activate(.user(address), length)
    }

    private func activate(_ place: Place, _ length: UInt64) throws(Errno) {
        guard place.fits(length) else { throw .EINVAL }
        let section = vm.slotReaders.enter()
        defer { vm.slotReaders.exit(section) }
        refreshLock.lock()
        defer { refreshLock.unlock() }
        if !isActive { try enlist() }
        try renew(place)
    }

    /// In the list before it is active: a cache that a refresh may make valid must hear of invalidations. EIO: it is
    /// valid already, which can't be (I-24); the VM is done for. Kernel: `KVM_BUG_ON`.
    private func enlist() throws(Errno) {
        guard !isValid else {
            vm.die()
            throw .EIO
        }
        vm.frameCaches.add(self)
        lock.lockForWrite()
        isActive = true
        lock.unlockWrite()
    }

    /// Looks its memory up again where that is needed, for `length` bytes from the first on. That it returns does not mean
    /// that the bytes may be used: an invalidation may have come since, and the user locks and checks again.
    /// May sleep; no lock held. EINVAL: not active, or more than one page. EFAULT: no such memory now.
    /// Kernel: `kvm_gpc_refresh`.
    public func refresh(length: UInt64) throws(Errno) {
        let section = vm.slotReaders.enter()
        defer { vm.slotReaders.exit(section) }
        refreshLock.lock()
        defer { refreshLock.unlock() }
        guard let place, place.fits(length), isActive else { throw .EINVAL }
        try renew(place)
    }

    /// Guest memory or the process's; nil before the first activation.
    private var place: Place? {
        if let guestAddress { return .guest(guestAddress) }
        return userAddress.map { .user($0) }
    }

    /// Lets go of everything but the place. An inactive cache stays as it is. May sleep. Kernel: `kvm_gpc_deactivate`.
    @export(interface)
    public func deactivate() {
        refreshLock.lock()
        defer { refreshLock.unlock() }
        guard isActive else { return }
        lock.lockForWrite()
        isActive = false
        isValid = false
        let dropped = mapping.take()
        lock.unlockWrite()
        vm.frameCaches.remove(self)
        _ = consume dropped
    }
}
