import Frames
import HostMemory
import Synchronization
import Synchrony

/// A file of guest memory that no process can map. Kernel: a guest_memfd: `struct kvm_gmem`, its file and its inode.
/// Spec: generic 2.15.
///
/// Lives, by its count of references (descriptors, and KVM's while it looks at the file):
/// 1. open: count > 0. Slots point to it weakly: they hold no reference.
/// 2. dying: the count has reached 0 and stays there; nobody gets a page any more. Slots may still point here.
/// 3. released: no slot points here, nothing of it is mapped, its pages are gone, its reference to the VM is dropped.
///
/// It holds a reference to its VM until 3: a VM outlives its files, also if its own descriptor is closed first.
///
/// Locks: `invalidateLock` for writing to change `bindings` and to take pages away, for reading to add pages;
/// `bindingsLock` as well where `bindings` change, so that a fault may look with that alone.
public final class GuestMemoryFile: InaccessibleFile, @unchecked Sendable {
    // Unchecked: each mutable property names its lock.
    public let vm: VirtualMachine
    /// Kernel: the mapping's `invalidate_lock`.
    let invalidateLock = ReadWriteLock(.fileInvalidate, spinning: false)
    let bindingsLock = SpinLock(.objectIndex)
    /// Ascending by index, without overlap. Written under `invalidateLock` (for writing) and `bindingsLock`, read under
    /// either. Kernel: `gmem->bindings`.
    var bindings: [GuestMemoryBinding] = []
    /// Kernel: `f_count`.
    private let references = Atomic<Int>(1)
    private let referencesIdentity = ObjectIdentity()
    /// The next in the VM's list of files to release. Written by the task that dropped the last reference.
    var nextDying: UnsafeMutableRawPointer?

    /// The size in bytes.
    public var size: UInt64 { pageCount << pageShift }

    fileprivate init(vm: VirtualMachine, pageCount: UInt64) {
        self.vm = vm
        super.init(host: vm.host, pageCount: pageCount)
        vm.takeReference()
        vm.privateMemory.add(self)
    }

    // MARK: References

    /// Takes a reference unless the file is dying. Kernel: `get_file_active`, `fget`.
    func tryGet() -> Bool {
        schedulingPoint(.atomicUpdate, referencesIdentity.value)
        var old = references.load(ordering: .relaxed)
        while old > 0 {
            let (done, seen) = references.compareExchange(expected: old, desired: old + 1, ordering: .acquiring)
            if done { return true }
            old = seen
        }
        return false
    }

    /// Drops a reference; whether it was the last, and the file's release is the caller's to see to.
    func drop() -> Bool {
        schedulingPoint(.atomicUpdate, referencesIdentity.value)
        let old = references.subtract(1, ordering: .acquiringAndReleasing).oldValue
        precondition(old > 0, "a closed guest_memfd is closed")
        return old == 1
    }

    /// Drops KVM's own reference. The release takes slots_lock, so it is put aside where this was the last. Kernel:
    /// `fput`.
    func put() { if drop() { vm.privateMemory.postpone(self) } }

    /// Another descriptor for the same file. EBADF: it is closed. Kernel: `dup`.
    public func duplicate() throws(Errno) { if !tryGet() { throw .EBADF } }

    /// Closes a descriptor. With the last the file goes: nothing of it stays mapped, and slots bound to it have no
    /// private memory any more. No lock held, not inside `withSlots`. Kernel: `close`.
    public func closeDescriptor() {
        if drop() { release() }
        vm.runPostponedWork()
    }

    /// References held. For reports and checks.
    public var referenceCount: Int { references.load(ordering: .acquiring) }

    /// The end: count 0 → released. slots_lock keeps slots from being bound, unbound and deleted meanwhile.
    /// Kernel: `kvm_gmem_release`, then the inode's eviction.
    func release() {
        vm.slotsLock.lock()
        invalidateLock.lockForWrite()
        for binding in bindings { binding.slot.guestMemory?.forgetFile() }
        // Who has found the file through a slot has failed to get a reference by now.
        vm.privateMemory.readers.synchronize()
        endInvalidation(beginInvalidation(0..<pageCount))
        setBindings([])
        vm.privateMemory.remove(self)
        invalidateLock.unlockWrite()
        vm.slotsLock.unlock()
        evict()
        vm.dropReference()
    }

    func setBindings(_ new: [GuestMemoryBinding]) {
        bindingsLock.lock()
        bindings = new
        bindingsLock.unlock()
    }

    /// The page is broken: whoever maps it loses it, and gets EHWPOISON from now on. It stays in the file, so that nobody
    /// takes a fresh page for it. Kernel: `kvm_gmem_error_folio`.
    public override func pageFailed(_ index: UInt64) { unmapFailed(index) }

    // MARK: What a file does and this one does not

    /// No process maps it: ENODEV. Kernel: `mmap` of a file without that operation.
    public func map() throws(Errno) { throw .ENODEV }

    /// Its size never changes: EINVAL. Kernel: `kvm_gmem_setattr`.
    public func setSize(_ bytes: UInt64) throws(Errno) { throw .EINVAL }
}

extension VirtualMachine {
    /// Makes a file of `size` bytes with one descriptor. The VM's type is not looked at: only binding asks for it.
    /// EINVAL: a flag, no size (it is signed), part of a page. Kernel: `KVM_CREATE_GUEST_MEMFD`.
    public func createGuestMemory(size: UInt64, flags: UInt64 = 0) throws(Errno) -> GuestMemoryFile {
        guard flags == 0 else { throw .EINVAL }
        guard Int64(bitPattern: size) > 0, size & (pageSize - 1) == 0 else { throw .EINVAL }
        return GuestMemoryFile(vm: self, pageCount: size >> pageShift)
    }

    /// Files of private memory that are not released. For reports and checks.
    public var guestMemoryFiles: [GuestMemoryFile] { privateMemory.files }
}
