import Frames
import HostMemory
import Synchrony

// Spec: generic 2.16. All of these may sleep, take the read-side section that they need, and log the pages that they write;
// the VM's, on behalf of the vCPU whose task they run on, if they do (`by`), as `markDirty` wants to know.

extension VirtualMachine {
    /// Writes within one page, `offset` bytes into `frame`. EFAULT: no such memory, a read-only slot, memory that the
    /// process may not write, or not all of it in the page. Kernel: `kvm_write_guest_page`.
    public func writeGuest(
        _ frame: GuestFrame, offset: UInt64 = 0, from buffer: UnsafeRawBufferPointer, by cpu: VirtualCPU? = nil
    ) throws(Errno) {
        try GuestView(self, by: cpu).write(frame, offset, from: buffer)
    }

    /// Writes, page by page. EFAULT at the first page that can't be written; those before stay written and logged.
    /// Kernel: `kvm_write_guest`.
    public func writeGuest(
        _ address: GuestAddress, from buffer: UnsafeRawBufferPointer, by cpu: VirtualCPU? = nil
    ) throws(Errno) {
        try GuestView(self, by: cpu).write(address, from: buffer)
    }

    /// Writes `count` zeros. Errors as `writeGuest`. Kernel: `kvm_clear_guest`.
    public func clearGuest(_ address: GuestAddress, count: Int, by cpu: VirtualCPU? = nil) throws(Errno) {
        let view = GuestView(self, by: cpu)
        try forEachPage(address, count) { (frame, offset, part) throws(Errno) in
            try view.write(frame, offset, part.count) { addressSpace.clear($0, part.count) }
        }
    }
}

extension VirtualCPU {
    /// As the VM's, in the vCPU's address space. Kernel: `kvm_vcpu_write_guest_page`.
    public final func writeGuest(
        _ frame: GuestFrame, offset: UInt64 = 0, from buffer: UnsafeRawBufferPointer
    ) throws(Errno) {
        try GuestView(of: self).write(frame, offset, from: buffer)
    }

    /// Kernel: `kvm_vcpu_write_guest`.
    public final func writeGuest(_ address: GuestAddress, from buffer: UnsafeRawBufferPointer) throws(Errno) {
        try GuestView(of: self).write(address, from: buffer)
    }
}

extension GuestView {
    func write(_ address: GuestAddress, from buffer: UnsafeRawBufferPointer) throws(Errno) {
        try forEachPage(address, buffer.count) { (frame, offset, part) throws(Errno) in
            try write(frame, offset, from: UnsafeRawBufferPointer(rebasing: buffer[part]))
        }
    }

    /// Kernel: `__kvm_write_guest_page`.
    func write(_ frame: GuestFrame, _ offset: UInt64, from buffer: UnsafeRawBufferPointer) throws(Errno) {
        try write(frame, offset, buffer.count) { vm.addressSpace.copyOut($0, from: buffer) }
    }

    func write(
        _ frame: GuestFrame, _ offset: UInt64, _ count: Int, _ copy: (UserAddress) -> Int
    ) throws(Errno) {
        guard isInPage(offset, count) else { throw .EFAULT }
        try withSlot(of: frame, write: true) { (slot, address) throws(Errno) in
            try write(frame, in: slot, address + offset, count, copy)
        }
    }

    /// Copies, and logs the page if anything of it was written: also where the copy ended early. Linux does not log that,
    /// and a migration then misses the bytes that are there all the same (I-12); to log a page too much costs one copy.
    func write(
        _ frame: GuestFrame, in slot: MemorySlot, _ address: UserAddress, _ count: Int, _ copy: (UserAddress) -> Int
    ) throws(Errno) {
        let done = copy(address)
        if done > 0 || count == 0 { markDirty(frame, in: slot) }
        if done < count { throw .EFAULT }
    }
}
