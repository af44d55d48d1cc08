import Frames
import GuestMemory
import HostMemory
import Synchrony

/// Faults that no guest waits for. Spec: x86 2.10, generic 6.2, 6.3. They count no `pf_taken`, and change no entry that is
/// there (I-26).
extension TDPMMU {
    /// Maps one page, or more if the host maps more, for reading. The level of the mapping. Caller: the vCPU's task, inside
    /// `withSlots`, no lock held. Kernel: `kvm_tdp_map_page`.
    ///
    /// Tries again as long as an invalidation is in the way, but not longer than a signal lets it. An obsolete root is
    /// given back before each try; before that was so, a call could find its root obsolete for ever (Kernel 20a6cff3b283).
    func mapAhead(_ cpu: VirtualCPU, _ address: GuestAddress) throws(Errno) -> PageLevel {
        guard allowsPreFault else { throw .EOPNOTSUPP }
        while true {
            if vm.addressSpace.signals.pending { throw .EINTR }
            dropObsoleteRoot(cpu)
            var fault = GuestFault(
                address: address, access: .read, entryPresent: false,
                isPrivate: vm.isPrivate(address.frame), isPrefetch: true)
            switch serve(cpu, &fault) {
            case .fixed, .spurious, .writeProtected: return fault.level
            case .emulate: throw .ENOENT
            case .failed(.EHWPOISON): throw .EINTR
            case .failed(let errno), .memoryFault(let errno): throw errno
            case .retry: isExplorerAttached ? vm.waitForInvalidations() : yieldProcessor()
            }
        }
    }

    /// The page that a fault asked for was fetched: maps it, if nothing is mapped there by now. Whatever goes wrong, the
    /// guest's own access finds out. Caller as above. Kernel: `kvm_arch_async_page_ready`.
    func mapFetched(_ cpu: VirtualCPU, _ fault: GuestFault) {
        dropObsoleteRoot(cpu)
        var fault = fault
        if serve(cpu, &fault) == .fixed { CPUStatistics.bump(cpu.statistics.pf_fixed) }
    }
}
