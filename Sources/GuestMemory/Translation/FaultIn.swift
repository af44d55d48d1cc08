import Audit
import Frames
import HostMemory
import Synchrony

/// A translated guest frame on its way to an entry: what a fault owns between fault-in and release.
///
/// It ends in `finish(_:holding:)` under mmu_lock or in `releaseUnused()` anywhere. Dropping it releases the page as
/// unused, and the journal reports it (I-2, I-17).
public struct FaultedFrame: ~Copyable {
    public let guestFrame: GuestFrame
    public let frame: HostFrame
    /// Whether the primary mapping lets the guest write. Kernel: `map_writable`.
    public var isWritable: Bool { traits & 1 != 0 }
    /// Whether the policy thinks that a counted page stands behind the frame.
    public var isCounted: Bool { traits & 2 != 0 }
    /// Whether the frame is private memory, of which the user's mappings say nothing.
    public var isPrivate: Bool { traits & 4 != 0 }
    /// Whether the host may map it by a huge leaf, and so the guest by one.
    public var mayBeHuge: Bool { traits & 8 != 0 }
    /// The four above in one word: a processor hands a word on from a store to a load at once, but not one that was
    /// stored in pieces.
    private let traits: UInt64
    /// Good as long as the read-side section of the slots in which the fault runs.
    let slotReference: Unmanaged<MemorySlot>
    public var slot: MemorySlot { slotReference.takeUnretainedValue() }
    let snapshot: InvalidationSnapshot
    let reference: FaultReference

    init(
        guestFrame: GuestFrame, frame: HostFrame, isWritable: Bool, isCounted: Bool, isPrivate: Bool,
        mayBeHuge: Bool, slotReference: Unmanaged<MemorySlot>, snapshot: consuming InvalidationSnapshot,
        reference: consuming FaultReference
    ) {
        self.guestFrame = guestFrame
        self.frame = frame
        traits = (isWritable ? 1 : 0) | (isCounted ? 2 : 0) | (isPrivate ? 4 : 0) | (mayBeHuge ? 8 : 0)
        self.slotReference = slotReference
        self.snapshot = snapshot
        self.reference = reference
    }

    /// Whether a page reference is owned (false for PFN-mapped memory under `precise`).
    public var ownsReference: Bool { reference.isOwned }

    /// Ends the fault, under mmu_lock. Kernel: `kvm_release_faultin_page`. Spec: generic 2.8 step 7, 2.9, I-10.
    public consuming func finish(_ use: FaultUse, holding guardian: borrowing MMUGuard) {
        precondition(guardian.isOf(snapshot.vm), "another VM's lock")
        let isLate = Defect.releaseAfterUnlock.isOn || SeriesPatch.releasedUnderLock.isUndone
        if isLate { guardian.dropLock() }
        if SeriesPatch.faultEndsItsPage.isUndone { markByNumber(use, holding: guardian) }
        reference.release(use, holding: guardian)
        if isLate { guardian.takeLock() }
    }

    /// As it was before patch 47 of the series.
    @inline(never)
    private borrowing func markByNumber(_ use: FaultUse, holding guardian: borrowing MMUGuard) {
        guard case .used(let dirty) = use, guardian.vm.mmu.marksPagesFromEntries else { return }
        Guess(memory: guardian.vm.memory).leafRemoved(frame, counted: true, accessed: true, dirty: dirty)
    }

    /// Ends the lookup of a page whose address was written into the processor's own state, not into a table: the page is
    /// used and not dirtied. Under mmu_lock, for which alone the address is known to be right.
    /// Kernel: the end of `vmx_set_apic_access_page_addr`. Spec: x86 6.4.
    public consuming func finishLoad(holding guardian: borrowing MMUGuard) {
        precondition(snapshot.vm.toOpaque() == Unmanaged.passUnretained(guardian.vm).toOpaque(), "another VM's lock")
        let isLate = SeriesPatch.apicPageUnderLock.isUndone
        if isLate { guardian.dropLock() }
        reference.releaseLoaded(holding: guardian)
        if isLate { guardian.takeLock() }
    }

