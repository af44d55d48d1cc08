import Frames
import HostMemory
import Synchrony

/// A stretch of guest memory whose user address is looked up once, until the slots change. It remembers an address and
/// holds nothing: every access is a copy through the process's mapping. Kernel: `struct gfn_to_hva_cache`.
/// Spec: generic 2.17.
///
/// Belongs to one task at a time: that of `cpu`, if it is a vCPU's. Before the first `set` it has no bytes.
public final class GuestAddressCache: @unchecked Sendable {
    // Unchecked: whoever shares one keeps its users apart.
    private let view: GuestView
    private var generation: UInt64 = 0
    private var address = GuestAddress(0)
    private var length: UInt64 = 0
    /// Nil: the lookup failed. Kernel: `KVM_HVA_ERR_BAD`.
    private var userAddress: UserAddress?
    /// Nil: more than one page, each of which is looked up at each access.
    private var slot: MemorySlot?

    public init(_ vm: VirtualMachine, by cpu: VirtualCPU? = nil) { view = GuestView(vm, by: cpu) }

    /// Looks up `length` bytes from `address` on. EINVAL: the range wraps, or is empty and begins a page. EFAULT: a page of
    /// it is in no slot, or in one that can't be written; when the slots have changed the next access tries again.
    /// Kernel: `kvm_gfn_to_hva_cache_init`.
    public func set(_ address: GuestAddress, length: UInt64) throws(Errno) {
        let section = view.vm.slotReaders.enter()
        defer { view.vm.slotReaders.exit(section) }
        self.address = address
        self.length = length
        try find()
    }

    /// Caller is inside a read-side section of the slots. Kernel: `__kvm_gfn_to_hva_cache_init`.
    private func find() throws(Errno) {
        // First of all: whatever comes of it is an answer for these slots.
        generation = view.vm.slotsGeneration
        userAddress = nil
        slot = nil
        let last = (address + (length &- 1)).frame
        guard address.frame <= last else { throw .EINVAL }
        var first: UserAddress?
        var next = address.frame
        while next <= last {
            guard let found = view.slot(next), let user = found.checkedAddress(of: next, write: true) else {
                throw .EFAULT
            }
            if next == address.frame {
                first = user
                slot = found
            }
            next = found.frames.upperBound
        }
        if address.frame == last {
            userAddress = first.map { $0 + address.offset }
        } else {
            userAddress = first
            slot = nil
        }
    }

    /// Copies out, from `offset` on. EINVAL: not so many bytes were looked up. EFAULT: they can't be read.
    /// May sleep. Kernel: `kvm_read_guest_offset_cached`.
    public func read(at offset: UInt64 = 0, into buffer: UnsafeMutableRawBufferPointer) throws(Errno) {
        try withPlace(offset, buffer.count) { (_, user) throws(Errno) in
            guard let user else { return try view.read(address + offset, into: buffer) }
            if view.vm.addressSpace.copyIn(user + offset, to: buffer) < buffer.count { throw .EFAULT }
        }
    }

    /// Copies in, from `offset` on, and logs the page. Errors as `read`. Kernel: `kvm_write_guest_offset_cached`.
    public func write(at offset: UInt64 = 0, from buffer: UnsafeRawBufferPointer) throws(Errno) {
        try withPlace(offset, buffer.count) { (slot, user) throws(Errno) in
            guard let slot, let user else { return try view.write(address + offset, from: buffer) }
            try view.write((address + offset).frame, in: slot, user + offset, buffer.count) {
                view.vm.addressSpace.copyOut($0, from: buffer)
            }
        }
    }

    /// Calls `body` with the slot and the user address of the first byte, or with neither, where each page must be looked
    /// up; after a new lookup, if the slots have changed.
    private func withPlace(
        _ offset: UInt64, _ count: Int, _ body: (MemorySlot?, UserAddress?) throws(Errno) -> Void
    ) throws(Errno) {
        let (end, wraps) = offset.addingReportingOverflow(UInt64(count))
        guard !wraps, end <= length else { throw .EINVAL }
        let section = view.vm.slotReaders.enter()
        defer { view.vm.slotReaders.exit(section) }
        if generation != view.vm.slotsGeneration {
            do throws(Errno) { try find() } catch { throw .EFAULT }
        }
        guard let userAddress else { throw .EFAULT }
        try body(slot, slot == nil ? nil : userAddress)
    }
}
