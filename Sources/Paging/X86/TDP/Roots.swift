import Audit
import Frames
import GuestMemory
import HostMemory
import Synchrony

/// What the MMU keeps about a root, in the two words of its page frame. Kernel: `struct kvm_mmu_page` of a root.
///
/// States, Spec: x86 3.1:
/// 1. valid: the MMU holds one reference, each vCPU on it another.
/// 2. invalid, scheduled: no vCPU runs on it any more; the zapper has inherited the MMU's reference. Set under mmu_lock
///    for writing, together with the request to all vCPUs (X33). Notifiers still find it (X34).
/// 3. invalid, zapped: empty. Held by vCPUs that have not yet served the request.
/// 4. no reference: off the list, freed after a grace period.
struct RootInfo {
    /// What the tree is for; `isInvalid` is the first step of its end. Kernel: `role`.
    var role: PageRole
    var isScheduled: Bool
    var references: UInt64

    var isInvalid: Bool { role.isInvalid }
    var space: UInt8 { role.space }

    var words: (UInt64, UInt64) { (UInt64(role.rawValue) | (isScheduled ? 1 << 32 : 0), references) }

    init(_ role: PageRole, references: UInt64) {
        self.role = role
        isScheduled = false
        self.references = references
    }

    init(_ words: (UInt64, UInt64)) {
        role = PageRole(rawValue: UInt32(truncatingIfNeeded: words.0))
        isScheduled = words.0 & 1 << 32 != 0
        references = words.1
    }
}

extension TDPMMU {
    /// Caller holds `pages`; for writing `isInvalid` also mmu_lock for writing, so that a reader of the lock may look.
    func info(ofRoot root: HostFrame) -> RootInfo { RootInfo(vm.host.tableWords(root)) }
    private func setInfo(_ info: RootInfo, ofRoot root: HostFrame) {
        vm.host.setTableWords(root, info.words.0, info.words.1)
    }

    /// Every root, valid or not. While mmu_lock is held for writing none can go.
    var allRoots: [HostFrame] {
        pages.lock()
        defer { pages.unlock() }
        return roots
    }

    /// The roots of an address space, valid or not.
    func roots(of space: UInt8) -> [HostFrame] {
        pages.lock()
        defer { pages.unlock() }
        return roots.filter { info(ofRoot: $0).space == space }
    }

    /// Those that vCPUs may use. Under mmu_lock none of them becomes invalid (for reading) or goes.
    func validRoots(of space: UInt8) -> [HostFrame] {
        pages.lock()
        defer { pages.unlock() }
        return roots.filter { info(ofRoot: $0).space == space && !info(ofRoot: $0).isInvalid }
    }

    func isValid(_ root: HostFrame) -> Bool {
        pages.lock()
        defer { pages.unlock() }
        return !info(ofRoot: root).isInvalid
    }

    // MARK: A vCPU's root

    /// What the vCPU's tree must be. Kernel: `kvm_calc_tdp_mmu_root_page_role`. The vCPU's own task.
    func role(for cpu: VirtualCPU) -> PageRole {
        PageRole.tdpRoot(
            levels: configuration.levels, accessDirty: accessDirty, space: cpu.addressSpaceNumber,
            guestMode: state(of: cpu).isGuestMode)
    }

    /// The role of a root; constant but for `isInvalid`, which changes under mmu_lock for writing. Caller holds mmu_lock.
    func role(ofRoot root: HostFrame) -> PageRole { info(ofRoot: root).role }

    /// Gives the vCPU the VM's root of its role, a new one if there is none that is valid. Without memory it stays without; its
    /// first fault then fails with ENOMEM. The new context starts with empty TLBs. Kernel:
    /// `kvm_tdp_mmu_alloc_root`. No lock held; may sleep.
    func takeRoot(_ cpu: VirtualCPU) {
        precondition(cpu.root == nil, "a vCPU's root is dropped before it gets another")
        let role = role(for: cpu)
        cpu.root = shareRoot(role, orAdd: nil)
        if cpu.root == nil, let fresh = vm.host.allocateTable(order: 0, fill: EntryBits.empty) {
            cpu.root = shareRoot(role, orAdd: fresh)
            if cpu.root != fresh { vm.host.freeTable(fresh) }
        }
        if cpu.root != nil { cpu.dropTranslations() }
    }

