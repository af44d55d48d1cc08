import Frames
import GuestMemory

/// Dirty logging by W, and ageing by A. Caller: mmu_lock held for writing. Spec: arches 2.3, 12.3.
///
/// D is never cleared here (RV-4): harts find it set and never write it, so that a page's first write after
/// protection always faults.
extension GStageMMU {
    /// Clears W in every leaf that intersects `frames`, huge ones included; whether any had it. The kernel leaves a
    /// huge leaf that the range does not contain alone, and the slot's edge can't cut one.
    /// Kernel: `gstage_wp_range`, for `gstage_wp_memory_region`.
    func writeProtect(_ frames: Range<GuestFrame>, holding guardian: borrowing MMUGuard) -> Bool {
        precondition(guardian.exclusive, "G-stage tables change only under mmu_lock held for writing")
        var changed = false
        for run in tables.runs(in: frames) {
            for i in 0..<run.count where clear(GStageBits.write, run, i) { changed = true }
        }
        return changed
    }

    /// Clears W in every leaf that maps `first + i` for a bit i of `mask`. Whether any had it.
    /// Kernel: `kvm_arch_mmu_enable_log_dirty_pt_masked`.
    ///
    /// With an initially set bitmap a huge leaf may still be writable when its first page is cleared (generic 5.5). It
    /// loses W as a whole: its other pages' bits are still set, and the next write to any of them splits it. The
    /// kernel would leave it, and lose that page's writes.
    func writeProtect(first: GuestFrame, mask: UInt64, holding guardian: borrowing MMUGuard) -> Bool {
        precondition(guardian.exclusive, "G-stage tables change only under mmu_lock held for writing")
        guard mask != 0 else { return false }
        let low = first.advanced(by: mask.trailingZeroBitCount)
        let high = first.advanced(by: 64 - mask.leadingZeroBitCount)
        var changed = false
        for run in tables.runs(in: low..<high) {
            for i in 0..<run.count where isWanted(run, i, first, mask) && clear(GStageBits.write, run, i) {
                changed = true
            }
        }
        return changed
    }

    /// Whether entry `i` of the run maps a page of the mask.
    private func isWanted(_ run: LeafRun, _ i: Int, _ first: GuestFrame, _ mask: UInt64) -> Bool {
        let base = run.base.advanced(by: i * Int(run.level.frames))
        let low = max(base, first)
        let high = min(base.advanced(by: Int(run.level.frames)), first.advanced(by: 64))
        guard low < high else { return false }
        let bits = UInt64.max >> UInt64(64 - (high.number - low.number))
        return mask & bits << (low.number - first.number) != 0
    }

    /// Clears one bit of one leaf, if it has it. Atomic, since a hart may set A meanwhile.
    private func clear(_ bit: UInt64, _ run: LeafRun, _ i: Int) -> Bool {
        let entry = tables.entry(run.firstIndex + i, of: run.table)
        guard entry.peek() & bit != 0 else { return false }
        let old = entry.clear(bits: bit)
        noteChange(run.level, run.base.advanced(by: i * Int(run.level.frames)), old, old & ~bit)
        return true
    }

    /// Clears A in every leaf of `frames`; whether any had it. Nothing is flushed here: `clear_flush_young` flushes
    /// when it hears "yes", `clear_young` never. Kernel: `kvm_age_gfn`, which looks at the first leaf only, since its
    /// callers ask for one. Spec: generic 3.2.
    func clearAccessed(_ frames: Range<GuestFrame>, holding guardian: borrowing MMUGuard) -> Bool {
        precondition(guardian.exclusive, "G-stage tables change only under mmu_lock held for writing")
        var young = false
        for run in tables.runs(in: frames) {
            for i in 0..<run.count where clear(GStageBits.accessed, run, i) { young = true }
        }
        return young
    }

    /// Whether any leaf of `frames` has A. Kernel: `kvm_test_age_gfn`.
    func anyAccessed(_ frames: Range<GuestFrame>, holding guardian: borrowing MMUGuard) -> Bool {
        for run in tables.runs(in: frames) {
            for i in 0..<run.count {
                let value = tables.entry(run.firstIndex + i, of: run.table).peek()
                if value & GStageBits.accessed != 0 { return true }
            }
        }
        return false
    }
}
