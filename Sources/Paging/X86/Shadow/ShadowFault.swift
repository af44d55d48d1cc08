import Audit
import Frames
import GuestMemory
import HostMemory
import Synchrony

/// One guest fault, from the exit to the outcome. Kernel: `FNAME(page_fault)`. Spec: x86 4.5.
///
///     guest's tables → slot → tables in reserve → snapshot → translate → mmu_lock → stale? → fetch → release → unlock
///
/// The page, if one is owned, is released in `resolve` on every way out, before mmu_lock is dropped (X2, I-10).
extension ShadowMMU {
    /// What a fault needs on its way down.
    struct Request {
        let address: UInt64
        var fault: GuestFault
        var walk: GuestWalk
    }

    func serve(_ cpu: VirtualCPU, _ fault: GuestFault) -> FaultOutcome {
        let state = state(of: cpu)
        guard state.hasRoot else { return .retry }
        let address = fault.address.value
        let code = state.format.ept == nil ? FaultCode(fault, isUser: state.isUser) : FaultCode(ofEPT: fault)
        let walk: GuestWalk
        switch walkGuest(cpu, address, code) {
        case .page(let found): walk = found
        case .fault(let failure):
            if !fault.isPrefetch { inject(failure, fault, cpu) }
            return .retry
        }
        var inner = fault
        inner.address = GuestAddress(walk.frame.address.value | address & (pageSize - 1))
        state.faultedAddress = inner.address
        var request = Request(address: address, fault: inner, walk: walk)
        // A nested guest has no APIC access page. Spec: x86 2.7 step 5.
        guard let slot = cpu.slot(containing: walk.frame), slot.id != APICAccessPage.slot else { return .emulate }
        if fault.entryPresent, fault.access == .write, reverseMap(slot).isTracked(walk.frame) {
            forgetFloods(state, address)
            return .writeProtected
        }
        guard fillStock(state, to: Self.tablesPerFault) else { return .failed(.ENOMEM) }
        let snapshot = vm.snapshot()
        if slot.isInvalid { return fault.isPrefetch ? .failed(.EAGAIN) : .retry }
        if vm.mayBeStale(snapshot, walk.frame) { return .retry }
        switch cpu.faultIn(inner, slot: slot, snapshot: snapshot) {
        case .frame(let faulted): return resolve(cpu, &request, faulted)
        case .failed(let error): return FaultFamily.x86.answer(.translation(error), inner.access).outcome
        case .postponed: return .retry
        }
    }
    /// Kernel: `PT64_ROOT_MAX_LEVEL` tables, of which a root may be one.
    static let tablesPerFault = 6

    func resolve(
        _ cpu: VirtualCPU, _ request: inout Request, _ faulted: consuming FaultedFrame
    ) -> FaultOutcome {
        if vm.mayBeStale(faulted) {
            faulted.releaseUnused()
            return .retry
        }
        let isWritable = faulted.isWritable
        let guardian = vm.lockMMU()
        let outcome = install(cpu, &request, faulted, guardian)
        faulted.finish(use(after: outcome, ofWritable: isWritable), holding: guardian)
        guardian.unlock()
        return outcome
    }

    /// The stale check, the quota, and the fetch.
    private func install(
        _ cpu: VirtualCPU, _ request: inout Request, _ faulted: borrowing FaultedFrame,
        _ guardian: borrowing MMUGuard
    ) -> FaultOutcome {
        let state = state(of: cpu)
        // The request to load another root is posted already: the retry ends there (X65).
        guard !hasObsoleteRoot(state) else {
            checkRequest(of: cpu)
            return .retry
        }
        var rights = request.walk.rights
        if request.fault.access == .write, !rights.contains(.write), !state.registers.writeProtect, !state.isUser {
            // Supervisor writes are allowed though the guest's entry forbids: the entry becomes one for the supervisor alone.
            rights.insert(.write)
            rights.remove(.user)
            if state.registers.smep { rights.remove(.execute) }
        }
        guard let permit = guardian.check(faulted, largest: largestLeaf(request, faulted.slot)) else {
            return .retry
        }
        guard makeRoom() else { return .failed(.ENOSPC) }
        // Room may have cost the root, if a guest hypervisor's tables have it as a lower table too. KVM does not look again.
        guard !hasObsoleteRoot(state) else { return .retry }
        return fetch(permit, &request, rights, faulted.slot, cpu, holding: guardian)
    }

    /// No larger than the guest's own page; small if the slot is logged. Kernel: `kvm_mmu_hugepage_adjust`.
    private func largestLeaf(_ request: Request, _ slot: MemorySlot) -> PageLevel {
        guard !slot.isLogged, let counts = slot.largePages else { return .page4K }
        var level = PageLevel(min(request.walk.level, 3))
        while level > .page4K, !counts.allows(request.walk.frame, level) { level = level.below }
        return level
    }

