import Frames
import GuestMemory
import HostMemory

/// What a new leaf says beside the frame.
extension TDPMMU {
    /// All bits of the leaf but the frame. Kernel: `make_spte`. Spec: x86 2.11.
    ///
    /// W follows the primary mapping, unless the frame `isTracked`. It is granted on a read fault too: the page was marked
    /// dirty for that when its reference was released (Spec: X5).
    ///
    /// Where huge pages are not executable, this one is not. Spec: X40.
    ///
    /// A prefetched leaf is old: its A is clear or, where the hardware keeps no A, its rights are set aside (Spec: generic
    /// 6.3, x86 2.11).
    func leafAttributes(
        _ permit: borrowing InstallPermit, at level: PageLevel, _ role: PageRole, isTracked: Bool, prefetch: Bool
    ) -> UInt64 {
        var entry = EntryBits.mmuPresent | bits.present | bits.user | adType(role)
        entry |= level > .page4K && nxHugePages ? bits.noExecute : bits.execute
        entry |= prefetch ? 0 : bits.accessed
        if level > .page4K { entry |= EntryBits.large }
        entry |= bits.memoryType(of: permit.frame, in: vm.memory)
        if permit.counted && vm.policy.kind == .tracked { entry |= EntryBits.counted }
        if permit.writable {
            entry |= bits.hostWritable
            if !isTracked { entry |= bits.mmuWritable | EntryBits.write | bits.dirty }
        }
        return prefetch ? bits.ageing(entry).applied(to: entry) : entry
    }

    /// The A/D type of a leaf in a tree of `role`. What a nested guest writes never reaches the page-modification log,
    /// so on a host that has one the D of its leaves is not to be believed. Spec: x86 2.11 step 1, X25, X46.
    func adType(_ role: PageRole) -> UInt64 {
        if role.accessDirtyDisabled { return EntryBits.adDisabled }
        return configuration.modificationLogEntries != 0 && role.isGuestMode ? EntryBits.writeProtectOnly : 0
    }
}

extension EntryBits {
    /// Device memory is uncached and the guest may refine that by its PAT; RAM is write-back whatever the guest says (no
    /// device with non-coherent DMA is attached). Of EPT alone. Kernel: `vmx_get_mt_mask`, `kvm_is_mmio_pfn`.
    ///
    /// A reserved frame with a page frame counts as RAM: the model's host maps it write-back, and it is only a host
    /// mapping as uncached or write-combining that would make KVM call it MMIO.
    @inline(__always)
    func memoryType(of frame: HostFrame, in memory: PhysicalMemory) -> UInt64 {
        guard isEPT else { return 0 }
        return memory.hasPageFrame(frame) ? EPT.writeBack | EPT.ignorePAT : EPT.uncached
    }
}
