import Machine
import Paging

/// A line of ftrace text without its head: a tracepoint's name, and its body as the kernel prints it, byte for byte.
/// Spec: x86 section 10.
struct KernelEvent: Equatable {
    let name: String
    let body: String

    private init(_ name: String, _ body: String) {
        self.name = name
        self.body = body
    }

    // MARK: Faults

    /// `errorCode` is the vendor's: EPT's exit qualification, the code of an NPF or of a #PF.
    static func pageFault(vcpu: UInt64, address: UInt64, errorCode: UInt64) -> KernelEvent {
        KernelEvent(
            "kvm_page_fault",
            "vcpu \(vcpu) rip 0x0 address 0x\(padded(address, 16)) error_code 0x\(hex(errorCode))")
    }

    /// `place` is the entry's address; `result` the kernel's code: 5 fixed, 6 spurious.
    static func fastPageFault(
        vcpu: UInt64, address: UInt64, code: UInt64, place: UInt64, old: UInt64, new: UInt64, result: UInt64
    ) -> KernelEvent {
        KernelEvent(
            "fast_page_fault",
            "vcpu \(vcpu) gva \(hex(address)) error_code \(flags(code)) sptep \(pointer(place)) old \(alternate(old))"
                + " new \(hex(new)) spurious \(result == 6 ? 1 : 0) fixed \(result == 5 ? 1 : 0)")
    }

    // MARK: Entries

    static func entryRequested(_ frame: UInt64, _ hostFrame: UInt64, level: UInt8) -> KernelEvent {
        KernelEvent("kvm_mmu_spte_requested", "gfn \(hex(frame)) pfn \(hex(hostFrame)) level \(level)")
    }

    /// `execute`, `user`: what the format's bits say; r is always printed on 64-bit hosts.
    static func entrySet(
        _ frame: UInt64, _ entry: UInt64, level: UInt8, at place: UInt64, execute: Bool, user: Bool
    ) -> KernelEvent {
        let letters = "r" + (entry & 2 != 0 ? "w" : "-") + (execute ? "x" : "-") + (user ? "u" : "-")
        return KernelEvent(
            "kvm_mmu_set_spte", "gfn \(hex(frame)) spte \(hex(entry)) (\(letters)) level \(level) at \(hex(place))")
    }

    static func entryChanged(_ frame: UInt64, level: UInt8, old: UInt64, new: UInt64, space: Int = 0) -> KernelEvent {
        KernelEvent(
            "kvm_tdp_mmu_spte_changed",
            "as id \(space) gfn \(hex(frame)) level \(level) old_spte \(hex(old)) new_spte \(hex(new))")
    }

    static func split(_ frame: UInt64, _ entry: UInt64, level: UInt8, errno: Int32 = 0) -> KernelEvent {
        KernelEvent(
            "kvm_mmu_split_huge_page", "gfn \(hex(frame)) spte \(hex(entry)) level \(level) errno \(errno)")
    }

    // MARK: Shadow pages

    /// The page's part of a line, `<SP>`.
    struct Page {
        var generation: UInt64 = 0
        var frame: UInt64
        var role: PageRole
        var roots: UInt64 = 0
        var isUnsync = false

        private static let rights = ["---", "--x", "w--", "w-x", "-u-", "-ux", "wu-", "wux"]

        var text: String {
            "sp gen \(generation) gfn \(hex(frame)) l\(role.level) \(role.has4ByteEntries ? 4 : 8)-byte q\(role.quadrant)"
                + (role.isDirect ? " direct" : "") + " \(Self.rights[Int(role.access.rawValue & 7)])"
                + (role.isInvalid ? " invalid" : "") + " \(role.noExecuteEnabled ? "" : "!")nxe"
                + " \(role.accessDirtyDisabled ? "!" : "")ad root \(roots) \(isUnsync ? "unsync" : "sync")"
        }
    }

    static func pageTaken(_ page: Page, isNew: Bool) -> KernelEvent {
        KernelEvent("kvm_mmu_get_page", "\(page.text) \(isNew ? "new" : "existing")")
    }
    static func pageZapped(_ page: Page) -> KernelEvent { KernelEvent("kvm_mmu_prepare_zap_page", page.text) }
    static func pageSynced(_ page: Page) -> KernelEvent { KernelEvent("kvm_mmu_sync_page", page.text) }
    static func pageUnsynced(_ page: Page) -> KernelEvent { KernelEvent("kvm_mmu_unsync_page", page.text) }

    /// Both as they were before.
    static func zapAllFast(generation: UInt64, pages: UInt64) -> KernelEvent {
        KernelEvent("kvm_mmu_zap_all_fast", "kvm-mmu-valid-gen \(generation) used_pages \(hex(pages))")
    }

    // MARK: MMIO

    static func markMMIO(at place: UInt64, _ frame: UInt64, access: UInt64, generation: UInt64) -> KernelEvent {
        KernelEvent(
            "mark_mmio_spte",
            "sptep:\(pointer(place)) gfn \(hex(frame)) access \(hex(access)) gen \(hex(generation))")
    }
    static func checkMMIO(_ entry: UInt64, now: UInt64, then: UInt64, isValid: Bool) -> KernelEvent {
        KernelEvent(
            "check_mmio_spte",
            "spte \(hex(entry)) kvm_gen \(hex(now)) spte-gen \(hex(then)) valid \(isValid ? 1 : 0)")
    }
    static func handleMMIO(address: UInt64, _ frame: UInt64, access: UInt64) -> KernelEvent {
        KernelEvent("handle_mmio_page_fault", "addr:\(hex(address)) gfn \(hex(frame)) access \(hex(access))")
    }

