import Frames
import HostMemory
import Synchrony

// Spec: generic 2.16. All of these may sleep, but for the atomic one; all take the read-side section that they need.

extension VirtualMachine {
    /// Reads within one page, `offset` bytes into `frame`. EFAULT: no such memory, or not all of it in the page; then
    /// `buffer` may be filled in part. Kernel: `kvm_read_guest_page`.
    public func readGuest(
        _ frame: GuestFrame, offset: UInt64 = 0, into buffer: UnsafeMutableRawBufferPointer
    ) throws(Errno) {
        try GuestView(self).read(frame, offset, into: buffer)
    }

    /// Reads, page by page. EFAULT at the first page that can't be read. Kernel: `kvm_read_guest`.
    public func readGuest(_ address: GuestAddress, into buffer: UnsafeMutableRawBufferPointer) throws(Errno) {
        try GuestView(self).read(address, into: buffer)
    }
}

extension VirtualCPU {
    /// As the VM's, in the vCPU's address space. Kernel: `kvm_vcpu_read_guest_page`.
    public final func readGuest(
        _ frame: GuestFrame, offset: UInt64 = 0, into buffer: UnsafeMutableRawBufferPointer
    ) throws(Errno) {
        try GuestView(of: self).read(frame, offset, into: buffer)
    }

    /// Kernel: `kvm_vcpu_read_guest`.
    public final func readGuest(_ address: GuestAddress, into buffer: UnsafeMutableRawBufferPointer) throws(Errno) {
        try GuestView(of: self).read(address, into: buffer)
    }

    /// Reads within one page without sleeping. EFAULT also where the page is not there now.
    /// Kernel: `kvm_vcpu_read_guest_atomic`.
    public final func readGuestAtomically(
        _ address: GuestAddress, into buffer: UnsafeMutableRawBufferPointer
    ) throws(Errno) {
        try GuestView(of: self).read(address.frame, address.offset, into: buffer, faulting: false)
    }
}

extension GuestView {
    /// Kernel: `__kvm_read_guest_page`, `__kvm_read_guest_atomic`.
    func read(
        _ frame: GuestFrame, _ offset: UInt64, into buffer: UnsafeMutableRawBufferPointer, faulting: Bool = true
    ) throws(Errno) {
        guard isInPage(offset, buffer.count) else { throw .EFAULT }
        try withSlot(of: frame, write: false) { (_, address) throws(Errno) in
            let done = vm.addressSpace.copyIn(address + offset, to: buffer, faulting: faulting)
            if done < buffer.count { throw .EFAULT }
        }
    }

    func read(_ address: GuestAddress, into buffer: UnsafeMutableRawBufferPointer) throws(Errno) {
        try forEachPage(address, buffer.count) { (frame, offset, part) throws(Errno) in
            try read(frame, offset, into: UnsafeMutableRawBufferPointer(rebasing: buffer[part]))
        }
    }
}

/// Whether `count` bytes from `offset` on lie in one page; to ask for others is a mistake of the caller's (Kernel: a WARN).
func isInPage(_ offset: UInt64, _ count: Int) -> Bool {
    count <= Int(pageSize) && offset <= pageSize && offset + UInt64(count) <= pageSize
}