    /// Goes down the shadow tables, making those that are missing, and puts the leaf in. Kernel: `FNAME(fetch)`.
    ///
    /// After a page exists for a guest table, the table's entry is read again: the table is write-protected by then, or out
    /// of sync, so an entry that is still the same can't change unnoticed. Spec: X54.
    private func fetch(
        _ permit: borrowing InstallPermit, _ request: inout Request, _ rights: Rights, _ slot: MemorySlot,
        _ cpu: VirtualCPU, holding guardian: borrowing MMUGuard
    ) -> FaultOutcome {
        let state = state(of: cpu)
        let format = state.format
        let paged = format.isPaged
        // PAE: the four topmost entries were read with CR3, and count until it is loaded again; those of nested tables by
        // the walk, and nothing tells when they change.
        if paged, hasChanged(&request.walk, format.topLevel, cpu, format) { return .retry }
        guard var page = topPage(state, request.address),
            !paged || page.frame == request.walk.table(format.topLevel)
        else {
            // There was no memory when the root was made, or a pointer said otherwise. Spec: x86 4.4, X65.
            cpu.post(VirtualCPU.Request.reloadRoot)
            return .retry
        }
        // The guest's own levels.
        while paged, page.role.level > request.walk.level {
            let level = page.role.level - 1
            let index = shadowIndex(request.address, page.role.level)
            page.floods = 0
            let table = request.walk.table(level)
            let isEarly = Defect.rereadTooEarly.isOn
            if isEarly, hasChanged(&request.walk, level, cpu, format) { return .retry }
            let made = child(page, index, table, direct: false, request.walk.rights(ofTable: level), cpu)
            if let made, made.unsyncChildren > 0 { syncChildren(of: made, cpu) }
            if !isEarly, hasChanged(&request.walk, level, cpu, format) { return .retry }
            if let made {
                checkConfirmed(made, request.walk)
                link(made, page, index)
            }
            page = made ?? child(entry(page, index).load())
        }
        if paged { page.floods = 0 }
        // Only now: the tables on the way may lie in the very block that a large leaf would map. Spec: x86 4.5 (d), X41.
        let largest = min(permit.largest, largestLeaf(request, slot))
        let isSmall = disallowsHugePage(request.fault)
        var goal = isSmall ? 1 : largest.rawValue
        note(.init(.entryRequested, frame: permit.frame, guest: permit.guestFrame.number, level: goal))
        // Within a page of the guest's.
        while true {
            let index = shadowIndex(request.address, page.role.level)
            if page.role.level == goal, isDisallowed(page, index) { goal -= 1 }
            guard page.role.level > goal else { break }
            if direct != nil, request.fault.isPrefetch, EntryBits.isLeaf(entry(page, index).load(), page.role.level) {
                request.fault.level = page.level
                return .spurious
            }
            dropChildWithOtherRights(page, index, rights)
            let first = permit.guestFrame.aligned(to: page.level)
            let made = child(page, index, first, direct: true, rights, cpu)
            if let made {
                link(made, page, index)
                if isSmall { disallowHugePage(made, isOnlyReason: largest >= page.level) }
            }
            page = made ?? child(entry(page, index).load())
        }
        request.fault.level = page.level
        let index = shadowIndex(request.address, page.role.level)
        let outcome = setLeaf(permit, page, index, slot, rights, request.fault, by: cpu)
        guard outcome != .spurious else { return outcome }
        prefetch(page, index, request.walk, cpu, holding: guardian)
        return outcome
    }

    /// A page that maps a large page of the guest's has the rights that the guest's entry gave when it was made; that may
    /// have changed since, as when D was set. Kernel: `validate_direct_spte`.
    private func dropChildWithOtherRights(_ page: ShadowPage, _ index: Int, _ rights: Rights) {
        let value = entry(page, index).load()
        guard EntryBits.isTable(value, page.role.level), child(value).role.access != rights else { return }
        unlink(page, index)
        vm.flushRemoteTLBs()
    }

    /// Kernel: `shadow_walk_init`.
    func topPage(_ state: ShadowCPU, _ address: UInt64) -> ShadowPage? {
        guard state.usesFourRoots else { return state.root?.page }
        guard base == nil || address >> 32 == 0 else { return nil }
        return state.fourRoots.isEmpty ? nil : state.fourRoots[Int(address >> 30 & 3)]
    }

    /// The page that a fault on a missing translation of the guest's own comes to. A fault on an entry that is present
    /// means that a stale one may be cached: it goes first. Kernel: `kvm_inject_emulated_page_fault`.
    private func inject(_ failure: GuestWalkFailure, _ exit: GuestFault, _ cpu: VirtualCPU) {
        guard base == nil else { return injectNested(failure, exit, cpu) }
        let fault = failure.pageFault
        if fault.code.contains(.present), !fault.code.contains(.reserved) {
            invalidate(fault.address, cpu, earlierRoots: { _ in false })
        }
        CPUStatistics.bump(cpu.statistics.pf_guest)
        state(of: cpu).pageFault = fault
    }

    /// Kernel: `shadow_page_table_clear_flood`.
    private func forgetFloods(_ state: ShadowCPU, _ address: UInt64) {
        guard var page = topPage(state, address) else { return }
        while true {
            page.floods = 0
            let value = entry(page, shadowIndex(address, page.role.level)).load()
            guard EntryBits.isTable(value, page.role.level) else { return }
            page = child(value)
        }
    }

    // MARK: Tables in reserve

    func fillStock(_ state: ShadowCPU, to count: Int) -> Bool {
        while state.stock.count < count {
            guard let table = vm.host.allocateTable(order: 0, fill: EntryBits.empty) else { return false }
            state.stock.append(table)
        }
        return true
    }

    func emptyStock(_ cpu: VirtualCPU) {
        let state = state(of: cpu)
        for table in state.stock { vm.host.freeTable(table) }
        state.stock = []
    }
}

extension FaultCode {
    /// What the processor says of the access.
    init(_ fault: GuestFault, isUser: Bool) {
        var code: FaultCode = isUser ? .user : []
        if fault.entryPresent { code.insert(.present) }
        switch fault.access {
        case .read: break
        case .write: code.insert(.write)
        case .execute: code.insert(.fetch)
        }
        self = code
    }
}