    // MARK: The guest's tables

    static func tableWalk(_ address: UInt64, code: UInt64) -> KernelEvent {
        KernelEvent("kvm_mmu_pagetable_walk", "addr \(hex(address)) pferr \(hex(code)) \(flags(code))")
    }
    static func walkedElement(_ entry: UInt64, level: UInt8) -> KernelEvent {
        KernelEvent("kvm_mmu_paging_element", "pte \(hex(entry)) level \(level)")
    }
    static func setAccessed(at place: UInt64) -> KernelEvent {
        KernelEvent("kvm_mmu_set_accessed_bit", "gpa \(hex(place))")
    }
    static func setDirty(at place: UInt64) -> KernelEvent { KernelEvent("kvm_mmu_set_dirty_bit", "gpa \(hex(place))") }
    static func walkerError(code: UInt64) -> KernelEvent {
        KernelEvent("kvm_mmu_walker_error", "pferr \(hex(code)) \(flags(code))")
    }

    // MARK: Notifiers

    static func unmapRange(_ start: UInt64, _ end: UInt64) -> KernelEvent {
        KernelEvent("kvm_unmap_hva_range", "mmu notifier unmap range: \(long(start)) -- \(long(end))")
    }
    static func ageRange(_ start: UInt64, _ end: UInt64) -> KernelEvent {
        KernelEvent("kvm_age_hva", "mmu notifier age hva: \(long(start)) -- \(long(end))")
    }
    static func testAge(_ address: UInt64) -> KernelEvent {
        KernelEvent("kvm_test_age_hva", "mmu notifier test age hva: \(long(address))")
    }

    // MARK: Logs

    /// The indices are those after the push.
    static func ringPush(
        _ ring: UInt64, dirty: UInt32, reset: UInt32, slot: UInt64, offset: UInt64
    ) -> KernelEvent {
        KernelEvent(
            "kvm_dirty_ring_push",
            "ring \(ring): dirty 0x\(hex(UInt64(dirty))) reset 0x\(hex(UInt64(reset))) slot \(slot) offset"
                + " 0x\(hex(offset)) (used \(dirty &- reset))")
    }
    static func ringReset(_ ring: UInt64, dirty: UInt32, reset: UInt32) -> KernelEvent {
        KernelEvent(
            "kvm_dirty_ring_reset",
            "ring \(ring): dirty 0x\(hex(UInt64(dirty))) reset 0x\(hex(UInt64(reset))) (used \(dirty &- reset))")
    }
    static func ringExit(vcpu: UInt64) -> KernelEvent { KernelEvent("kvm_dirty_ring_exit", "vcpu \(vcpu)") }

    // MARK: Asynchronous faults

    static func asyncTried(_ address: UInt64, _ frame: UInt64) -> KernelEvent {
        KernelEvent("kvm_try_async_get_page", "gva = \(alternate(address)), gfn = \(alternate(frame))")
    }
    static func asyncRepeated(_ address: UInt64, _ frame: UInt64) -> KernelEvent {
        KernelEvent("kvm_async_pf_repeated_fault", "gva = \(alternate(address)), gfn = \(alternate(frame))")
    }
    static func asyncNotPresent(token: UInt64, _ address: UInt64) -> KernelEvent {
        KernelEvent("kvm_async_pf_not_present", "token \(alternate(token)) gva \(alternate(address))")
    }
    static func asyncReady(token: UInt64, _ address: UInt64) -> KernelEvent {
        KernelEvent("kvm_async_pf_ready", "token \(alternate(token)) gva \(alternate(address))")
    }
    static func asyncCompleted(_ address: UInt64, user: UInt64) -> KernelEvent {
        KernelEvent("kvm_async_pf_completed", "gva \(alternate(address)) address \(alternate(user))")
    }

    // MARK: printf

    /// The names of PFERR bits as 6.13 has them, joined; what has no name is one number. Spec: x86 10.
    static func flags(_ code: UInt64) -> String {
        let names: [(UInt64, String)] = [(1, "P"), (2, "W"), (4, "U"), (8, "RSVD"), (16, "F")]
        var parts = names.filter { code & $0.0 != 0 }.map(\.1)
        if code & ~31 != 0 { parts.append("0x\(hex(code & ~31))") }
        return parts.joined(separator: "|")
    }

    /// `%#llx`: no `0x` before zero.
    private static func alternate(_ value: UInt64) -> String { value == 0 ? "0" : "0x\(hex(value))" }
    /// `%p`: the kernel hashes it; 16 digits.
    private static func pointer(_ value: UInt64) -> String { padded(value, 16) }
    /// `%#016lx`: 14 digits behind `0x`.
    private static func long(_ value: UInt64) -> String { "0x" + padded(value, 14) }
    private static func padded(_ value: UInt64, _ digits: Int) -> String {
        let text = hex(value)
        return String(repeating: "0", count: max(0, digits - text.count)) + text
    }
}
