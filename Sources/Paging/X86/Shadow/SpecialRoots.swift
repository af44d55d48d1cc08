import Audit
import Frames
import GuestMemory
import HostMemory
import Synchrony

/// Roots of fewer than four levels: four pages of level 2, and tables above them that KVM makes by hand. No page of the
/// index stands behind such a table, so that it is nobody's but its vCPU's, is remembered for no other CR3 or nCR3, and
/// shadows nothing. Kernel: special roots: `pae_root`, `pml4_root`, `pml5_root`. Spec: x86 4.4.
///
/// Under shadow paging the processor takes four pointers, as the guest's own does. With nested paging its tables have the
/// levels of the host, also for a guest hypervisor of 32 bits.
///
/// Caller: the vCPU's task, outside of guest mode.
extension ShadowMMU {
    /// Puts aside what `attachFour` needs; false: there is no memory. No lock held. Kernel: `mmu_alloc_special_roots`.
    func makeSpecialTables(_ state: ShadowCPU) -> Bool {
        guard state.usesFourRoots else { return true }
        while state.specialTables.count < state.specialTableCount {
            guard let table = vm.host.allocateTable(order: 0, fill: EntryBits.empty) else { return false }
            state.specialTables.append(table)
        }
        return true
    }

    /// PAE tables for nested paging: the pointers are read when the root is made, and again by each walk. One that can't be
    /// read is not present. Inside `withSlots`, no lock held. Kernel: `nested_svm_get_tdp_pdptr`.
    func readNestedPointers(_ state: ShadowCPU, _ cpu: VirtualCPU) {
        guard base != nil, state.format.levels == 3 else { return }
        func pointer(_ index: UInt64) -> UInt64 { readPointer(index, state.format, cpu) ?? 0 }
        state.setPageDirectoryPointers((pointer(0), pointer(1), pointer(2), pointer(3)))
    }

    /// Nil: it can't be read.
    func readPointer(_ index: UInt64, _ format: GuestEntryFormat, _ cpu: VirtualCPU) -> UInt64? {
        readEntry(cpu, GuestAddress(format.pointers + index * 8), format, atomically: false)
    }

    /// The pointer of PAE tables that translates `address`. A processor has read them with CR3, but those of nested tables
    /// it reads in each walk. Source: AMD APM volume 2, "Nested paging", legacy PAE mode. As `readNestedPointers`.
    func pageDirectoryPointer(_ address: UInt64, _ state: ShadowCPU, _ cpu: VirtualCPU) -> UInt64 {
        let index = address >> 30 & 3
        guard base != nil else { return state.pageDirectoryPointers(Int(index)) }
        return readPointer(index, state.format, cpu) ?? 0
    }

    /// The four pages, found or made, and the tables above them. mmu_lock for writing.
    func attachFour(_ state: ShadowCPU, _ cpu: VirtualCPU) {
        guard let pointers = state.specialTables.first, let top = state.specialTables.last else { return }
        for level in 1..<state.specialTables.count where special(level, 0, state).peek() == EntryBits.empty {
            link(state.specialTables[level - 1], special(level, 0, state), state)
        }
        state.fourRoots = (0..<4).map { i in
            guard let frame = frame(ofRoot: i, state, cpu) else { return nil }
            let page = page(frame, state.roleOfFour(i), cpu)
            page.rootCount += 1
            link(page.table, StageTwoEntry(vm.memory.entry(i, of: pointers), EntryBits.field), state)
            return page
        }
        setRoot(top, of: cpu)
    }

    /// The guest's directory behind one of the four, or the first frame of its GiB; nil: there is none.
    private func frame(ofRoot index: Int, _ state: ShadowCPU, _ cpu: VirtualCPU) -> GuestFrame? {
        let format = state.format
        let frame: GuestFrame
        switch format.levels {
        case 0: return GuestFrame(UInt64(index) << 18)
        case 2: frame = GuestAddress(format.top).frame
        default:
            let pointer = state.pageDirectoryPointers(index)
            guard format.isPresent(pointer), !format.hasReservedBit(pointer, 3) else { return nil }
            frame = format.frame(pointer, 3)
        }
        return vm.isVisible(frame, in: cpu.addressSpaceNumber) ? frame : nil
    }

    private func special(_ table: Int, _ index: Int, _ state: ShadowCPU) -> StageTwoEntry {
        StageTwoEntry(vm.memory.entry(index, of: state.specialTables[table]), EntryBits.field)
    }

    private func link(_ table: HostFrame, _ entry: StageTwoEntry, _ state: ShadowCPU) {
        let found = entry.link(vm.host.table(table), attributes: state.specialAttributes, expected: EntryBits.empty)
        precondition(found == nil, "a root is linked twice")
    }

