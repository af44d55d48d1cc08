import Frames
import GuestMemory
import HostMemory
import Synchrony

/// What a slot must be. Kernel: `kvm_arch_prepare_memory_region`. Spec: generic 4.4 row 22, arches 2.2.
extension GStageMMU {
    /// Refuses a slot: EFAULT beyond the guest's address bits; EPERM where a writable slot lies over memory that the
    /// process can't write; EINVAL where a logged slot lies over a PFN mapping. Caller: slotsLock; takes mmap_lock.
    ///
    /// The kernel also enters PFN mappings into the tables here, without U, so that no guest can use the entry before
    /// a fault writes it again. The model leaves that out: a mapping is made by the fault that needs it.
    func checkSlot(_ slot: MemorySlot) throws(Errno) {
        guard slot.frames.upperBound.number <= 1 << UInt64(mode.addressBits - 12) else { throw .EFAULT }
        vm.addressSpace.mmapLock.lockForRead()
        defer { vm.addressSpace.mmapLock.unlockRead() }
        var cursor = slot.userRange.lowerBound
        while cursor < slot.userRange.upperBound {
            guard let vma = vm.addressSpace.firstVMA(intersecting: cursor..<slot.userRange.upperBound) else { return }
            if !slot.flags.readOnly, !vma.flags.write { throw .EPERM }
            if slot.isLogged, vma.flags.pfnMap { throw .EINVAL }
            cursor = vma.range.upperBound
        }
    }
}
