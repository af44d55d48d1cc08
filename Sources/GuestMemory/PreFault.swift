import Frames
import HostMemory
import Synchrony

/// A stretch of guest memory to map ahead of use. Kernel: `struct kvm_pre_fault_memory`.
public struct PreFaultRange: Sendable, Equatable {
    public var address: GuestAddress
    /// Bytes.
    public var size: UInt64
    public var flags: UInt64
    public init(address: GuestAddress, size: UInt64, flags: UInt64 = 0) {
        self.address = address
        self.size = size
        self.flags = flags
    }

    /// EINVAL: flags, an unaligned or an empty range, one that wraps around.
    public func check() throws(Errno) {
        guard flags == 0, address.offset == 0, size & (pageSize - 1) == 0, address + size > address else {
            throw .EINVAL
        }
    }
}

extension VirtualMachine {
    /// Maps guest memory for reading as if the guest had read it, but for the mark that it did; what is mapped stays as it
    /// is. Returns what is left of `range`; after an error that is all of it. The vCPU's own task, outside of the guest, no lock held.
    /// Kernel: `KVM_PRE_FAULT_MEMORY`. Spec: generic 6.3.
    ///
    /// Succeeds if anything was mapped, else: EINVAL for flags, an unaligned or an empty range and one that wraps around;
    /// EINTR with a signal; ENOENT where no slot is; EFAULT where the process has no memory; EOPNOTSUPP; ENOMEM. EAGAIN
    /// where the slot is being deleted or moved: kernels before 6.18 try again and again there, in the very section that
    /// the deletion waits for, until a signal comes (I-21); the model does what 6.18 does.
    ///
    /// For a poisoned page Linux sends SIGBUS, which ends the call with EINTR; sending it is the caller's part.
    public func preFault(_ cpu: VirtualCPU, _ range: PreFaultRange) throws(Errno) -> PreFaultRange {
        try range.check()
        let side = slotReaders.enter()
        defer { slotReaders.exit(side) }
        var range = range
        var processed = false
        while range.size > 0 {
            do throws(Errno) {
                if addressSpace.signals.pending { throw .EINTR }
                let level = try mmu.preFault(cpu, range.address)
                // To the end of the mapping, which may begin before the address.
                let bytes = min(range.size, level.bytes - range.address.value & (level.bytes - 1))
                range.address = range.address + bytes
                range.size -= bytes
                processed = true
            } catch {
                if processed { return range }
                throw error
            }
            yieldProcessor()
        }
        return range
    }
}
