import Audit
import Frames
import GuestMemory
import Synchronization
import Synchrony

/// The frames of a slot that the guest must not write without KVM's hearing of it, with a count each: a frame may be
/// watched for several reasons. Kernel: `gfn_write_track`. Spec: x86 1.7, 3.8.
///
/// Counts change under mmu_lock held for writing; `isTracked` may be asked with no lock: it is asked again under the lock
/// before anything is mapped.
open class TrackedFrames: SlotExtra, @unchecked Sendable {
    // Unchecked: restates the base class's; the counts are atomic.
    private final let counts: UnsafeMutablePointer<Atomic<UInt16>>
    private final let base: GuestFrame
    private final let pageCount: Int
    private final let identity = ObjectIdentity()

    public init(_ slot: MemorySlot) {
        base = slot.baseFrame
        pageCount = Int(slot.pageCount)
        counts = UnsafeMutablePointer<Atomic<UInt16>>.allocate(capacity: pageCount)
        for i in 0..<pageCount { (counts + i).initialize(to: Atomic(0)) }
        super.init()
    }

    deinit {
        counts.deinitialize(count: pageCount)
        counts.deallocate()
    }

    @inline(__always)
    private final func counter(_ frame: GuestFrame) -> UnsafeMutablePointer<Atomic<UInt16>> {
        let index = Int(truncatingIfNeeded: frame.number &- base.number)
        precondition(index >= 0 && index < pageCount, "a frame of another slot")
        return counts + index
    }

    /// Kernel: `kvm_gfn_is_write_tracked`.
    public final func isTracked(_ frame: GuestFrame) -> Bool {
        schedulingNote(.atomicLoad, identity.value)
        return counter(frame).pointee.load(ordering: .relaxed) != 0
    }

    /// For how many reasons. For checks.
    public final func count(_ frame: GuestFrame) -> UInt16 { counter(frame).pointee.load(ordering: .relaxed) }

    /// Whether any frame of `frames` is tracked; those outside of the slot are not. For checks.
    public final func anyTracked(_ frames: Range<GuestFrame>) -> Bool {
        let first = max(frames.lowerBound.number, base.number)
        let end = min(frames.upperBound.number, base.number + UInt64(pageCount))
        guard first < end else { return false }
        for frame in first..<end where count(GuestFrame(frame)) != 0 { return true }
        return false
    }

    /// One reason more, or one less. Caller holds mmu_lock for writing. Kernel: `update_gfn_write_track`.
    public final func add(_ change: Int, _ frame: GuestFrame) {
        schedulingPoint(.atomicStore, identity.value)
        let word = counter(frame)
        let (new, overflow) = Int(word.pointee.load(ordering: .relaxed)).addingReportingOverflow(change)
        precondition(!overflow && new >= 0 && new <= Int(UInt16.max), "a frame is tracked too often, or not at all")
        word.pointee.store(UInt16(new), ordering: .relaxed)
    }
}
