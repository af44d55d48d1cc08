import Audit
import Frames
import HostMemory
import Synchronization
import Synchrony

/// The proof that the invalidation count was read *before* a translation. `faultIn` takes it and gives it back inside
/// its result; the retry check reads it there and nowhere else. Spec: generic 2.8, 3.4, I-8.
///
/// The race it closes: if the count were read after the translation, an invalidation could run in between, and the
/// check would compare with a count that already includes it; a freed page would be mapped.
public struct InvalidationSnapshot: ~Copyable {
    let sequence: UInt64
    let vm: Unmanaged<VirtualMachine>
    fileprivate init(_ sequence: UInt64, _ vm: VirtualMachine) {
        self.sequence = sequence
        self.vm = Unmanaged.passUnretained(vm)
    }
}

extension VirtualMachine {
    /// Reads the invalidation count, with acquire order. No lock held. Spec: generic 0.4, 2.8 step 1.
    @inline(__always)
    public func snapshot() -> InvalidationSnapshot {
        schedulingPoint(.atomicLoad, invalidateIdentity.value)
        let sequence = invalidateSequence.load(ordering: .acquiring)
        record(Event(.snapshot, value: sequence))
        return InvalidationSnapshot(sequence, self)
    }

    /// A look without the lock, to save a useless lookup: may be wrong in both directions.
    /// Kernel: `mmu_invalidate_retry_gfn_unsafe`. Spec: generic 3.3.
    @inline(__always)
    public func mayBeStale(_ snapshot: borrowing InvalidationSnapshot, _ frame: GuestFrame) -> Bool {
        !Defect.retryCheckMissing.isOn && isStale(snapshot.sequence, frame, ranged: true)
    }

    /// The same once the frame is translated, to save a useless wait for the lock. Spec: x86 2.7 step 10.
    @inline(__always)
    public func mayBeStale(_ faulted: borrowing FaultedFrame) -> Bool {
        !Defect.retryCheckMissing.isOn && isStale(faulted.snapshot.sequence, faulted.guestFrame, ranged: true)
    }

    /// The retry check. Kernel: `mmu_invalidate_retry` or, `ranged`, `mmu_invalidate_retry_gfn`.
    /// In-progress is loaded first, with acquire: whoever sees 0 there also sees the count that came before it.
    @inline(__always)
    func isStale(_ seen: UInt64, _ frame: GuestFrame, ranged: Bool) -> Bool {
        schedulingNote(.atomicLoad, invalidateIdentity.value)
        if invalidateInProgress.load(ordering: .acquiring) != 0, isInRange(frame, ranged: ranged) { return true }
        return invalidateSequence.load(ordering: .relaxed) != seen
    }

    /// Whether a running invalidation is in the way of `frame`.
    @inline(never)
    private func isInRange(_ frame: GuestFrame, ranged: Bool) -> Bool {
        if !ranged { return true }
        let start = invalidateStart.load(ordering: .relaxed)
        let end = invalidateEnd.load(ordering: .relaxed)
        // An unset range is a bug of the protocol; refusing is the safe answer (Spec: generic 3.3).
        return start == UInt64.max || (frame.number >= start && frame.number < end)
    }

    /// Waits for what makes a fault on `frame` be tried again and again: an invalidation that runs, a slot that is being
    /// deleted. No lock held, outside of guest mode and of `withSlots`.
    public func waitForProgress(at frame: GuestFrame) {
        waitForInvalidations()
        for (space, sets) in slotSets.enumerated() {
            spinUntil(sets.identity.value) {
                withSlots { !(slot(containing: frame, in: UInt8(space))?.isInvalid ?? false) }
            }
        }
    }

    /// Waits until no invalidation runs. No lock held, outside of guest mode.
    public func waitForInvalidations() {
        spinUntil(invalidateIdentity.value) { invalidateInProgress.load(ordering: .acquiring) == 0 }
    }

    /// Whether any invalidation runs. Caller holds mmuLock.
    var isInvalidating: Bool { invalidateInProgress.load(ordering: .acquiring) != 0 }

