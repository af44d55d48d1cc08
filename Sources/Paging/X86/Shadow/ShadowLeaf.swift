import Audit
import Frames
import GuestMemory
import HostMemory
import Synchrony

/// What a leaf is made of.
struct LeafRequest {
    let page: ShadowPage
    let slot: MemorySlot
    let host: HostFrame
    /// The guest frame of the leaf's first page.
    let frame: GuestFrame
    /// What the guest's entries permit.
    let rights: Rights
    let old: UInt64
    /// Nobody waits for it: it is not accessed yet.
    let prefetch: Bool
    /// The guest's own entry was just found accessed.
    let synchronizing: Bool
    /// Whether the primary mapping lets the guest write.
    let writable: Bool
}

/// Making leaves. Caller: mmu_lock for writing. Spec: x86 2.11, 4.5.
extension ShadowMMU {
    /// All bits of the leaf but the frame, and whether W was refused because the guest frame is a page table.
    /// Kernel: `make_spte`.
    func leafAttributes(
        _ request: LeafRequest, by cpu: VirtualCPU
    ) -> (attributes: UInt64, isTable: Bool) {
        let level = request.page.role.level
        var value = EntryBits.mmuPresent | bits.present | bits.memoryType(of: request.host, in: vm.memory)
        value |= adType(request.page.role) | bits.accessed
        let isExecutable = request.rights.contains(.execute) && !(level > 1 && nxHugePages)
        value |= isExecutable ? bits.execute : bits.noExecute
        if request.rights.contains(.user) { value |= bits.user }
        if level > 1 { value |= EntryBits.large }
        var isTable = false
        if request.writable {
            value |= bits.hostWritable
            if request.rights.contains(.write) {
                isTable = !mayWrite(request)
                if !isTable { value |= EntryBits.write | bits.mmuWritable | bits.dirty }
            }
        }
        let isLogged = value & EntryBits.write != 0 && request.slot.isLogged
        let isUsed = !request.prefetch || (request.synchronizing && !SeriesPatch.syncedIsAccessed.isUndone)
        if !isUsed { value = bits.ageing(value).applied(to: value) }
        if isLogged { vm.markDirty(request.frame, in: request.slot, by: cpu) }
        return (value, isTable)
    }

    /// What a nested guest writes never reaches the page-modification log. Kernel: `kvm_cpu_dirty_log_size` in `make_spte`.
    func adType(_ role: PageRole) -> UInt64 {
        base?.adType(role) ?? (role.accessDirtyDisabled ? EntryBits.adDisabled : 0)
    }

    private func mayWrite(_ request: LeafRequest) -> Bool {
        // An old *leaf* that the guest could write proves that it may; a table's W says nothing. Spec: X58.
        EntryBits.provesWritable(request.old, request.page.role.level)
            || letGuestWrite(
                request.frame, request.slot, synchronizing: request.synchronizing, prefetch: request.prefetch)
    }

    /// Puts the permit's frame into an entry. `fault` is nil for a prefetch. Kernel: `mmu_set_spte`.
    func setLeaf(
        _ permit: borrowing InstallPermit, _ page: ShadowPage, _ index: Int, _ slot: MemorySlot, _ rights: Rights,
        _ fault: GuestFault?, by cpu: VirtualCPU
    ) -> FaultOutcome {
        let entry = entry(page, index)
        let level = page.level
        let frame = permit.guestFrame.aligned(to: level)
        let found = entry.load()
        var old = found
        var flush = false
        var isMapped = false
        let isPrefetch = fault?.isPrefetch ?? true
        if EntryBits.isPresent(old) {
            if isPrefetch, EntryBits.outlastsPrefetch(old) { return .spurious }
            if EntryBits.isTable(old, level.rawValue) {
                unlink(page, index)
                flush = true
            } else if EntryBits.field.frame(in: old) != permit.frame(at: level)
                || page.guestFrame(of: index) != frame && !Defect.frameMovedUnmapped.isOn
            {
                // One host page may stand behind two guest frames: the entry would be in the reverse map of the wrong one.
                dropLeaf(page, index)
                flush = true
            } else {
                isMapped = true
            }
            // What was dropped proves nothing about the frame that comes now. Spec: X48, X58.
            if !isMapped { old = EntryBits.empty }
        }
        let (attributes, isTable) = leafAttributes(
            LeafRequest(
                page: page, slot: slot, host: permit.frame(at: level), frame: frame, rights: rights, old: old,
                prefetch: isPrefetch,
                synchronizing: false, writable: permit.writable), by: cpu)
        let counted = permit.counted && vm.policy.kind == .tracked ? Self.counted : 0
        let new = entry.value(permit, level, attributes | counted)
        var outcome = FaultOutcome.fixed
        // Before the leaf: a processor may use it at once, and checks then ask what guest frame that is.
        page.setTranslation(index, frame, rights)
        if entry.peek() == new {
            outcome = .spurious
        } else {
            let last = entry.install(permit, level: level, attributes: attributes | counted)
            if isMapped, last & bits.mmuWritable != 0, new & bits.mmuWritable == 0 { flush = true }
            note(
                Event(
                    .entryInstalled, frame: permit.frame(at: level), guest: frame.number, level: level.rawValue,
                    value: new, extra: last))
            note(
                Event(
                    .entrySet, frame: permit.frame(at: level), guest: frame.number, level: level.rawValue, value: new,
                    extra: page.place(of: index)))
        }
        if isTable, fault?.access == .write { outcome = .writeProtected }
        if let journal = vm.memory.journal {
            checkSet(found, new, frame, slot, isPrefetch: isPrefetch, isMapped: isMapped, journal)
        }
        if flush { vm.flushRemoteTLBs() }
        if !isMapped { addToMap(page, index, frame, slot) }
        return outcome
    }

    /// Policy `tracked` alone: a counted page stands behind the frame. Spec: generic 10.2.
    static let counted: UInt64 = 1 << 59
}