    /// Ends the fault without a mapping; needs no lock. Kernel: `kvm_release_page_unused`.
    public consuming func releaseUnused() { reference.releaseUnused() }
}

/// What became of a faulted page. Spec: generic 2.9.
public enum FaultUse: Sendable, Equatable {
    /// No entry was made (retry, lost race).
    case unused
    /// An entry was made or found adequate. `dirty`: the primary mapping is writable, so the guest may write at any
    /// time without a further fault, and nothing later may mark the page.
    case used(dirty: Bool)
}

/// The reference that a guest fault owns, if any. Spec: generic 2.8, 2.20.
///
/// Another type than `PageReference`, because its release as dirty or accessed is legal only under mmu_lock: it borrows
/// the lock's guard.
public struct FaultReference: ~Copyable {
    private let owned: Owned

    private enum Owned: ~Copyable {
        /// PFN-mapped: nothing is owned.
        case nothing
        case page(PageReference)
        case guessed(GuessedReference)
        /// `tracked`: the reference is gone already, the page will be marked all the same.
        case tracked(Tracked, HostFrame)
    }

    init() { owned = .nothing }
    init(_ page: consuming PageReference) { owned = .page(page) }
    init(guessed reference: consuming GuessedReference) { owned = .guessed(reference) }
    init(tracked policy: Tracked, _ frame: HostFrame) { owned = .tracked(policy, frame) }

    var isOwned: Bool {
        switch owned {
        case .nothing: false
        case .tracked: false
        case .page: true
        case .guessed: true
        }
    }

    /// Releases the page while mmu_lock is held, so that the primary mapping which GUP validated is still intact: a
    /// dirty mark now is as good as one by the primary entry. After the lock is dropped, writeback may have cleaned the
    /// page already. Spec: generic 3.5, I-10, I-11.
    public consuming func release(_ use: FaultUse, holding guardian: borrowing MMUGuard) {
        switch consume owned {
        case .nothing:
            if SeriesPatch.releaseOfNothing.isUndone { Self.noteReleaseOfNothing(guardian) }
        case .page(let page):
            switch use {
            case .unused: page.releaseUnused()
            case .used(dirty: true): page.releaseDirty(stabilisedBy: .mmuLock)
            case .used(dirty: false): page.releaseClean(stabilisedBy: .mmuLock)
            }
        case .guessed(let reference): Self.release(guessed: reference, use, guardian)
        case .tracked(let tracked, let frame): Self.release(tracked: tracked, frame, use, guardian)
        }
    }

    /// `release(.used(dirty: false))`.
    fileprivate consuming func releaseLoaded(holding guardian: borrowing MMUGuard) {
        switch consume owned {
        case .nothing: break
        case .page(let page):
            guard SeriesPatch.apicPageIsFaultedIn.isUndone else { return page.releaseClean(stabilisedBy: .mmuLock) }
            guardian.vm.forget(page, Guess(memory: guardian.vm.memory)).release(.clean, underLock: true)
        case .guessed(let reference): reference.release(.clean, underLock: true)
        case .tracked(let tracked, let frame): tracked.finish(frame, .clean)
        }
    }

    @inline(never)
    private static func noteReleaseOfNothing(_ guardian: borrowing MMUGuard) {
        guardian.vm.memory.journal?.add(Finding(.i2, "a release of no page"))
    }

    /// Up to 6.12 a fault marks the page accessed, also on retry; x86 marks dirty only when the entry goes.
    @inline(never)
    private static func release(
        guessed reference: consuming GuessedReference, _ use: FaultUse, _ guardian: borrowing MMUGuard
    ) {
        let dirty = use == .used(dirty: true) && !guardian.vm.mmu.marksPagesFromEntries
        reference.release(dirty ? .dirty : .clean, underLock: true)
    }