    /// Takes a reference on the valid root of `role`; where there is none, `fresh` becomes it.
    private func shareRoot(_ role: PageRole, orAdd fresh: HostFrame?) -> HostFrame? {
        let guardian = vm.lockMMUForRead()
        pages.lock()
        var found: HostFrame?
        for root in roots where found == nil {
            var info = info(ofRoot: root)
            // An invalid root's role is nobody's.
            guard info.role == role else { continue }
            info.references += 1
            setInfo(info, ofRoot: root)
            found = root
        }
        if found == nil, let fresh {
            // One reference is the vCPU's, one the MMU's own. Spec: X32.
            setInfo(RootInfo(role, references: 2), ofRoot: fresh)
            roots.append(fresh)
            found = fresh
        }
        pages.unlock()
        guardian.unlock()
        return found
    }

    /// Takes the vCPU's root away if it is invalid or not of the role that the vCPU needs now. Kernel:
    /// `kvm_mmu_free_obsolete_roots`, `kvm_mmu_unload`. No lock held; may sleep.
    func dropObsoleteRoot(_ cpu: VirtualCPU) {
        guard let root = cpu.root else { return }
        let guardian = vm.lockMMUForRead()
        if role(ofRoot: root) != role(for: cpu) {
            cpu.root = nil
            put(root)
        }
        guardian.unlock()
        freeRemovedTables()
    }

    /// The vCPU goes over to tables of another kind. No lock held; may sleep.
    func leaveRoot(_ cpu: VirtualCPU) {
        guard let root = cpu.root else { return }
        let guardian = vm.lockMMUForRead()
        cpu.root = nil
        put(root)
        guardian.unlock()
        freeRemovedTables()
    }

    /// Drops a reference; with the last the root goes. Caller: mmu_lock. Kernel: `kvm_tdp_mmu_put_root`.
    private func put(_ root: HostFrame) {
        pages.lock()
        var info = info(ofRoot: root)
        precondition(info.references > 0, "a root is put that nobody holds")
        info.references -= 1
        setInfo(info, ofRoot: root)
        if info.references == 0 {
            precondition(info.isInvalid, "a valid root lost its last reference (X32)")
            roots.removeAll { $0 == root }
            removed.append(root)
        }
        pages.unlock()
    }

    // MARK: All roots at once

    /// Makes every root obsolete and sees every vCPU off it, in one critical section, so that no vCPU goes on faulting
    /// into an invalid root (X33, X35). Then empties them, with mmu_lock held for reading and given up now and then; the
    /// reload flushes, so nothing else need be. Caller holds slots_lock. Kernel: `kvm_mmu_zap_all_fast`.
    func replaceRoots() {
        let guardian = vm.lockMMU()
        pages.lock()
        for root in roots {
            var info = info(ofRoot: root)
            guard !info.isInvalid else { continue }
            info.role.isInvalid = true
            info.isScheduled = true
            setInfo(info, ofRoot: root)
        }
        pages.unlock()
        nested?.makeObsolete()
        vm.makeAllCPUsRequest(VirtualCPU.Request.reloadRoot)
        nested?.zapObsolete()
        guardian.unlock()
        while let root = nextScheduledRoot() {
            emptyInvalidRoot(root)
            let guardian = vm.lockMMUForRead()
            put(root)
            guardian.unlock()
        }
    }

    private func nextScheduledRoot() -> HostFrame? {
        pages.lock()
        defer { pages.unlock() }
        for root in roots {
            var info = info(ofRoot: root)
            guard info.isScheduled else { continue }
            info.isScheduled = false
            setInfo(info, ofRoot: root)
            return root
        }
        return nil
    }

    /// Frees the roots, whoever holds them. The VM ends and every vCPU has stopped.
    func freeAllRoots() {
        for cpu in vm.virtualCPUs { cpu.root = nil }
        pages.lock()
        let all = roots
        roots = []
        for root in all { removed.append(root) }
        pages.unlock()
    }
}
