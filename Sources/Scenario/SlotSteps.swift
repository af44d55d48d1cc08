import Frames
import Machine

// KVM's ioctls that take a slot.

extension PhaseBuilder {
    mutating func setMemoryRegion(_ field: Field, _ fields: Fields, _ answer: AnswerReading) -> Action? {
        guard let slot = layout.slot(fields, regions, checked: !answer.mayBeError) else { return nil }
        if isSuccess(answer) { layout.set(slot, at: field.position) }
        return .setMemoryRegion(slot)
    }

    /// Along the rest of the scenario the slots are what they are on the file's own architecture.
    private func isSuccess(_ answer: AnswerReading) -> Bool {
        !answer.on(layout.architecture).alternatives.allSatisfy { if case .error = $0 { true } else { false } }
    }

    mutating func slotAction(_ field: Field, _ id: UInt16, _ fields: Fields, _ answer: AnswerReading) -> Action? {
        let slot = layout.slot(id)
        if slot == nil && !answer.mayBeError {
            complaints.add(
                field.position, "there is no slot \(id) at this point",
                "a slot is in `vm: {slots: ...}` or made by `set_memory_region`; else say `expect: "
                    + "\(field.key.name == "delete_memory_region" ? "EINVAL" : "ENOENT")`")
            return nil
        }
        if field.key.name == "delete_memory_region" {
            if isSuccess(answer) { layout.delete(id) }
            return .deleteMemoryRegion(id: id)
        }
        guard isLogged(slot, id, field, answer) else { return nil }
        guard field.key.name == "clear_dirty_log" else {
            return isInSlot(answer, slot, fields) ? .getDirtyLog(id: id) : nil
        }
        let firstPage = fields.number("first_page") ?? 0
        let all = slot?.pages ?? 0
        let pages = fields.number("num_pages") ?? (all > firstPage ? all - firstPage : 0)
        guard answer.mayBeError || isClearable(firstPage, pages, all, fields) else { return nil }
        return .clearDirtyLog(id: id, firstPage: firstPage, pages: pages)
    }

    private func isLogged(_ slot: SlotPlan?, _ id: UInt16, _ field: Field, _ answer: AnswerReading) -> Bool {
        guard slot?.logDirtyPages != true, !answer.mayBeError else { return true }
        complaints.add(
            field.position, "slot \(id) has no dirty log",
            "give it `flags: [log_dirty_pages]`, or say `expect: ENOENT`")
        return false
    }

    private func isInSlot(_ answer: AnswerReading, _ slot: SlotPlan?, _ fields: Fields) -> Bool {
        for case .pages(let pages) in answer.all {
            guard let slot, let last = pages.last, last >= slot.pages else { continue }
            complaints.add(
                fields.position(of: "expect"), "slot \(slot.id) has no page \(last)",
                "its last page is \(slot.pages - 1)")
            return false
        }
        return true
    }

    /// Spec: generic 5.4, checks 3 and 5.
    private func isClearable(_ first: UInt64, _ pages: UInt64, _ all: UInt64, _ fields: Fields) -> Bool {
        guard first % 64 == 0, first <= all else {
            complaints.add(
                fields.position(of: "first_page"), "KVM_CLEAR_DIRTY_LOG can't begin at page \(first)",
                "a multiple of 64, at most \(all); else say `expect: EINVAL`")
            return false
        }
        guard pages <= all - first, pages % 64 == 0 || first + pages == all else {
            complaints.add(
                fields.position(of: "num_pages"), "KVM_CLEAR_DIRTY_LOG can't clear \(pages) pages from \(first)",
                "a multiple of 64, or up to the slot's last page, \(all - 1); else say `expect: EINVAL`")
            return false
        }
        return true
    }
}
