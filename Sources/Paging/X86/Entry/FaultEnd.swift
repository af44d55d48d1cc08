import GuestMemory
import Synchrony

extension FaultOutcome {
    /// How the page of a fault with this outcome is released: unused if the guest is to try again; else, whatever came
    /// out, as used, and as dirty if the host may write it: a leaf that is there, or will be, can become writable without
    /// another look. Of all x86 faults. Kernel: `kvm_mmu_finish_page_fault`. Spec: x86 2.7 "finish", X5, X7.
    @inline(__always)
    func use(ofWritable isWritable: Bool) -> FaultUse {
        guard self == .retry else { return .used(dirty: isWritable) }
        return SeriesPatch.retriedIsUnused.isUndone ? .used(dirty: false) : .unused
    }
}
