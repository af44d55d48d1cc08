import Frames
import HostMemory
import Synchrony

/// A frame cache's lock, held for reading, inside a read-side section of the slots. It ends with `unlock()` or with its
/// scope. While it lives, no invalidation of the cached page returns; do not sleep, and take no lock but spinning ones of
/// later rank. Kernel: `read_lock(&gpc->lock)`.
public struct FrameCacheGuard: ~Copyable {
    unowned(unsafe) let cache: FrameCache
    private let section: UInt32

    fileprivate init(_ cache: FrameCache) {
        self.cache = cache
        section = cache.vm.slotReaders.enter()
        cache.lock.lockForRead()
    }

    deinit {
        cache.lock.unlockRead()
        cache.vm.slotReaders.exit(section)
    }

    /// Ends the section here. Not in a scope that asked for bytes, which borrow the guard.
    public consuming func unlock() {}

    /// The first `length` bytes, if the cache is valid for them; else unlock, `refresh`, and try again.
    /// Kernel: `kvm_gpc_check`. Spec: generic 2.14, I-24.
    @_lifetime(borrow self)
    public borrowing func check(_ length: UInt64) -> CachedBytes? {
        guard let start = cache.bytes(length) else { return nil }
        return CachedBytes(cache, start, Int(length))
    }
}

/// The bytes of a frame cache that was checked. They can't outlive the cache's lock: an invalidation takes it for writing,
/// and the frame may be anybody's when that returns (I-24). Copied as an `InstallPermit` is.
public struct CachedBytes: ~Escapable {
    private unowned(unsafe) let cache: FrameCache
    private let start: SharedBytes
    public let count: Int

    @_lifetime(immortal)
    fileprivate init(_ cache: FrameCache, _ start: SharedBytes, _ count: Int) {
        self.cache = cache
        self.start = start
        self.count = count
    }

    /// Copies bytes out, from `offset` on. Traps where there are not so many.
    public func read(at offset: Int = 0, into buffer: UnsafeMutableRawBufferPointer) {
        part(offset, buffer.count).read(into: buffer)
    }

    /// Copies bytes in, from `offset` on, and logs the page as written, by the vCPU whose task does it, if one does. Traps
    /// where there are not so many.
    public func write(at offset: Int = 0, from buffer: UnsafeRawBufferPointer, by cpu: VirtualCPU? = nil) {
        part(offset, buffer.count).write(from: buffer)
        markDirty(by: cpu)
    }

    /// A number in the host's byte order.
    public func load<Value: FixedWidthInteger>(at offset: Int = 0, as type: Value.Type = Value.self) -> Value {
        var value: Value = 0
        withUnsafeMutableBytes(of: &value) { read(at: offset, into: $0) }
        return value
    }

    /// Writes a number in the host's byte order and logs the page as written.
    public func store<Value: FixedWidthInteger>(_ value: Value, at offset: Int = 0, by cpu: VirtualCPU? = nil) {
        withUnsafeBytes(of: value) { write(at: offset, from: $0, by: cpu) }
    }

    /// Logs the page as written: nothing for the process's own memory, which no slot shows. The page itself needs no mark.
    /// Every write above does this; in the kernel each user has to think of it, and one that does not loses the write in a
    /// migration (I-12). Kernel: `kvm_gpc_mark_dirty_in_slot`.
    public func markDirty(by cpu: VirtualCPU? = nil) {
        guard let address = cache.guestAddress, let slot = cache.slot else { return }
        cache.vm.markDirty(address.frame, in: slot, by: cpu)
    }

    private func part(_ offset: Int, _ length: Int) -> SharedBytes {
        precondition(offset >= 0 && length <= count && offset <= count - length, "beyond what was checked")
        return start.advanced(by: offset)
    }
}

extension FrameCache {
    /// Takes the lock for reading. One cache at a time: the caches' locks have one rank. No spinning lock of a later rank
    /// held, mmu_lock least of all.
    public func lockForUse() -> FrameCacheGuard { FrameCacheGuard(self) }

    /// What every user of a cache does: lock, check, use; and refresh and try again where the check fails. `body` may not
    /// sleep. Errors as `refresh`.
    public func withBytes<R>(_ length: UInt64, _ body: (CachedBytes) -> R) throws(Errno) -> R {
        while true {
            if let result = useIfValid(length, body) { return result }
            try refresh(length: length)
        }
    }

    // Embedded Swift 6.3 can't compile `withBytes` into a module that is not this one; these it can.

    /// Writes 8 bytes, `offset` into the page, of a cache that begins where a page does. Errors as `refresh`.
    @export(interface)
    public func store(_ value: UInt64, at offset: Int) throws(Errno) {
        try withBytes(pageSize) { $0.store(value, at: offset) }
    }

    /// Reads 8 bytes; as `store`.
    @export(interface)
    public func load(at offset: Int) throws(Errno) -> UInt64 {
        try withBytes(pageSize) { $0.load(at: offset) }
    }

    private func useIfValid<R>(_ length: UInt64, _ body: (CachedBytes) -> R) -> R? {
        let guardian = lockForUse()
        guard let bytes = guardian.check(length) else { return nil }
        return body(bytes)
    }

    /// The first of `length` bytes, or nil where they may not be used. Caller holds `lock` and is inside `withSlots`.
    fileprivate func bytes(_ length: UInt64) -> SharedBytes? {
        guard isActive, isValid, let userAddress else { return nil }
        if guestAddress != nil, generation != vm.slotsGeneration { return nil }
        guard length <= pageSize, userAddress.offset + length <= pageSize, let page = mapping?.bytes else { return nil }
        return SharedBytes(at: page + Int(userAddress.offset))
    }
}
