import Audit
import Frames
import GuestMemory
import HostMemory
import Synchrony

/// The tables that a vCPU's hardware starts from. Caller: the vCPU's task, outside of guest mode, no lock held.
/// Spec: x86 4.4.
extension ShadowMMU {
    /// The guest loads control registers, or a VMM does for it: tables for another role or another CR3 are remembered for
    /// a while, and found again, and synced then: loading CR3 flushes. False: a page-directory-pointer entry has reserved bits (PAE), and nothing is loaded.
    /// Kernel: `kvm_init_mmu`, `kvm_mmu_new_pgd`, `load_pdptrs`.
    @discardableResult
    public func load(_ registers: GuestRegisters, on cpu: VirtualCPU) -> Bool {
        if registers.levels == 3 {
            guard let pointers = readPointers(registers, cpu) else { return false }
            state(of: cpu).setPageDirectoryPointers(pointers)
        }
        load(GuestEntryFormat(registers: registers), registers.rootRole(space: cpu.addressSpaceNumber), on: cpu)
        syncCurrentRoot(cpu)
        return true
    }

    /// Goes over to other tables, or the same anew: a root that is remembered for them is taken, as it is.
    func load(_ format: GuestEntryFormat, _ role: PageRole, on cpu: VirtualCPU) {
        let state = state(of: cpu)
        if base != nil { dropFour(cpu) } else if state.usesFourRoots { dropRoots(cpu) }
        let last = state.root
        state.root = nil
        state.hasDummyRoot = false
        state.format = format
        state.role = role
        if let last { state.earlierRoots.insert(last, at: 0) }
        reuseRoot(state)
        forgetOldestRoot(state)
        setRoot(state.root?.page.table, of: cpu)
        cpu.dropTranslations()
    }

    /// What the processor would start from, if these are the tables in use.
    func setRoot(_ table: HostFrame?, of cpu: VirtualCPU) {
        if isInUse(by: cpu) { cpu.root = table }
    }

    /// Nil: one of the four can't be read or has a reserved bit set. Kernel: `load_pdptrs`.
    private func readPointers(_ registers: GuestRegisters, _ cpu: VirtualCPU) -> (UInt64, UInt64, UInt64, UInt64)? {
        let format = GuestEntryFormat(registers: registers)
        var values: [UInt64] = []
        for i in 0..<4 as Range<UInt64> {
            guard let entry = vm.withSlots({ readPointer(i, format, cpu) }) else { return nil }
            if format.isPresent(entry), format.hasReservedBit(entry, 3) { return nil }
            values.append(entry)
        }
        return (values[0], values[1], values[2], values[3])
    }

    private func forgetOldestRoot(_ state: ShadowCPU) {
        guard state.earlierRoots.count > Self.rememberedRoots else { return }
        release(state.earlierRoots.removeLast().page)
    }
    /// Kernel: `KVM_MMU_NUM_PREV_ROOTS`.
    static let rememberedRoots = 3

    /// Before the oldest is forgotten: with the current one, four are remembered.
    /// Kernel: `cached_root_find_and_keep_current`.
    private func reuseRoot(_ state: ShadowCPU) {
        guard !state.usesFourRoots else { return }
        let found = state.earlierRoots.firstIndex {
            $0.pointer == state.format.pointer && $0.page.role == state.role && !isObsolete($0.page)
        }
        if let found { state.root = state.earlierRoots.remove(at: found) }
        state.root?.page.floods = 0
    }

    /// Makes the root that the vCPU lacks. Kernel: `kvm_mmu_load`, `mmu_alloc_shadow_roots`.
    func takeRoot(_ cpu: VirtualCPU) {
        let state = state(of: cpu)
        precondition(isInUse(by: cpu), "a root is made for the tables in use")
        if state.role.rawValue == 0 { state.role = firstRole(of: cpu) }
        guard !state.hasRoot else {
            return setRoot(state.root?.page.table ?? state.specialTop ?? cpu.root, of: cpu)
        }
        state.rootFailure = nil
        guard prepareSlots(), makeSpecialTables(state), fillStock(state, to: Self.tablesPerFault) else {
            state.rootFailure = .ENOMEM
            return
        }
        vm.withSlots {
            readNestedPointers(state, cpu)
            let guardian = vm.lockMMU()
            if makeRoom() {
                if state.usesFourRoots { attachFour(state, cpu) } else { makeRoot(state, cpu) }
            } else {
                state.rootFailure = .ENOSPC
            }
            guardian.unlock()
        }
        syncRoots(cpu)
        cpu.dropTranslations()
    }

