import Audit
import Frames
import GuestMemory
import Hardware
import HostMemory
import Synchrony

/// The rules that hold at every step of a run, each checked at the event that can break it, by whatever task makes that
/// event. The rules that hold only at rest are in `Checks`.
///
/// An explorer reorders events only where it sees that they conflict, so what a check reads is announced like any other
/// read: an installation reads the primary entry, and so conflicts with whoever clears it; a page's use conflicts with its
/// freeing; a change of the primary entry reads the TLBs and conflicts with a change of a stage-2 entry's rights; a guest's
/// store in a logged slot conflicts with the end of a harvest.
final class StepChecks: EventObserver {
    // Unsafe: Embedded Swift has no checked `unowned`; the world outlives its checks, and ends their hearing.
    unowned(unsafe) let vm: VirtualMachine
    private let cpus: [GuestCPU]
    private unowned(unsafe) let journal: Journal
    /// Leaves of the running tables, as the events tell; a leaf that is split stays as it was, since what it maps stays.
    private var leaves: [Leaf] = []
    /// Guest pages of logged slots that were written since they were last reported.
    private var written: [GuestFrame] = []
    private let harvests = ObjectIdentity()
    /// The rights of stage-2 entries, as primary changes look at them.
    private let rights = ObjectIdentity()

    private struct Leaf {
        var guest: GuestFrame
        var frame: HostFrame
        var level: PageLevel
        var writable: Bool

        var end: GuestFrame { GuestFrame(guest.number + level.frames) }

        func frame(for page: GuestFrame) -> HostFrame? {
            let inside = page.number &- guest.number
            return inside < level.frames ? HostFrame(frame.number + inside) : nil
        }
    }

    init(_ vm: VirtualMachine, _ cpus: [GuestCPU], _ journal: Journal) {
        self.vm = vm
        self.cpus = cpus
        self.journal = journal
    }

    override func observe(_ event: Event) {
        switch event.kind {
        case .entryInstalled: installed(event)
        case .entryChanged: changed(event)
        case .entryZapped: zapped(event)
        case .hostEntryCleared, .hostEntrySet: primaryChanged(event)
        case .pageFreed: freed(event)
        default: break
        }
    }

    // MARK: Stage-2 entries

    /// I-7, I-21, I-23, X38: the entry is what the primary table says at this very moment. It can't be otherwise: the
    /// retry check has passed under mmu_lock, and an invalidation takes that lock before it changes the primary entry.
    private func installed(_ event: Event) {
        let guest = GuestFrame(event.guest)
        let leaf = Leaf(
            guest: guest, frame: HostFrame(event.frame), level: PageLevel(event.level),
            writable: vm.mmu.isWritable(event.value))
        leaves.removeAll { $0.guest == guest && $0.level == leaf.level }
        leaves.append(leaf)
        guard let slot = vm.slot(containing: guest), !slot.isInvalid else {
            return report(.i21, "an entry was made for a guest frame without a valid slot", leaf)
        }
        if leaf.writable && slot.flags.readOnly { report(.i23, "a writable entry was made in a read-only slot", leaf) }
        if leaf.frame.number & (leaf.level.frames - 1) != 0 { report(.x38, "a huge entry is not aligned", leaf) }
        guard let primary = vm.addressSpace.translate(slot.userAddress(of: guest)), primary.frame == leaf.frame else {
            return report(.i6, "an entry was made for a frame that the process no longer maps there", leaf)
        }
        if leaf.writable && !primary.writable {
            report(.i7, "an entry was made that lets the guest write what the process may not", leaf)
        }
    }

    private func changed(_ event: Event) {
        schedulingNote(.atomicAccumulate, rights.value)
        for i in leaves.indices where leaves[i].guest.number == event.guest && leaves[i].level.rawValue == event.level {
            leaves[i].writable = vm.mmu.isWritable(event.value)
        }
    }

    private func zapped(_ event: Event) {
        leaves.removeAll { leaf in
            leaf.guest.number == event.guest && leaf.level.rawValue == event.level
        }
    }

    private func report(_ invariant: Invariant, _ reason: StaticReason, _ leaf: Leaf) {
        journal.add(Finding(invariant, reason, frame: leaf.frame, guest: leaf.guest))
    }

    // MARK: The primary table

