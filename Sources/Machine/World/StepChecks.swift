import Audit
import Frames
import GuestMemory
import Hardware
import HostMemory
import Synchrony

/// The rules that hold at every step of a run, each checked at the event that can break it, by whatever task makes that
/// event. The rules that hold only at rest are in `Checks`. Here: stage-2 entries; then `StepChecksOfMemory` and
/// `StepChecksOfTheLog`.
///
/// An explorer reorders events only where it sees that they conflict, so what a check reads is announced like any other
/// read, and each check says which announcement forces the order apart in which it would fire.
final class StepChecks: EventObserver {
    // Unsafe: Embedded Swift has no checked `unowned`; the world outlives its checks, and ends their hearing.
    unowned(unsafe) let vm: VirtualMachine
    let cpus: [GuestCPU]
    let paged: [PagedCPU]
    unowned(unsafe) let journal: Journal
    /// Who wants to hear of the guest's writes.
    unowned(unsafe) var consumers: Consumers?
    private(set) var mirror = LeafMirror()
    /// The rights of stage-2 entries, as checks of other tasks' events look at them.
    let rights = ObjectIdentity()
    let harvests = ObjectIdentity()
    /// Guest pages of logged slots that were written since they were last reported.
    var written: [GuestFrame] = []
    /// Guest pages that the lockless path has made writable and not yet logged.
    var toBeLogged: [GuestFrame] = []

    init(_ vm: VirtualMachine, _ cpus: [GuestCPU], _ journal: Journal, paged: [PagedCPU] = []) {
        self.vm = vm
        self.cpus = cpus
        self.paged = paged
        self.journal = journal
    }

    override func observe(_ event: Event) {
        switch event.kind {
        case .entryInstalled: installed(event)
        case .entryChanged: changed(event)
        case .entryZapped: zapped(event)
        // The shadow MMU empties an entry before it links a table to it, and tells so.
        case .tableLinked where paged.isEmpty: linked(event)
        case .slotDeleted, .slotMoved: slotGone()
        case .hostEntryCleared, .hostEntrySet: primaryChanged(event)
        case .pageFreed: freed(HostFrame(event.frame), 1 << event.value)
        case .slotFlags where event.extra == 0: logEnded(GuestFrame(event.guest))
        case .dirtyLogged: toBeLogged.removeAll { $0.number == event.guest }
        default: break
        }
    }

    // What is heard beside the events. An override can't stand in an extension.
    override func invalidationStarted(_ first: UInt64, _ pages: UInt64) { notifiersReturned(first, pages) }
    override func givenBack(_ first: UInt64, _ frames: UInt64) { leftByDriver(HostFrame(first), frames) }
    override func accessed(_ guest: UInt64, _ frame: UInt64, isStore: Bool) {
        reached(GuestFrame(guest), HostFrame(frame), isStore: isStore)
    }

    func report(_ invariant: Invariant, _ reason: StaticReason, _ frame: HostFrame, _ guest: GuestFrame) {
        journal.add(Finding(invariant, reason, frame: frame, guest: guest))
    }

    private func report(_ invariant: Invariant, _ reason: StaticReason, _ leaf: LeafMirror.Leaf) {
        report(invariant, reason, leaf.frame, leaf.guest)
    }

    // MARK: Stage-2 entries

    /// I-6, I-7, I-18, I-21, I-23, X12, X38: the entry is what the primary table says at this very moment. It can't be
    /// otherwise: the retry check has passed under mmu_lock, and an invalidation takes that lock before it changes the
    /// primary entry. The check reads the primary entry and the invalidation count, and so conflicts with whoever changes
    /// them.
    private func installed(_ event: Event) {
        let leaf = LeafMirror.leaf(event, vm.mmu)
        mirror.install(leaf, over: event.extra, vm.mmu)
        if vm.isInvalidating(leaf.guestFrames) {
            report(.x12, "an entry was made while an invalidation of its frame was in progress", leaf)
        }
        if !vm.memory.exists(leaf.frame) { return report(.i18, "an entry was made for what is no memory", leaf) }
        if let state = vm.memory.inspect(leaf.frame), state.flags.isFree {
            report(.i6, "an entry was made for a free page", leaf)
        }
        // An INVALID slot is one that is being deleted: a fault that found it valid may still install, and the deletion
        // waits for it before it zaps (X16). Gone it can't be before that.
        guard let slot = vm.slot(containing: leaf.guest) else {
            return report(.i21, "an entry was made for a guest frame without a slot", leaf)
        }
        if leaf.writable && slot.flags.readOnly { report(.i23, "a writable entry was made in a read-only slot", leaf) }
        checkAgainstPrimary(leaf, slot)
    }