    @inline(never)
    private static func release(
        tracked: Tracked, _ frame: HostFrame, _ use: FaultUse, _ guardian: borrowing MMUGuard
    ) {
        let dirty = use == .used(dirty: true) && !guardian.vm.mmu.marksPagesFromEntries
        tracked.finish(frame, use == .unused ? .unused : dirty ? .dirty : .clean)
    }

    /// Puts the page without a mark; legal anywhere.
    public consuming func releaseUnused() {
        switch consume owned {
        case .nothing: break
        case .tracked: break
        case .page(let page): page.releaseUnused()
        case .guessed(let reference): reference.release(.unused, underLock: false)
        }
    }
}

/// What a fault's frame came to on x86, where it may be left to others: see `VirtualCPU.faultIn`.
public enum ServedTranslation: ~Copyable {
    case frame(FaultedFrame)
    case failed(TranslationError)
    /// Somebody else fetches the page.
    case postponed
}

extension VirtualCPU {
    /// Looks the fault's frame up without waiting first, then, where that is not enough, leaves it to others, or waits, but
    /// open to signals. No page is owned in between. Caller as for `VirtualMachine.faultIn`.
    /// Kernel: `__kvm_mmu_faultin_pfn`. Spec: generic 6.1.
    @export(interface)
    public final func faultIn(
        _ fault: GuestFault, slot: MemorySlot, snapshot: consuming InvalidationSnapshot
    ) -> ServedTranslation {
        faultIn(fault, in: Unmanaged.passUnretained(slot), snapshot: snapshot, vm)
    }

    /// The same for a slot that is borrowed from the section, and for who has the vCPU's VM at hand.
    @export(interface)
    public final func faultIn(
        _ fault: GuestFault, in slot: Unmanaged<MemorySlot>, snapshot: consuming InvalidationSnapshot,
        _ vm: VirtualMachine
    ) -> ServedTranslation {
        let write = fault.access == .write
        switch vm.faultIn(fault.frame, in: slot, write: write, noWait: true, snapshot: snapshot) {
        case .frame(let faulted): return .frame(faulted)
        case .failed(let error, let snapshot):
            guard error == .needsIO else { return .failed(error) }
            return faultInWaiting(fault, in: slot, snapshot: snapshot)
        }
    }

    @inline(never)
    private final func faultInWaiting(
        _ fault: GuestFault, in slot: Unmanaged<MemorySlot>, snapshot: consuming InvalidationSnapshot
    ) -> ServedTranslation {
        if postpone(fault, in: slot.takeUnretainedValue()) { return .postponed }
        let write = fault.access == .write
        switch vm.faultIn(fault.frame, in: slot, write: write, interruptible: true, snapshot: snapshot) {
        case .frame(let faulted): return .frame(faulted)
        case .failed(let error, _): return .failed(error)
        }
    }
}

/// The answer of a fault-in: a frame, or an error together with the snapshot, which stays good for another attempt.
public enum FaultInResult: ~Copyable {
    case frame(FaultedFrame)
    case failed(TranslationError, InvalidationSnapshot)
}

extension VirtualMachine {
    /// Translates a guest frame to serve a guest fault. May sleep; inside `withSlots`, no lock held.
    /// Kernel: `__kvm_faultin_pfn`. Spec: generic 2.8, with every row of its outcome table.
    ///
    /// - Parameter snapshot: taken before the call; it comes back inside the result, and only the retry check reads it.
    public func faultIn(
        _ frame: GuestFrame, slot: MemorySlot?, write: Bool, noWait: Bool = false, interruptible: Bool = false,
        snapshot: consuming InvalidationSnapshot
    ) -> FaultInResult {
        faultIn(
            frame, in: slot.map { Unmanaged.passUnretained($0) }, write: write, noWait: noWait,
            interruptible: interruptible, snapshot: snapshot)
    }