    /// I-6, I-7, I-13: when a primary entry loses its frame or its right to write, the notifier has been called before, so
    /// no stage-2 entry and no TLB that a vCPU can use maps more than is left. An event of a forked child finds the
    /// parent's entries as they were.
    private func primaryChanged(_ event: Event) {
        let start = UserAddress(event.guest << pageShift)
        let range = start..<(start + PageLevel(event.level).bytes)
        for slot in vm.activeSlots {
            guard let frames = slot.frames(intersecting: range) else { continue }
            schedulingNote(.atomicUpdate, rights.value)
            for leaf in leaves where leaf.guest < frames.upperBound && frames.lowerBound < leaf.end {
                check(max(leaf.guest, frames.lowerBound), slot, leaf.frame(for:), leaf.writable, .i6, .i7)
            }
            for cpu in cpus {
                schedulingNote(.tlbRead, cpu.buffer.identity.value)
                for entry in cpu.buffer.entries where entry.guestFrames.overlaps(frames) && canUse(cpu) {
                    let cached = Leaf(
                        guest: entry.guest, frame: entry.translation.frame, level: entry.translation.level,
                        writable: entry.translation.writable)
                    check(max(entry.guest, frames.lowerBound), slot, cached.frame(for:), cached.writable, .i13, .i13)
                }
            }
        }
    }

    private func check(
        _ guest: GuestFrame, _ slot: MemorySlot, _ mapped: (GuestFrame) -> HostFrame?, _ writable: Bool,
        _ stale: Invariant, _ tooMuch: Invariant
    ) {
        guard let frame = mapped(guest) else { return }
        let primary = vm.addressSpace.translate(slot.userAddress(of: guest))
        if primary?.frame != frame {
            journal.add(
                Finding(
                    stale,
                    stale == .i6
                        ? "the process's page changes while a stage-2 entry maps the old one"
                        : "the process's page changes while a vCPU's TLB maps the old one", frame: frame, guest: guest))
        } else if writable, primary?.writable == false {
            journal.add(
                Finding(
                    tooMuch,
                    tooMuch == .i7
                        ? "the process's page becomes read-only while a stage-2 entry lets the guest write it"
                        : "the process's page becomes read-only while a vCPU's TLB lets the guest write it",
                    frame: frame, guest: guest))
        }
    }

    /// Whether the vCPU can go on using what its TLB holds: it runs guest code, or will without a flush.
    private func canUse(_ cpu: GuestCPU) -> Bool {
        schedulingNote(.tlbRead, cpu.buffer.identity.value)
        schedulingNote(.conditionRead, cpu.identity.value)
        return cpu.isExecuting || !(cpu.hasRequest || cpu.isFlushing)
    }

    // MARK: Pages

    /// I-6, I-13: nothing that the guest can reach is freed.
    private func freed(_ event: Event) {
        let first = event.frame
        let end = first + 1 << event.value
        for leaf in leaves where leaf.frame.number < end && leaf.frame.number + leaf.level.frames > first {
            report(.i6, "a page is freed while a stage-2 entry maps it", leaf)
        }
        for cpu in cpus {
            for entry in cpu.buffer.entries {
                let mapped = entry.translation.frame.number
                guard mapped < end, mapped + entry.translation.level.frames > first, canUse(cpu) else { continue }
                journal.add(
                    Finding(
                        .i13, "a page is freed while a vCPU's TLB maps it", frame: HostFrame(mapped), guest: entry.guest
                    ))
            }
        }
    }

    // MARK: The dirty log

    /// A guest's store has reached memory.
    override func stored(_ guest: UInt64) {
        guard let slot = vm.slot(containing: GuestFrame(guest)), slot.isLogged else { return }
        schedulingNote(.atomicAccumulate, harvests.value)
        let page = GuestFrame(guest)
        if !written.contains(page) { written.append(page) }
    }

    /// The VMM has been told of `pages` of a slot, and copies them now.
    func harvested(_ slot: MemorySlot, _ pages: [UInt64]) {
        schedulingNote(.atomicUpdate, harvests.value)
        written.removeAll { page in
            slot.frames.contains(page) && pages.contains(page.number - slot.baseFrame.number)
        }
    }

    /// At rest, I-12: what was written since it was last reported stands in the log.
    func checkWritten() {
        for page in written {
            guard let slot = vm.slot(containing: page), slot.isLogged, let bitmap = slot.dirtyBitmap else { continue }
            if !bitmap.contains(page.number - slot.baseFrame.number) {
                journal.add(
                    Finding(.i12, "a page was written since it was last reported, and is not in the log", guest: page))
            }
        }
        written.removeAll { vm.slot(containing: $0).map { !$0.isLogged } ?? true }
    }
}
