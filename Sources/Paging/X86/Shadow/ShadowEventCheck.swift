import Audit
import Frames
import GuestMemory
import HostMemory
import Synchronization

/// Rules that only the moment shows in which they could be broken; what can be seen afterwards is in `ShadowCheck.swift`.
/// Caller: mmu_lock for writing. Spec: x86 section 8.
extension ShadowMMU {
    /// X20, X58 and X59: a fault or a prefetch has put `new` where `old` was. `isMapped`: it is the same leaf still.
    func checkSet(
        _ old: UInt64, _ new: UInt64, _ frame: GuestFrame, _ slot: MemorySlot, isPrefetch: Bool, isMapped: Bool,
        _ journal: Journal
    ) {
        let mapped = EntryBits.field.frame(in: new)
        if isPrefetch, EntryBits.isPresent(old) {
            journal.add(Finding(.x59, "a prefetch replaced a present entry", frame: mapped, guest: frame))
        }
        let lost = old & ~new
        if isMapped, lost & bits.hostWritable != 0, new & (bits.mmuWritable | EntryBits.write) != 0 {
            journal.add(
                Finding(
                    .x20, "a leaf lost what the host allows and kept what follows from it", frame: mapped, guest: frame)
            )
        }
        if !isMapped, EntryBits.isPresent(old), new & EntryBits.write != 0, !mayBeWritable(frame, slot) {
            journal.add(
                Finding(.x58, "a leaf in another's place lets the guest write a table", frame: mapped, guest: frame))
        }
    }

    /// X57 and X60: the guest's flush has made `new` of `old`; `rights` are those of the page and of the guest's entry.
    func checkSynced(
        _ old: UInt64, _ new: UInt64, _ frame: GuestFrame, _ slot: MemorySlot, _ rights: Rights, _ journal: Journal
    ) {
        let mapped = EntryBits.field.frame(in: new)
        if (old ^ new) & (EntryBits.frameMask | bits.hostWritable) != 0 {
            journal.add(
                Finding(.x57, "synchronising changed the frame, or what the host allows", frame: mapped, guest: frame))
        }
        let gained = new & ~old & EntryBits.write != 0
        if gained, !rights.contains(.write) || new & bits.hostWritable == 0 || !isNoTable(frame, slot) {
            journal.add(
                Finding(.x57, "synchronising gave a right that is not the guest's to have", frame: mapped, guest: frame)
            )
        }
        if new & bits.accessed == 0, !bits.isAccessTracked(new) {
            journal.add(Finding(.x60, "an entry that was synchronised is not accessed", frame: mapped, guest: frame))
        }
    }

    /// X54: the guest's entry was read again after the page for its table was there, and with it what keeps the guest
    /// from changing the table unheard.
    func checkConfirmed(_ child: ShadowPage, _ walk: borrowing GuestWalk) {
        guard let journal = vm.memory.journal, child.serial > walk.confirmedAt else { return }
        journal.add(
            Finding(.x54, "a page is linked for a guest table that was not looked at since", guest: child.frame))
    }

    /// X51: after the guest's flush an entry gives what the guest's own entry does, and no more.
    func checkRights(_ page: ShadowPage, _ index: Int, _ journal: Journal) {
        let value = entry(page, index).peek()
        let rights = page.rights(of: index)
        let gives: Rights = [
            value & EntryBits.write != 0 ? .write : [], value & bits.user != 0 ? .user : [],
            bits.isExecutable(value) ? .execute : [],
        ]
        guard EntryBits.isLeaf(value, 1), !rights.isSuperset(of: gives) else { return }
        journal.add(
            Finding(
                .x51, "after the guest's flush an entry gives more than the guest's own",
                frame: EntryBits.field.frame(in: value), guest: page.guestFrame(of: index)))
    }

    /// Neither tracked nor shadowed.
    private func isNoTable(_ frame: GuestFrame, _ slot: MemorySlot) -> Bool {
        reverseMap(slot).count(frame) == 0 && allPages(of: frame) { _ in false }
    }

    /// Not tracked; shadowed by pages at most that are known to be out of sync.
    private func mayBeWritable(_ frame: GuestFrame, _ slot: MemorySlot) -> Bool {
        reverseMap(slot).count(frame) == 0 && allPages(of: frame) { $0.isUnsync }
    }

    private func allPages(of frame: GuestFrame, _ condition: (ShadowPage) -> Bool) -> Bool {
        var all = true
        index.forEach(near: frame) { page in
            guard page.frame == frame, page.role.shadowsEntries, !isObsolete(page) else { return true }
            all = condition(page)
            return all
        }
        return all
    }

    /// X33: a fault that finds its root obsolete finds the request too, which was posted in the same section of mmu_lock,
    /// and which nobody but the vCPU's own task, this one, takes off.
    func checkRequest(of cpu: VirtualCPU) {
        guard let journal = vm.memory.journal, !cpu.hasRequest(VirtualCPU.Request.reloadRoot) else { return }
        journal.add(Finding(.x33, "a vCPU faults on an obsolete root and is not asked to leave it", frame: cpu.root))
    }

    /// Remote flushes until now: each has waited until no vCPU was walking. Kernel: `remote_tlb_flush_requests`.
    var flushCount: UInt64 { vm.statistics.remote_tlb_flush_requests.load(ordering: .relaxed) }

    /// X56: since nothing points to the page any more, everybody who might have been walking it was waited for.
    func checkFreed(_ page: ShadowPage, _ journal: Journal) {
        guard flushCount == page.flushesWhenZapped else { return }
        journal.add(
            Finding(.x56, "a shadow page is freed before those who might walk it were waited for", frame: page.table))
    }
}