    /// Whether an invalidation that runs covers any of `frames`, by what the retry check would say. For checks (X12).
    public func isInvalidating(_ frames: Range<GuestFrame>) -> Bool {
        schedulingNote(.atomicLoad, invalidateIdentity.value)
        guard isInvalidating else { return false }
        let start = invalidateStart.load(ordering: .relaxed)
        let end = invalidateEnd.load(ordering: .relaxed)
        return start == .max || (start < frames.upperBound.number && frames.lowerBound.number < end)
    }

    /// Invalidations that started and have not ended. For checks at rest (Spec: I-9).
    public var invalidationsInProgress: Int { invalidateInProgress.load(ordering: .acquiring) }
    public var activeNotifierCount: Int { activeInvalidations.load(ordering: .acquiring) }

    // MARK: begin and end. Caller holds mmuLock for writing. Kernel: kvm_mmu_invalidate_begin, _range_add, _end.

    func beginInvalidation() {
        schedulingPoint(.atomicUpdate, invalidateIdentity.value)
        if Defect.sequenceBumpedEarly.isOn { invalidateSequence.add(1, ordering: .acquiringAndReleasing) }
        if invalidateInProgress.add(1, ordering: .acquiringAndReleasing).newValue == 1 {
            invalidateStart.store(.max, ordering: .relaxed)
            invalidateEnd.store(.max, ordering: .relaxed)
        }
    }

    func addRange(_ frames: Range<GuestFrame>) {
        let start = invalidateStart.load(ordering: .relaxed)
        if start == .max {
            invalidateStart.store(frames.lowerBound.number, ordering: .relaxed)
            invalidateEnd.store(frames.upperBound.number, ordering: .relaxed)
        } else {
            let end = invalidateEnd.load(ordering: .relaxed)
            invalidateStart.store(min(start, frames.lowerBound.number), ordering: .relaxed)
            invalidateEnd.store(max(end, frames.upperBound.number), ordering: .relaxed)
        }
    }

    func endInvalidation() {
        schedulingPoint(.atomicUpdate, invalidateIdentity.value)
        if !Defect.sequenceBumpedEarly.isOn { invalidateSequence.add(1, ordering: .acquiringAndReleasing) }
        schedulingPoint(.atomicUpdate, invalidateIdentity.value)
        let old = invalidateInProgress.subtract(1, ordering: .acquiringAndReleasing).oldValue
        precondition(old > 0, "an invalidation ends that did not start (I-9)")
    }

    /// An invalidation of KVM's own, begun and ended in one section of mmu_lock: `zap` takes away what `frames` have, and
    /// says whether TLBs must be flushed. No lock held. Kernel: `kvm_zap_gfn_range`. Spec: x86 3.7, F2.
    public func invalidate(_ frames: Range<GuestFrame>, _ zap: (Range<GuestFrame>) -> Bool) {
        let guardian = lockMMU()
        beginInvalidation()
        addRange(frames)
        if zap(frames) { flushRemoteTLBs() }
        endInvalidation()
        guardian.unlock()
    }

    /// The defect `inProgressDroppedEarly`.
    private func endInTwoSections(_ guardian: consuming MMUGuard) {
        schedulingPoint(.atomicUpdate, invalidateIdentity.value)
        invalidateInProgress.subtract(1, ordering: .acquiringAndReleasing)
        guardian.unlock()
        let again = lockMMU()
        schedulingPoint(.atomicUpdate, invalidateIdentity.value)
        invalidateSequence.add(1, ordering: .acquiringAndReleasing)
        again.unlock()
    }

    // MARK: the notifier's callbacks. Spec: generic 3.2.

    func invalidateRangeStart(_ range: Range<UserAddress>, blockable: Bool) {
        guard range.lowerBound < range.upperBound else { return }
        // From here to the end of the invalidation the sets of slots stay: start and end see the same slots.
        invalidateLock.lock()
        schedulingNote(.atomicAccumulate, frameCaches.invalidationIdentity.value)
        activeInvalidations.add(1, ordering: .sequentiallyConsistent)
        invalidateLock.unlock()
        frameCaches.invalidate(range)

        let side = slotReaders.enter()
        defer { slotReaders.exit(side) }
        forEachSlot(in: range, firstHit: .begin) { slot, frames, guardian in
            addRange(frames)
            return mmu.unmap(frames, in: slot.addressSpace, holding: guardian, mayBlock: blockable)
        }
    }