    private func checkAgainstPrimary(_ leaf: LeafMirror.Leaf, _ slot: MemorySlot) {
        let frames = leaf.level.frames
        let address = slot.userAddress(of: leaf.guest)
        let inside = slot.frames.lowerBound <= leaf.guest && leaf.guestFrames.upperBound <= slot.frames.upperBound
        if !inside || leaf.frame.number & (frames - 1) != 0 || address.page & (frames - 1) != 0 {
            return report(.x38, "a huge entry does not lie in its slot, aligned with what it maps", leaf)
        }
        guard let primary = vm.addressSpace.translate(address), primary.frame == leaf.frame else {
            // Private memory is in no primary table; I-25 is its rule.
            if vm.isPrivate(leaf.guest) { return }
            return report(.i6, "an entry was made for a frame that the process no longer maps there", leaf)
        }
        if primary.level < leaf.level { report(.x38, "an entry is larger than what the process maps", leaf) }
        if leaf.writable && !primary.writable {
            report(.i7, "an entry was made that lets the guest write what the process may not", leaf)
        }
    }

    /// I-7, I-23: the lockless path gives W back only to an entry whose page the process may write still, for an
    /// invalidation takes the entry before it changes the primary one. The check reads the primary entry.
    private func changed(_ event: Event) {
        schedulingNote(.atomicAccumulate, rights.value)
        let leaf = LeafMirror.leaf(event, vm.mmu)
        guard mirror.change(leaf, wasWritable: vm.mmu.isWritable(event.extra)) else {
            if !leaf.writable { toBeLogged.removeAll { leaf.guestFrames.contains($0) } }
            return
        }
        guard let slot = vm.slot(containing: leaf.guest) else { return }
        if slot.flags.readOnly { report(.i23, "an entry of a read-only slot became writable", leaf) }
        if vm.addressSpace.translate(slot.userAddress(of: leaf.guest))?.writable != true, !vm.isPrivate(leaf.guest) {
            report(.i7, "an entry became writable whose page the process may not write", leaf)
        }
        expectLogging(leaf, slot)
    }

    private func zapped(_ event: Event) {
        let leaf = LeafMirror.leaf(event, vm.mmu)
        mirror.remove(leaf.guest, leaf.level, leaf.frame, wasWritable: vm.mmu.isWritable(event.extra))
        toBeLogged.removeAll { leaf.guestFrames.contains($0) }
    }

    private func linked(_ event: Event) {
        let level = PageLevel(event.level)
        if vm.mmu.isLeaf(event.extra, level) { mirror.split(GuestFrame(event.guest), level) }
    }

    /// I-21: once a slot has gone nothing maps its guest frames. An entry made after its removal is found when it is made.
    private func slotGone() {
        for leaf in mirror.leaves where vm.slot(containing: leaf.guest) == nil {
            report(.i21, "a slot is gone and an entry still maps its memory", leaf)
        }
        logsEnded()
    }

    // MARK: At rest

    /// What was collected step by step agrees with what a walk finds. `leaves` is sorted by guest frame.
    func checkAtRest(_ leaves: [StageTwoLeaf]) {
        if let guest = mirror.difference(from: leaves) {
            journal.add(Finding(.i7, "an entry is not as the events told", guest: guest))
        }
        checkWritten()
    }
}