    /// The vCPU lets its four pages go; the tables above them stay its own. mmu_lock for writing.
    func detachFour(_ state: ShadowCPU, _ zapped: inout ZappedPages) {
        for (i, page) in state.fourRoots.enumerated() {
            guard let page else { continue }
            _ = special(0, i, state).exchange(forEmpty: EntryBits.empty)
            release(page, &zapped)
        }
        state.fourRoots = []
    }

    /// As `detachFour`, for a vCPU that goes over to other tables. Takes mmu_lock. Kernel: `kvm_mmu_free_roots` of the
    /// current root, in `fast_pgd_switch`.
    func dropFour(_ cpu: VirtualCPU) {
        let state = state(of: cpu)
        guard !state.fourRoots.isEmpty else { return }
        let guardian = vm.lockMMU()
        var zapped = ZappedPages()
        detachFour(state, &zapped)
        commit(&zapped)
        guardian.unlock()
    }

    func freeSpecialTables(_ state: ShadowCPU) {
        for table in state.specialTables { vm.host.freeTable(table) }
        state.specialTables = []
    }

    // MARK: Checks, with nobody else running

    /// X23 and X53 of the tables that are made by hand, X35 of who uses them, and X61: each page knows how many vCPUs have it
    /// as a root.
    func checkRoots() -> [Finding] {
        var findings: [Finding] = []
        for cpu in vm.virtualCPUs { check(state(of: cpu), cpu, &findings) }
        index.forEachPage { page in
            if page.rootCount != vm.virtualCPUs.reduce(0, { $0 + self.state(of: $1).uses(of: page) }) {
                findings.append(
                    Finding(
                        .x61, "a page is a root more or less often than it knows", frame: page.table, guest: page.frame)
                )
            }
        }
        return findings
    }

    private func check(_ state: ShadowCPU, _ cpu: VirtualCPU, _ findings: inout [Finding]) {
        if !state.fourRoots.isEmpty, !state.usesFourRoots || state.specialTables.count != state.specialTableCount {
            findings.append(Finding(.x53, "a root of four pages has too few tables above them", frame: cpu.root))
            return
        }
        for table in state.specialTables.indices {
            for i in 0..<512 {
                let value = special(table, i, state).peek()
                let below = state.frame(below: table, i)
                let expected = below.map { EntryBits.field.bits(for: $0) | state.specialAttributes } ?? EntryBits.empty
                // The upper tables are linked with the first root.
                if value == expected || table > 0 && value == EntryBits.empty && state.fourRoots.isEmpty { continue }
                let leads = below.map { EntryBits.field.frame(in: value) == $0 } ?? false
                findings.append(
                    leads
                        ? Finding(.x23, "a link that is made by hand has bits that it may not have", frame: below)
                        : Finding(
                            .x53, "a table that is made by hand does not lead to its vCPU's roots",
                            frame: state.specialTables[table]))
            }
        }
        for (i, page) in state.fourRoots.enumerated() {
            guard let page else { continue }
            var role = page.role
            role.isInvalid = false
            if role != state.roleOfFour(i) {
                findings.append(
                    Finding(.x52, "one of four roots has another role", frame: page.table, guest: page.frame))
            }
            if isObsolete(page), !cpu.hasRequest {
                findings.append(
                    Finding(
                        .x35, "a vCPU would enter the guest on an obsolete root", frame: page.table, guest: page.frame))
            }
        }
    }
}

extension ShadowCPU {
    /// What stands in an entry that is made by hand beside the frame: P of a pointer that the processor loads; P, W, U and A
    /// where it is an entry of 64-bit tables.
    fileprivate var specialAttributes: UInt64 { role.level < 4 ? 1 : 0x27 }

    fileprivate var specialTableCount: Int { role.level < 4 ? 1 : Int(role.level) - 2 }

    /// The role of one of the four. Kernel: `mmu_alloc_root` with `PT32_ROOT_LEVEL`.
    fileprivate func roleOfFour(_ index: Int) -> PageRole {
        var role = role
        role.level = 2
        if role.has4ByteEntries { role.quadrant = UInt8(index) }
        return role
    }

    /// What an entry of a table that is made by hand leads to.
    fileprivate func frame(below table: Int, _ index: Int) -> HostFrame? {
        guard table == 0 else { return index == 0 ? specialTables[table - 1] : nil }
        return index < fourRoots.count ? fourRoots[index]?.table : nil
    }

    /// How many of the vCPU's roots, in use or remembered, the page is.
    fileprivate func uses(of page: ShadowPage) -> Int {
        (root?.page === page ? 1 : 0) + earlierRoots.filter { $0.page === page }.count
            + fourRoots.filter { $0 === page }.count
    }
}
