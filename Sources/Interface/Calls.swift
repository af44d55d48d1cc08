import CKVMInterface
import Frames
import GuestMemory
import HostMemory

/// Errnos that only the interface gives.
enum InterfaceErrno {
    /// ENOTTY: a request that there is not.
    static let noSuchRequest = -25
    /// EFBIG.
    static let fileTooBig = -27
}

extension VirtualMachine {
    /// One ioctl of the VM's descriptor: what the system call returns, or a negative errno.
    ///
    /// - Parameters:
    ///   - argument: the structure, or for a request that takes a number, that number as an address. Nil is the null
    ///     pointer: EFAULT where a structure is wanted.
    ///   - process: who calls; nil: who made the VM. Spec: generic 4.4, row 0.
    ///
    /// KVM_CREATE_VCPU returns 0 here, and what it made is `cpus.last`; other descriptors are numbers of `descriptors`.
    public func ioctl(_ request: UInt32, _ argument: UnsafeMutableRawPointer?, by process: AddressSpace? = nil) -> Int {
        result { () throws(Errno) in
            try core.checkCaller(process ?? core.addressSpace)
            switch request {
            case KVM_SET_USER_MEMORY_REGION:
                return try setRegion(version1: try copy(argument, into: kvm_userspace_memory_region()))
            case KVM_SET_USER_MEMORY_REGION2:
                return try setRegion(try copy(argument, into: kvm_userspace_memory_region2()))
            case KVM_GET_DIRTY_LOG: return try getDirtyLog(try copy(argument, into: kvm_dirty_log()))
            case KVM_CLEAR_DIRTY_LOG: return try clearDirtyLog(try copy(argument, into: kvm_clear_dirty_log()))
            case KVM_ENABLE_CAP: return try enableCapability(try copy(argument, into: kvm_enable_cap()))
            case KVM_CHECK_EXTENSION: return checkExtension(UInt64(UInt(bitPattern: argument)))
            case KVM_CREATE_VCPU:
                _ = try createCPU(id: UInt64(UInt(bitPattern: argument)))
                return 0
            case KVM_CREATE_GUEST_MEMFD:
                return try createGuestMemory(try copy(argument, into: kvm_create_guest_memfd()))
            case KVM_SET_MEMORY_ATTRIBUTES where features.attributes:
                return try setAttributes(try copy(argument, into: kvm_memory_attributes()))
            case KVM_RESET_DIRTY_RINGS: return Int(try core.resetDirtyRings())
            case KVM_GET_STATS_FD: return descriptors.open(.statistics { [self] in statistics })
            default: return InterfaceErrno.noSuchRequest
            }
        }
    }

    // MARK: Slots

    /// Row 2: this form knows two flags.
    private func setRegion(version1 region: kvm_userspace_memory_region) throws(Errno) -> Int {
        guard region.flags & ~UInt32(KVM_MEM_LOG_DIRTY_PAGES | KVM_MEM_READONLY) == 0 else { throw .EINVAL }
        var newer = kvm_userspace_memory_region2()
        newer.slot = region.slot
        newer.flags = region.flags
        newer.guest_phys_addr = region.guest_phys_addr
        newer.memory_size = region.memory_size
        newer.userspace_addr = region.userspace_addr
        return try setRegion(newer)
    }

    /// Rows 3 to 22 are the core's; of the flags that its type can't spell, row 4's, every row before and after up to
    /// the overlap's gives the same EINVAL.
    private func setRegion(_ region: kvm_userspace_memory_region2) throws(Errno) -> Int {
        let known = UInt32(KVM_MEM_LOG_DIRTY_PAGES | KVM_MEM_READONLY | KVM_MEM_GUEST_MEMFD)
        guard region.flags & ~known == 0 else { throw .EINVAL }
        var flags = SlotFlags(
            logDirtyPages: region.flags & UInt32(KVM_MEM_LOG_DIRTY_PAGES) != 0,
            readOnly: region.flags & UInt32(KVM_MEM_READONLY) != 0)
        flags.guestMemory = region.flags & UInt32(KVM_MEM_GUEST_MEMFD) != 0
        try core.setMemoryRegion(
            MemoryRegion(
                slot: region.slot, flags: flags, guestAddress: GuestAddress(region.guest_phys_addr),
                size: region.memory_size, userAddress: UserAddress(region.userspace_addr),
                guestMemory: flags.guestMemory ? descriptors.guestMemory(region.guest_memfd) : .closed,
                guestMemoryOffset: region.guest_memfd_offset))
        return 0
    }

    // MARK: Private memory

    private func createGuestMemory(_ request: kvm_create_guest_memfd) throws(Errno) -> Int {
        descriptors.open(.guestMemory(try core.createGuestMemory(size: request.size, flags: request.flags)))
    }

    private func setAttributes(_ request: kvm_memory_attributes) throws(Errno) -> Int {
        try core.setMemoryAttributes(
            address: request.address, size: request.size, MemoryAttributes(bits: request.attributes),
            flags: request.flags)
        return 0
    }

    // MARK: The dirty log

    /// Where the words can't be copied out they are lost. Spec: generic 5.3.
    private func getDirtyLog(_ log: kvm_dirty_log) throws(Errno) -> Int {
        let words = try core.getDirtyLog(slot: log.slot)
        guard let bitmap = log.dirty_bitmap else { throw .EFAULT }
        words.withUnsafeBytes { bitmap.copyMemory(from: $0.baseAddress!, byteCount: $0.count) }
        return 0
    }

    /// The core says whether the words are wanted at all: no more of them are read than the slot has, and a null pointer
    /// holds none.
    private func clearDirtyLog(_ log: kvm_clear_dirty_log) throws(Errno) -> Int {
        var words: [UInt64] = []
        if let bitmap = log.dirty_bitmap {
            let count = min((UInt64(log.num_pages) + 63) / 64, wordsOfLog(log.slot))
            words = Array(unsafeUninitializedCapacity: Int(count)) { buffer, used in
                UnsafeMutableRawBufferPointer(buffer).copyMemory(
                    from: UnsafeRawBufferPointer(start: bitmap, count: Int(count) * 8))
                used = Int(count)
            }
        }
        try core.clearDirtyLog(
            slot: log.slot, firstPage: log.first_page, pages: UInt64(log.num_pages), bitmap: words)
        return 0
    }

    private func wordsOfLog(_ number: UInt32) -> UInt64 {
        core.withSlots { core.slot(numbered: number).map { ($0.pageCount + 63) / 64 } ?? 0 }
    }
}

/// The return value of a call.
func result(_ body: () throws(Errno) -> Int) -> Int {
    do throws(Errno) { return try body() } catch { return -Int(error.rawValue) }
}

/// The caller's structure. Kernel: `copy_from_user`.
func copy<T>(_ argument: UnsafeMutableRawPointer?, into empty: T) throws(Errno) -> T {
    guard let argument else { throw .EFAULT }
    var copy = empty
    withUnsafeMutableBytes(of: &copy) {
        $0.copyMemory(from: UnsafeRawBufferPointer(start: argument, count: $0.count))
    }
    return copy
}
