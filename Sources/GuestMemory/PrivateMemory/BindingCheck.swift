import Audit
import Frames
import HostMemory

/// I-25, with nobody else running: slots and files agree on who is bound to whom, and what is mapped is what they say.
extension VirtualMachine {
    public func checkBindings() -> [Finding] {
        var findings: [Finding] = []
        let files = guestMemoryFiles
        guard hasGuestMemory || !files.isEmpty else { return [] }
        for slot in activeSlots { check(slot, files, &findings) }
        for file in files { check(file, &findings) }
        mmu.forEachLeaf { leaf in check(leaf, files, &findings) }
        return findings
    }

    /// A slot with a file stands in it, for its pages, exactly once.
    private func check(_ slot: MemorySlot, _ files: [GuestMemoryFile], _ findings: inout [Finding]) {
        guard let guestMemory = slot.guestMemory, guestMemory.isBound else { return }
        // By comparison only: the slot's pointer is not followed, it may lead nowhere.
        guard let file = files.first(where: { guestMemory.isBound(to: $0) }) else {
            return findings.append(Finding(.i25, "a slot has a file that is gone", guest: slot.baseFrame))
        }
        let pages = guestMemory.firstPage..<guestMemory.firstPage + slot.pageCount
        let known = file.bindings.filter { $0.slot === slot }
        if known.count != 1 || known[0].pages != pages {
            findings.append(Finding(.i25, "a slot's file does not know the slot's pages", guest: slot.baseFrame))
        }
    }

    /// A binding's slot is there and has the file, and no page has two.
    private func check(_ file: GuestMemoryFile, _ findings: inout [Finding]) {
        for (i, binding) in file.bindings.enumerated() {
            let slot = binding.slot
            if !activeSlots.contains(where: { $0 === slot }) {
                findings.append(Finding(.i25, "a binding has a slot that is gone", guest: slot.baseFrame))
            } else if !(slot.guestMemory?.isBound(to: file) ?? false) {
                findings.append(Finding(.i25, "a binding has a slot that does not know it", guest: slot.baseFrame))
            }
            for other in file.bindings[..<i] where other.pages.overlaps(binding.pages) {
                findings.append(Finding(.i25, "a page of a file is bound to two slots", guest: slot.baseFrame))
            }
        }
    }

    /// What a leaf maps of a private frame is the page that the slot's file has there; a file's page is mapped only so.
    private func check(_ leaf: StageTwoLeaf, _ files: [GuestMemoryFile], _ findings: inout [Finding]) {
        for i in 0..<leaf.level.frames {
            let guest = GuestFrame(leaf.guestFrame.number + i)
            let frame = HostFrame(leaf.frame.number + i)
            if isPrivate(guest) {
                if frame != privateFrame(of: guest) {
                    findings.append(
                        Finding(.i25, "a private frame maps what its file does not have", frame: frame, guest: guest))
                }
            } else if files.contains(where: { $0.holds(frame) }) {
                findings.append(Finding(.i25, "a shared frame maps a private page", frame: frame, guest: guest))
            }
        }
    }

    /// The host frame that a private guest frame's slot has for it, if it is there. For checks.
    public func privateFrame(of guest: GuestFrame) -> HostFrame? {
        guard let slot = slot(containing: guest), let guestMemory = slot.guestMemory,
            let file = guestMemoryFiles.first(where: { guestMemory.isBound(to: $0) })
        else { return nil }
        return file.frame(of: guestMemory.firstPage + (guest.number - slot.baseFrame.number))
    }
}
