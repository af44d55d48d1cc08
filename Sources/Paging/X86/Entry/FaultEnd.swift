import Audit
import GuestMemory
import HostMemory
import Synchrony

extension SecondaryMMU {
    /// How the page of an x86 fault is released: unused if the guest is to try again; else, whatever came out, as used, and
    /// as dirty if the host may write it: a leaf that is there, or will be, can become writable without another look.
    /// Kernel: `kvm_mmu_finish_page_fault`. Spec: x86 2.7 "finish", X5, X7.
    @inline(__always)
    final func use(after outcome: FaultOutcome, ofWritable isWritable: Bool) -> FaultUse {
        guard case .retry = outcome else { return .used(dirty: isWritable) }
        guard SeriesPatch.retriedIsUnused.isUndone else { return .unused }
        tellMarked()
        return .used(dirty: false)
    }

    @inline(never)
    private final func tellMarked() {
        vm.memory.journal?.add(Finding(.x7, "the page of a fault that is to be tried again is marked"))
    }
}
