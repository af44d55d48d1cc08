import Audit
import Frames
import HostMemory
import Synchrony

/// mmu_lock, held. It ends with `unlock()` or with its scope, and cannot be copied: a function that borrows it runs
/// under the lock. Kernel: `read_lock(&kvm->mmu_lock)` or `write_lock`.
public struct MMUGuard: ~Copyable {
    private let owner: Unmanaged<VirtualMachine>
    var vm: VirtualMachine { owner.takeUnretainedValue() }
    /// Held for writing: nobody else changes the tables, but for the processor's A and D bits and the lockless fast path.
    public let exclusive: Bool

    fileprivate init(_ vm: VirtualMachine, exclusive: Bool) {
        owner = Unmanaged.passUnretained(vm)
        self.exclusive = exclusive
        takeLock()
    }

    deinit { dropLock() }

    /// Ends the section here. Not in a scope that asked for a permit or an observed entry, which borrow the guard: there
    /// the section ends with the scope.
    public consuming func unlock() {}

    /// For the defect `releaseAfterUnlock`: the lock is not held from the first to the second.
    borrowing func dropLock() {
        owner._withUnsafeGuaranteedRef {
            lending($0.mmuLock) { if exclusive { $0.unlockWrite() } else { $0.unlockRead() } }
        }
    }
    borrowing func takeLock() {
        owner._withUnsafeGuaranteedRef {
            lending($0.mmuLock) { if exclusive { $0.lockForWrite() } else { $0.lockForRead() } }
        }
    }

    /// Whether the guard is that of `vm`.
    borrowing func isOf(_ vm: Unmanaged<VirtualMachine>) -> Bool { vm.toOpaque() == owner.toOpaque() }

    /// The retry check and, if it passes, the right to map exactly this frame while the lock is held.
    ///
    /// The largest level is found here, under the lock and after the check, because only then is the host's mapping
    /// level a fact (Spec: X15). Nil: an invalidation came between; the caller releases the page as unused and lets the
    /// guest try again. Kernel: `is_page_fault_stale`, `mmu_invalidate_retry`. Spec: generic 3.3, I-6, X12.
    @_lifetime(borrow self)
    public borrowing func check(
        _ faulted: borrowing FaultedFrame, largest: PageLevel = .page4K
    ) -> InstallPermit? {
        precondition(isOf(faulted.snapshot.vm), "another VM's frame")
        let level = owner._withUnsafeGuaranteedRef { $0.level(of: faulted, largest: largest) }
        guard let level else { return nil }
        return InstallPermit(
            guestFrame: faulted.guestFrame, frame: faulted.frame, largest: level, writable: faulted.isWritable,
            counted: faulted.isCounted)
    }

    /// The right to map prefetched pages: there is no snapshot, so no invalidation may be in progress at all. One that
    /// starts later must first take mmu_lock. Spec: generic 2.11, X14.
    @_lifetime(borrow self)
    public borrowing func prefetchPermit() -> PrefetchPermit? {
        vm.isInvalidating && !Defect.prefetchUnguarded.isOn ? nil : PrefetchPermit()
    }
}

/// The right to map one frame: given by `MMUGuard.check` alone, it cannot outlive the lock, and installing anything else
/// than what it says traps. Spec: I-6, I-7.
///
/// It may be copied: a copy says the same under the same lock. `~Copyable` as well would be weaker, not stronger: then
/// Swift 6.3 lets it outlive the lock inside a closure or an optional variable.
public struct InstallPermit: ~Escapable {
    public let guestFrame: GuestFrame
    public let frame: HostFrame
    /// The largest leaf that may map it.
    public let largest: PageLevel
    /// Whether the primary mapping lets the guest write.
    public let writable: Bool
    /// Whether a counted page stands behind the frame, for the software bit of `tracked`.
    public let counted: Bool

    @_lifetime(immortal)
    init(guestFrame: GuestFrame, frame: HostFrame, largest: PageLevel, writable: Bool, counted: Bool) {
        self.guestFrame = guestFrame
        self.frame = frame
        self.largest = largest
        self.writable = writable
        self.counted = counted
    }

    /// The first host frame of a leaf of `level`. Traps if the permit does not reach that far.
    @inlinable @inline(__always)
    public borrowing func frame(at level: PageLevel) -> HostFrame {
        precondition(level <= largest, "the permit does not allow a leaf of this level (X38)")
        let first = frame.aligned(to: level)
        precondition(
            frame.number - first.number == guestFrame.number & (level.frames - 1), "guest and host are not congruent")
        return first
    }
}

/// The right to map prefetched pages while the lock is held. Copied as an `InstallPermit` is. Spec: generic 2.11.
public struct PrefetchPermit: ~Escapable {
    @_lifetime(immortal) init() {}

    /// The permit for one prefetched page, whose reference the caller still owns: for write, 4 KiB.
    @_lifetime(copy self)
    public borrowing func permit(for page: borrowing PageReference, at guestFrame: GuestFrame) -> InstallPermit {
        InstallPermit(
            guestFrame: guestFrame, frame: page.frame, largest: .page4K, writable: true, counted: true)
    }
}

extension VirtualMachine {
    /// The largest level that host and slot allow; nil: an invalidation came between. mmu_lock is held.
    @inline(__always)
    fileprivate func level(of faulted: borrowing FaultedFrame, largest: PageLevel) -> PageLevel? {
        if !Defect.retryCheckMissing.isOn,
            isStale(faulted.snapshot.sequence, faulted.guestFrame, ranged: retryLooksAtRange)
        {
            record(Event(.retry, frame: faulted.frame, guest: faulted.guestFrame.number))
            return nil
        }
        if SeriesPatch.makingMarksNothing.isUndone { markAsBefore(faulted) }
        guard largest > .page4K, faulted.mayBeHuge else { return .page4K }
        let frame = faulted.guestFrame
        return faulted.slotReference._withUnsafeGuaranteedRef { slot in
            var level = min(largest, addressSpace.mappingLevel(of: slot.userAddress(of: frame)))
            while level > .page4K, !slot.allowsHugeLeaf(at: frame, level) { level = level.below }
            return level
        }
    }

    /// As it was before patch 41 of the series.
    @inline(never)
    private func markAsBefore(_ faulted: borrowing FaultedFrame) {
        guard faulted.isWritable, mmu.marksPagesFromEntries else { return }
        Guess(memory: memory).dirtyCleared(faulted.frame, counted: true)
    }

    /// Takes mmu_lock for writing.
    public func lockMMU() -> MMUGuard { MMUGuard(self, exclusive: true) }

    /// Takes mmu_lock as a fault does: for reading where faults run in parallel.
    public func lockMMUForFault() -> MMUGuard { MMUGuard(self, exclusive: !faultsInParallel) }

    /// Takes mmu_lock for reading.
    public func lockMMUForRead() -> MMUGuard { MMUGuard(self, exclusive: false) }
}
