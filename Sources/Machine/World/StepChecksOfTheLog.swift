import Audit
import Frames
import GuestMemory
import Synchrony

/// The rules of the dirty log: what was written is in this report or in the next, and what can be written without a fault
/// is in the log.
extension StepChecks {
    /// A guest's store has reached memory. It conflicts with the end of a harvest, which forgets what was written before.
    func stored(_ page: GuestFrame, _ slot: MemorySlot) {
        guard slot.isLogged else { return }
        schedulingNote(.atomicAccumulate, harvests.value)
        if !written.contains(page) { written.append(page) }
    }

    /// The VMM turned logging off: the log is gone, and so is what it owed. `first` is a page of the slot.
    func logEnded(_ first: GuestFrame) {
        guard let slot = vm.slot(containing: first) else { return }
        schedulingNote(.atomicUpdate, harvests.value)
        written.removeAll { slot.frames.contains($0) }
    }

    /// The VMM turned logging on, and copies everything now: what was written before is owed to nobody. Until the call
    /// returned vCPUs could write by what they had in their TLBs.
    func logBegan(_ id: UInt16) {
        guard let slot = vm.slot(numbered: UInt32(id)) else { return }
        schedulingNote(.atomicUpdate, harvests.value)
        written.removeAll { slot.frames.contains($0) }
    }

    /// The same for slots that are gone or elsewhere.
    func logsEnded() {
        guard written.contains(where: { vm.slot(containing: $0) == nil }) else { return }
        schedulingNote(.atomicUpdate, harvests.value)
        written.removeAll { vm.slot(containing: $0) == nil }
    }

    /// The lockless path gave W back: it logs the pages next, before its vCPU runs on.
    func expectLogging(_ leaf: LeafMirror.Leaf, _ slot: MemorySlot) {
        guard slot.isLogged else { return }
        for number in leaf.guestFrames.lowerBound.number..<leaf.guestFrames.upperBound.number {
            let page = GuestFrame(number)
            guard slot.frames.contains(page), !vm.isInDirtyLog(page, of: slot) else { continue }
            toBeLogged.append(page)
        }
    }

    /// KVM_GET_DIRTY_LOG or KVM_CLEAR_DIRTY_LOG has returned, and the VMM copies `pages` of the slot now: those that GET
    /// reported, or, with manual protection, where GET copies the log and takes nothing, those that CLEAR cleared. KVM's
    /// protocol has the VMM clear what GET reported *before* it copies the page: what is written in between is then
    /// either in the copy or logged again.
    func harvested(_ slot: MemorySlot, _ pages: [UInt64]) {
        schedulingNote(.atomicUpdate, harvests.value)
        schedulingNote(.atomicLoad, rights.value)
        written.removeAll { page in
            slot.frames.contains(page) && pages.contains(page.number - slot.baseFrame.number)
        }
        checkLog(of: slot)
    }

    /// KVM_RESET_DIRTY_RINGS has returned, and the VMM copies the pages that it had collected before. What is writable is
    /// looked at only at rest: a fault on another vCPU makes its entry and then pushes.
    func harvested(_ pages: [GuestFrame]) {
        schedulingNote(.atomicUpdate, harvests.value)
        written.removeAll { pages.contains($0) }
    }

    /// X44: every page of a logged slot is in the log, or can't be written without a fault. It holds at each harvest's
    /// end, but for pages between the two halves of the lockless path: W, then the log.
    private func checkLog(of slot: MemorySlot) {
        guard slot.isLogged, !vm.logHasHoles else { return }
        for leaf in mirror.leaves where leaf.writable && leaf.guestFrames.overlaps(slot.frames) {
            for number in leaf.guest.number..<leaf.guest.number + leaf.level.frames {
                let page = GuestFrame(number)
                guard slot.frames.contains(page), !toBeLogged.contains(page) else { continue }
                if !vm.isInDirtyLog(page, of: slot), let frame = leaf.frame(for: page) {
                    report(.x44, "the log was read and a page outside of it is writable", frame, page)
                }
            }
        }
    }

    /// At rest, I-12: what was written since it was last reported stands in the log.
    func checkWritten() {
        for page in written {
            guard let slot = vm.slot(containing: page), slot.isLogged, !vm.logHasHoles else { continue }
            if !vm.isInDirtyLog(page, of: slot) {
                journal.add(
                    Finding(.i12, "a page was written since it was last reported, and is not in the log", guest: page))
            }
        }
        written.removeAll { vm.slot(containing: $0).map { !$0.isLogged } ?? true }
        toBeLogged = []
    }
}
