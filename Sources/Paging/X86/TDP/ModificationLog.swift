import Audit
import Frames
import GuestMemory
import HostMemory
import Synchrony

/// The page into which a processor writes the guest's address of each page whose D bit it sets, from the last entry
/// down. Source: Intel SDM volume 3, "Page-Modification Logging". Kernel: `vmx->pml_pg`. Spec: x86 3.8.
///
/// The page belongs to the vCPU's state, the index of the next entry to the processor (`modificationLogIndex`).
extension TDPMMU {
    /// Entries of a log.
    static var logCapacity: Int { 512 }

    /// Where the processor of `cpu` writes, for whoever sets it up; nil: it has no such log.
    public func modificationLogPage(of cpu: VirtualCPU) -> HostFrame? { state(of: cpu).modificationLogPage }

    /// Whether the processor logs what a vCPU writes. Never for a nested guest: the guest hypervisor's log is software's.
    /// KVM switches it on and off with a request when the first slot is logged and the last is not; here the processor
    /// asks.
    public func logsModifications(of cpu: VirtualCPU) -> Bool {
        configuration.modificationLogEntries != 0 && vm.isLogging && !state(of: cpu).isGuestMode
    }

    /// The entries in use. After the last one the index has wrapped, and all are. Newest first.
    private func usedEntries(of cpu: VirtualCPU) -> Range<Int> {
        let index = Int(cpu.modificationLogIndex)
        return (index >= Self.logCapacity ? 0 : index + 1)..<Self.logCapacity
    }

    private func entry(_ index: Int, of page: HostFrame) -> GuestFrame {
        GuestAddress(vm.memory.entry(index, of: page).peek()).frame
    }

    /// Marks in the slots' logs what the processor has logged, the newest first, as 6.13 does. In each exit, but not out of
    /// a nested guest. A frame without a slot is left out, as everywhere. Caller: the vCPU's task, outside of guest mode.
    /// Kernel: `vmx_flush_pml_buffer`. Spec: X43, X45.
    func drainLog(of cpu: VirtualCPU) {
        let state = state(of: cpu)
        let used = usedEntries(of: cpu)
        guard !used.isEmpty, !state.isGuestMode, let page = state.modificationLogPage else { return }
        vm.withSlots {
            for i in used {
                let frame = entry(i, of: page)
                if let slot = cpu.slot(containing: frame) { vm.markDirty(frame, in: slot, by: cpu) }
            }
        }
        cpu.resetModificationLog()
    }

    /// Whether a write to `frame` waits in a processor's log. For checks.
    func isInModificationLog(_ frame: GuestFrame) -> Bool {
        for cpu in vm.virtualCPUs {
            guard let page = state(of: cpu).modificationLogPage else { continue }
            for i in usedEntries(of: cpu) where entry(i, of: page) == frame { return true }
        }
        return false
    }
}