    private func firstRole(of cpu: VirtualCPU) -> PageRole {
        direct.map { $0.rootRole(space: cpu.addressSpaceNumber) }
            ?? state(of: cpu).registers.rootRole(space: cpu.addressSpaceNumber)
    }

    private func makeRoot(_ state: ShadowCPU, _ cpu: VirtualCPU) {
        let frame = GuestAddress(state.format.top).frame
        guard direct != nil || vm.isVisible(frame, in: cpu.addressSpaceNumber) else {
            // The guest can only fault: its own walk finds nothing either. Kernel: `kvm_mmu_get_dummy_root`.
            state.hasDummyRoot = true
            setRoot(vm.host.zeroPage, of: cpu)
            return
        }
        let page = page(frame, state.role, cpu)
        page.rootCount += 1
        state.root = ShadowRoot(page: page, pointer: state.format.pointer)
        setRoot(page.table, of: cpu)
    }

    // MARK: Letting go

    /// One vCPU less has the page as its root. One that was zapped meanwhile is freed now. Takes mmu_lock.
    /// Kernel: `mmu_free_root_page`.
    private func release(_ page: ShadowPage) {
        let guardian = vm.lockMMU()
        var zapped = ZappedPages()
        release(page, &zapped)
        commit(&zapped)
        guardian.unlock()
    }

    func release(_ page: ShadowPage, _ zapped: inout ZappedPages) {
        page.rootCount -= 1
        if page.rootCount == 0, page.role.isInvalid { zap(page, &zapped) }
    }

    /// Lets go of the roots of four or five levels that `isDropped` names. Kernel: `kvm_mmu_free_roots`.
    func dropRoots(_ cpu: VirtualCPU, alsoCurrent: Bool = true, where isDropped: (ShadowRoot) -> Bool) {
        let state = state(of: cpu)
        let guardian = vm.lockMMU()
        var zapped = ZappedPages()
        if alsoCurrent, let root = state.root, isDropped(root) {
            release(root.page, &zapped)
            state.root = nil
            setRoot(nil, of: cpu)
        }
        for i in state.earlierRoots.indices.reversed() where isDropped(state.earlierRoots[i]) {
            release(state.earlierRoots.remove(at: i).page, &zapped)
        }
        commit(&zapped)
        guardian.unlock()
    }

    /// Kernel: `kvm_mmu_unload`.
    func dropRoots(_ cpu: VirtualCPU) {
        let state = state(of: cpu)
        let guardian = vm.lockMMU()
        var zapped = ZappedPages()
        if let root = state.root { release(root.page, &zapped) }
        for root in state.earlierRoots { release(root.page, &zapped) }
        detachFour(state, &zapped)
        state.root = nil
        state.hasDummyRoot = false
        state.earlierRoots = []
        setRoot(nil, of: cpu)
        commit(&zapped)
        guardian.unlock()
        freeSpecialTables(state)
    }

    /// Roots without a page of their own, the four and the dummy, go in any case: nobody can say how old they are.
    /// Kernel: `kvm_mmu_free_obsolete_roots`, `is_obsolete_root`.
    func dropObsoleteRoots(_ cpu: VirtualCPU) {
        let state = state(of: cpu)
        let guardian = vm.lockMMU()
        var zapped = ZappedPages()
        if state.hasDummyRoot {
            state.hasDummyRoot = false
            setRoot(nil, of: cpu)
        }
        if state.usesFourRoots {
            detachFour(state, &zapped)
            setRoot(nil, of: cpu)
        }
        if let root = state.root, isObsolete(root.page) {
            release(root.page, &zapped)
            state.root = nil
            setRoot(nil, of: cpu)
        }
        for i in state.earlierRoots.indices.reversed() where isObsolete(state.earlierRoots[i].page) {
            release(state.earlierRoots.remove(at: i).page, &zapped)
        }
        commit(&zapped)
        guardian.unlock()
    }

    func dropEarlierUnsyncRoots(_ cpu: VirtualCPU) {
        guard !state(of: cpu).earlierRoots.isEmpty else { return }
        dropRoots(cpu, alsoCurrent: false) { $0.page.isUnsync || $0.page.unsyncChildren > 0 }
    }

    /// Kernel: `is_page_fault_stale`, its first half.
    func hasObsoleteRoot(_ state: ShadowCPU) -> Bool {
        if let root = state.root { return isObsolete(root.page) }
        for case let page? in state.fourRoots where isObsolete(page) { return true }
        return !state.hasRoot
    }
}