    func invalidateRangeEnd(_ range: Range<UserAddress>) {
        guard range.lowerBound < range.upperBound else { return }
        let side = slotReaders.enter()
        forEachSlot(in: range, firstHit: .end) { _, _, _ in false }
        slotReaders.exit(side)

        invalidateLock.lock()
        frameCaches.noteEnd()
        let old = activeInvalidations.subtract(1, ordering: .acquiringAndReleasing).oldValue
        invalidateLock.unlock()
        if old == 1 { invalidationsEnded.wake() }
        precondition(old > 0, "an invalidation ends that did not start (I-9)")
    }

    /// Ages, or asks, the entries of `range`. Spec: generic 3.2.
    func ageRange(_ range: Range<UserAddress>, test: Bool, flush: Bool) -> Bool {
        guard range.lowerBound < range.upperBound else { return false }
        record(
            Event(
                .hostAged, guest: range.lowerBound.page,
                value: (range.upperBound.value - range.lowerBound.value + pageSize - 1) >> pageShift,
                extra: test ? 1 : 0))
        let side = slotReaders.enter()
        defer { slotReaders.exit(side) }
        var young = false
        forEachSlot(in: range, flushing: flush, firstHit: .nothing) { slot, frames, guardian in
            let hit =
                test
                ? mmu.testAge(frames, in: slot.addressSpace, holding: guardian)
                : mmu.age(frames, in: slot.addressSpace, holding: guardian)
            young = young || hit
            return hit
        }
        return young
    }

    /// What the walk does when it has taken the lock. Kernel: the `on_lock` hook.
    private enum FirstHit { case nothing, begin, end }

    /// The common walk: takes mmuLock at the first slot that `range` hits, and flushes, if any handler wants it, before
    /// the lock is dropped. Spec: generic 3.2, I-13.
    private func forEachSlot(
        in range: Range<UserAddress>, flushing: Bool = true, firstHit: FirstHit,
        _ handler: (MemorySlot, Range<GuestFrame>, borrowing MMUGuard) -> Bool
    ) {
        // Every address space shows the same process.
        var hits = false
        for sets in slotSets { sets.active.forEach(intersecting: range) { _, _ in hits = true } }
        guard hits else { return }
        let guardian = lockMMU()
        switch firstHit {
        case .nothing: break
        case .begin: beginInvalidation()
        case .end:
            if Defect.inProgressDroppedEarly.isOn { return endInTwoSections(guardian) }
            endInvalidation()
        }
        var flush = false
        for sets in slotSets {
            sets.active.forEach(intersecting: range) { slot, frames in
                if handler(slot, frames, guardian) { flush = true }
            }
        }
        if flush && flushing && !Defect.flushMissing.isOn { flushRemoteTLBs() }
        guardian.unlock()
    }
}

/// The VM's end of the host's notifier. Kernel: `kvm_mmu_notifier_ops`.
final class VirtualMachineNotifier: MMUNotifier, @unchecked Sendable {
    // Unchecked: restates the base class's; the only stored property never changes. Unsafe: Embedded Swift has no checked
    // `unowned`; the VM unregisters its notifier before it goes.
    unowned(unsafe) let vm: VirtualMachine
    init(_ vm: VirtualMachine) {
        self.vm = vm
        super.init()
    }

    override func invalidateRangeStart(_ range: Range<UserAddress>, blockable: Bool) {
        vm.invalidateRangeStart(range, blockable: blockable)
    }
    override func invalidateRangeEnd(_ range: Range<UserAddress>, blockable: Bool) {
        vm.invalidateRangeEnd(range)
    }
    override func clearFlushYoung(_ range: Range<UserAddress>) -> Bool {
        vm.ageRange(range, test: false, flush: !vm.mmu.elidesFlushIfYoung)
    }
    override func clearYoung(_ range: Range<UserAddress>) -> Bool { vm.ageRange(range, test: false, flush: false) }
    override func testYoung(_ address: UserAddress) -> Bool {
        vm.ageRange(address..<(address + 1), test: true, flush: false)
    }
    override func release() { vm.mmu.flushAll() }
}