    /// The same for a slot that is borrowed from the section.
    @inline(__always)
    public func faultIn(
        _ frame: GuestFrame, in slot: Unmanaged<MemorySlot>?, write: Bool, noWait: Bool = false,
        interruptible: Bool = false, snapshot: consuming InvalidationSnapshot
    ) -> FaultInResult {
        var request = FollowRequest(frame: frame, write: write, holder: .guestFault)
        request.noWait = noWait
        request.interruptible = interruptible
        request.wantsWritable = true
        switch follow(request, in: slot) {
        case .failed(let error):
            if memory.isObserved { tellFailure(error, frame) }
            return .failed(error, snapshot)
        case .page(let page, let writable):
            let snapshot = Defect.snapshotAfterTranslate.isOn ? self.snapshot() : snapshot
            let found = page.frame
            // A leaf of more than 4 KiB maps a large folio: of any other page that need not be asked under the lock.
            let isLarge = page.isPartOfLargeFolio
            note(frame, found, writable: writable, owned: true, mapped: false)
            return .frame(
                FaultedFrame(
                    guestFrame: frame, frame: found, isWritable: writable, isCounted: true, isPrivate: false,
                    mayBeHuge: isLarge, slotReference: slot!, snapshot: snapshot, reference: hold(page)))
        case .mapped(let found, let writable, let guessed, let counted):
            let snapshot = Defect.snapshotAfterTranslate.isOn ? self.snapshot() : snapshot
            note(frame, found, writable: writable, owned: guessed, mapped: true)
            return .frame(
                FaultedFrame(
                    guestFrame: frame, frame: found, isWritable: writable, isCounted: counted, isPrivate: false,
                    mayBeHuge: true, slotReference: slot!, snapshot: snapshot,
                    reference: hold(mapped: found, guessed: guessed, counted: counted)))
        }
    }

    @inline(never)
    private func tellFailure(_ error: TranslationError, _ frame: GuestFrame) {
        record(
            Event(
                .translationFailed, holder: .guestFault, guest: frame.number,
                value: UInt64(TranslationError.allCases.firstIndex(of: error) ?? 0)))
    }

    private func note(_ frame: GuestFrame, _ found: HostFrame, writable: Bool, owned: Bool, mapped: Bool) {
        let bits: UInt64 = (writable ? 1 : 0) | (owned ? 2 : 0) | (mapped ? 4 : 0)
        record(Event(.translated, holder: .guestFault, frame: found, guest: frame.number, value: bits))
    }

    func hold(_ page: consuming PageReference) -> FaultReference {
        if isPrecise, !SeriesPatch.pageIsReported.isUndone { return FaultReference(page) }
        return holdAsBefore(page)
    }

    @inline(never)
    private func holdAsBefore(_ page: consuming PageReference) -> FaultReference {
        switch policy {
        case .precise: return FaultReference(guessed: forget(page, Guess(memory: memory)))
        case .guess(let guess): return FaultReference(guessed: forget(page, guess))
        case .tracked(let tracked):
            // The notifier guards the mapping, so the reference is put at once; the frame stays marked as counted.
            let frame = page.frame
            page.releaseUnused()
            return FaultReference(tracked: tracked, frame)
        }
    }

    /// What GUP gave is known by its frame number only from here on.
    func forget(_ page: consuming PageReference, _ guess: Guess) -> GuessedReference {
        let frame = page.frame
        guess.forget(page)
        return GuessedReference(guess, frame)
    }

    private func hold(mapped frame: HostFrame, guessed: Bool, counted: Bool) -> FaultReference {
        switch policy {
        case .precise, .guess:
            return guessed ? FaultReference(guessed: GuessedReference(Guess(memory: memory), frame)) : FaultReference()
        case .tracked(let tracked):
            return counted ? FaultReference(tracked: tracked, frame) : FaultReference()
        }
    }
}
