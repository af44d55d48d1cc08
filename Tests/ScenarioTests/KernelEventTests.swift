import Paging
import Testing

@testable import Report

/// Each body beside the line that the kernel prints: where a recording of one has such a line, that very line; else what
/// its format makes of the values. Spec: x86 section 10.
@Suite struct X10_TracepointText {
    private func expect(
        _ event: KernelEvent, _ line: String, sourceLocation: SourceLocation = #_sourceLocation
    ) { #expect("\(event.name): \(event.body)" == line, sourceLocation: sourceLocation) }

    /// access, level, and what else a page's text shows.
    private func role(_ level: UInt8, _ access: Rights = .all, direct: Bool = false) -> PageRole {
        var role = PageRole()
        role.level = level
        role.access = access
        role.isDirect = direct
        role.noExecuteEnabled = true
        return role
    }

    // MARK: As recorded

    @Test func `recorded shadow pages`() {
        expect(
            .pageTaken(.init(frame: 0xe0010, role: role(4)), isNew: true),
            "kvm_mmu_get_page: sp gen 0 gfn e0010 l4 8-byte q0 wux nxe ad root 0 sync new")
        expect(
            .pageTaken(.init(frame: 0x200, role: role(1, direct: true)), isNew: true),
            "kvm_mmu_get_page: sp gen 0 gfn 200 l1 8-byte q0 direct wux nxe ad root 0 sync new")
        expect(
            .pageTaken(.init(frame: 0x400, role: role(1, [.user, .execute], direct: true)), isNew: true),
            "kvm_mmu_get_page: sp gen 0 gfn 400 l1 8-byte q0 direct -ux nxe ad root 0 sync new")
        expect(
            .pageZapped(.init(frame: 0x13e00, role: role(1, direct: true))),
            "kvm_mmu_prepare_zap_page: sp gen 0 gfn 13e00 l1 8-byte q0 direct wux nxe ad root 0 sync")
        expect(
            .pageZapped(.init(frame: 1, role: role(4), roots: 1)),
            "kvm_mmu_prepare_zap_page: sp gen 0 gfn 1 l4 8-byte q0 wux nxe ad root 1 sync")
        expect(
            .pageSynced(.init(frame: 0xe0100, role: role(1), isUnsync: true)),
            "kvm_mmu_sync_page: sp gen 0 gfn e0100 l1 8-byte q0 wux nxe ad root 0 unsync")
        expect(
            .pageUnsynced(.init(frame: 0xe0100, role: role(1))),
            "kvm_mmu_unsync_page: sp gen 0 gfn e0100 l1 8-byte q0 wux nxe ad root 0 sync")
        expect(
            .zapAllFast(generation: 0, pages: 15), "kvm_mmu_zap_all_fast: kvm-mmu-valid-gen 0 used_pages f")
    }
    @Test func `recorded entries`() {
        expect(
            .entryRequested(0xe0001, 0x4d518d, level: 1), "kvm_mmu_spte_requested: gfn e0001 pfn 4d518d level 1")
        expect(
            .entrySet(0xe0001, 0x4_d518_de67, level: 1, at: 0x4_01dc_a008, execute: true, user: true),
            "kvm_mmu_set_spte: gfn e0001 spte 4d518de67 (rwxu) level 1 at 401dca008")
        expect(
            .entrySet(7, 0x1_6f72_ea25, level: 1, at: 0x1_04e5_c038, execute: true, user: true),
            "kvm_mmu_set_spte: gfn 7 spte 16f72ea25 (r-xu) level 1 at 104e5c038")
    }
    @Test func `recorded walks and ranges`() {
        expect(.tableWalk(0xe000_1000, code: 0x14), "kvm_mmu_pagetable_walk: addr e0001000 pferr 14 U|F")
        expect(.walkedElement(0xe001_1027, level: 4), "kvm_mmu_paging_element: pte e0011027 level 4")
        expect(.setAccessed(at: 0x4038), "kvm_mmu_set_accessed_bit: gpa 4038")
        expect(
            .unmapRange(0x7f80_e2e7_f000, 0x7f80_e2e8_8000),
            "kvm_unmap_hva_range: mmu notifier unmap range: 0x007f80e2e7f000 -- 0x007f80e2e88000")
    }

    // MARK: By the format

    @Test func faults() {
        expect(
            .pageFault(vcpu: 1, address: 0x1234_5000, errorCode: 0x1aa),
            "kvm_page_fault: vcpu 1 rip 0x0 address 0x0000000012345000 error_code 0x1aa")
        expect(
            .fastPageFault(
                vcpu: 0, address: 0x5000, code: 3, place: 0x1_2340_0028, old: 0x600_0000_0000_0b75,
                new: 0x600_0000_0000_0b77, result: 5),
            "fast_page_fault: vcpu 0 gva 5000 error_code P|W sptep 0000000123400028 old 0x600000000000b75"
                + " new 600000000000b77 spurious 0 fixed 1")
        expect(
            .fastPageFault(vcpu: 2, address: 0, code: 0, place: 0, old: 0, new: 0, result: 6),
            "fast_page_fault: vcpu 2 gva 0 error_code  sptep 0000000000000000 old 0 new 0 spurious 1 fixed 0")
    }
    @Test func `the TDP MMU's entries`() {
        expect(
            .entryChanged(0x40000, level: 2, old: 1 << 63, new: 0x8600_0000_4000_0bf7),
            "kvm_tdp_mmu_spte_changed: as id 0 gfn 40000 level 2 old_spte 8000000000000000 new_spte 8600000040000bf7")
        expect(
            .split(0x40000, 0x8600_0000_4000_0bf7, level: 2),
            "kvm_mmu_split_huge_page: gfn 40000 spte 8600000040000bf7 level 2 errno 0")
        expect(
            .entrySet(5, 0x8600_0000_1234_5b75, level: 1, at: 0x1000, execute: true, user: true),
            "kvm_mmu_set_spte: gfn 5 spte 8600000012345b75 (r-xu) level 1 at 1000")
    }
    @Test func `a page's every word`() {
        var word = role(2, [])
        word.has4ByteEntries = true
        word.quadrant = 3
        word.isInvalid = true
        word.noExecuteEnabled = false
        word.accessDirtyDisabled = true
        expect(
            .pageTaken(.init(generation: 1, frame: 0xabc, role: word, roots: 2, isUnsync: true), isNew: false),
            "kvm_mmu_get_page: sp gen 1 gfn abc l2 4-byte q3 --- invalid !nxe !ad root 2 unsync existing")
        let rights: [(Rights, String)] = [
            ([], "---"), ([.execute], "--x"), ([.write], "w--"), ([.write, .execute], "w-x"), ([.user], "-u-"),
            ([.user, .execute], "-ux"), ([.user, .write], "wu-"), (.all, "wux"),
        ]
        for (access, text) in rights {
            #expect(KernelEvent.Page(frame: 0, role: role(1, access)).text.contains(" q0 \(text) nxe"))
        }
    }
    @Test func `no memory`() {
        expect(
            .markMMIO(at: 0x1_2340_0800, 0x100, access: 6, generation: 0x1f),
            "mark_mmio_spte: sptep:0000000123400800 gfn 100 access 6 gen 1f")
        expect(
            .checkMMIO(0x8000_0000_0010_00fe, now: 0x20, then: 0x1f, isValid: false),
            "check_mmio_spte: spte 80000000001000fe kvm_gen 20 spte-gen 1f valid 0")
        expect(.handleMMIO(address: 0, 0x100, access: 6), "handle_mmio_page_fault: addr:0 gfn 100 access 6")
    }
    @Test func `the guest's tables`() {
        expect(.setDirty(at: 0x2008), "kvm_mmu_set_dirty_bit: gpa 2008")
        expect(.walkerError(code: 0), "kvm_mmu_walker_error: pferr 0 ")
        expect(.walkerError(code: 0xf), "kvm_mmu_walker_error: pferr f P|W|U|RSVD")
        expect(.tableWalk(0x1000, code: 1 << 32 | 2), "kvm_mmu_pagetable_walk: addr 1000 pferr 100000002 W|0x100000000")
    }
    @Test func ages() {
        expect(
            .ageRange(0x7f00_0000_0000, 0x7f00_0000_1000),
            "kvm_age_hva: mmu notifier age hva: 0x007f0000000000 -- 0x007f0000001000")
        expect(.testAge(0x7f00_0000_0000), "kvm_test_age_hva: mmu notifier test age hva: 0x007f0000000000")
    }
    @Test func logs() {
        expect(
            .ringPush(0, dirty: 0x11, reset: 0x10, slot: 2, offset: 0x1f),
            "kvm_dirty_ring_push: ring 0: dirty 0x11 reset 0x10 slot 2 offset 0x1f (used 1)")
        expect(
            .ringReset(1, dirty: 0x11, reset: 0x11), "kvm_dirty_ring_reset: ring 1: dirty 0x11 reset 0x11 (used 0)")
        expect(.ringExit(vcpu: 1), "kvm_dirty_ring_exit: vcpu 1")
    }
    @Test func `asynchronous faults`() {
        expect(.asyncTried(0x5000, 5), "kvm_try_async_get_page: gva = 0x5000, gfn = 0x5")
        expect(.asyncRepeated(0x5000, 5), "kvm_async_pf_repeated_fault: gva = 0x5000, gfn = 0x5")
        expect(.asyncNotPresent(token: 0x1000, 0x5000), "kvm_async_pf_not_present: token 0x1000 gva 0x5000")
        expect(.asyncReady(token: 0x1000, 0), "kvm_async_pf_ready: token 0x1000 gva 0")
        expect(
            .asyncCompleted(0x5000, user: 0x7f00_0000_5000),
            "kvm_async_pf_completed: gva 0x5000 address 0x7f0000005000")
    }
}
