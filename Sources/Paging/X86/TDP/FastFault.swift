import Frames
import GuestMemory
import HostMemory

extension TDPMMU {
    /// Fixes the fault without mmu_lock, or nil: the slow path must. Caller inside `withSlots`.
    @inline(never)
    func fixWithoutLock(
        _ root: HostFrame, _ fault: GuestFault, _ slot: Unmanaged<MemorySlot>?, by cpu: VirtualCPU
    ) -> FaultOutcome? {
        let fix = LocklessFix(tables: view(root), bits: bits, accessDirty: accessDirty)
        return withTables { fix.fix(fault, slot?.takeUnretainedValue(), by: cpu) }
    }

    @inline(__always)
    func mayNeedNoLock(_ fault: GuestFault) -> Bool { LocklessFix.mayHelp(fault, accessDirty: accessDirty) }
}
