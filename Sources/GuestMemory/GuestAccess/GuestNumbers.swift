import Frames
import HostMemory
import Synchrony

extension VirtualMachine {
    /// Reads one number in the host's byte order, of memory that could also be *written*: a read-only slot is EFAULT, since
    /// the lookup is the one for writes. EFAULT also for a number that crosses a page: its second half has an address of its
    /// own. May sleep. Kernel: `kvm_get_guest`. Spec: generic 2.16.
    public func guestNumber<Value: FixedWidthInteger>(
        at address: GuestAddress, as type: Value.Type = Value.self
    ) throws(Errno) -> Value {
        let size = MemoryLayout<Value>.size
        guard isInPage(address.offset, size) else { throw .EFAULT }
        let view = GuestView(self)
        return try view.withSlot(of: address.frame, write: true) { (_, user) throws(Errno) in
            var value: Value = 0
            let done = withUnsafeMutableBytes(of: &value) { addressSpace.copyIn(user + address.offset, to: $0) }
            if done < size { throw .EFAULT }
            return value
        }
    }

    /// Writes one number in the host's byte order and logs its page. Errors as `guestNumber`. Kernel: `kvm_put_guest`.
    public func setGuestNumber<Value: FixedWidthInteger>(
        _ value: Value, at address: GuestAddress, by cpu: VirtualCPU? = nil
    ) throws(Errno) {
        let view = GuestView(self, by: cpu)
        try view.write(address.frame, address.offset, MemoryLayout<Value>.size) { user in
            withUnsafeBytes(of: value) { addressSpace.copyOut(user, from: $0) }
        }
    }
}

extension VirtualCPU {
    /// Bytes in the pages in which the process's area behind `frame` is mapped; 4096 where there is none. A hole is not
    /// given the size of the area that comes after it, as in Linux. May sleep. Kernel: `kvm_host_page_size`.
    /// Spec: generic 2.18.
    public final func hostPageSize(_ frame: GuestFrame) -> UInt64 {
        let section = vm.slotReaders.enter()
        defer { vm.slotReaders.exit(section) }
        let view = GuestView(of: self)
        guard let address = view.slot(frame)?.checkedAddress(of: frame, write: false) else { return pageSize }
        return vm.addressSpace.areaPageSize(address).bytes
    }
}
