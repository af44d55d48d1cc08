import Audit
import Frames
import GuestMemory
import HostMemory

/// What a fault wants mapped, besides the frame, which only the permit says.
struct MapRequest {
    let slot: MemorySlot
    let access: AccessKind
    /// Whether the leaf may let the guest write.
    let writable: Bool
    /// The largest leaf that would do.
    let largest: PageLevel
    let cpu: VirtualCPU
}

/// Putting a frame into the tables. Kernel: `gstage_set_pte`, `gstage_map_page`. Caller: mmu_lock held for writing,
/// which the permit proves. Spec: arches 2.2 step 8.
extension GStageMMU {
    /// Maps the permit's frame with a leaf of the permit's largest level and fences. Returns how the fault ended and
    /// what the page was used for.
    ///
    /// A leaf that already serves the access is left alone. The kernel writes it again, and may so take W away from a
    /// page that a sibling made writable in between (Spec: arches 9, R5); the fault ends the same either way.
    func map(_ permit: borrowing InstallPermit, _ request: MapRequest) -> (FaultOutcome, FaultUse) {
        if let served = refresh(permit, request.access) { return served }
        guard let place = reach(permit, request.cpu) else {
            return (.failed(.EEXIST), .used(dirty: request.writable))
        }
        // The log comes first: a bit too many costs a page sent twice, a bit too few loses a write (RV-4).
        if request.writable { vm.markDirty(permit.guestFrame, in: request.slot, by: request.cpu) }
        store(permit, at: place, writable: request.writable)
        return (.fixed, .used(dirty: request.writable))
    }

    /// Ends the fault if a leaf of this very frame already allows the access, with A set again where ageing took it.
    private func refresh(_ permit: borrowing InstallPermit, _ access: AccessKind) -> (FaultOutcome, FaultUse)? {
        guard let leaf = tables.leaf(of: permit.guestFrame), shows(leaf.value, leaf.level, permit),
            access != .write || leaf.value & GStageBits.write != 0
        else { return nil }
        let use = FaultUse.used(dirty: leaf.value & GStageBits.write != 0)
        guard leaf.value & GStageBits.accessed == 0 else { return (.spurious, use) }
        let old = leaf.entry.set(bits: GStageBits.accessed)
        let base = permit.guestFrame.aligned(to: leaf.level)
        noteChange(leaf.level, base, old, old | GStageBits.accessed)
        vm.flushRemoteTLBs()
        return (.fixed, use)
    }

    /// Whether a leaf maps the permit's frame. Another one can't be there, since the retry check has passed and the
    /// notifier removed what was (I-6); but a leaf found is not trusted to be the frame found.
    private func shows(_ leaf: UInt64, _ level: PageLevel, _ permit: borrowing InstallPermit) -> Bool {
        tables.format.target(of: leaf, level, for: permit.guestFrame) == permit.frame
    }

    /// The place for the leaf, with all tables above it. Nil only by quirk: a huge leaf lies above.
    private func reach(_ permit: borrowing InstallPermit, _ cpu: VirtualCPU) -> RadixPosition? {
        while true {
            let place = tables.descend(to: permit.guestFrame, until: permit.largest)
            if place.level == permit.largest { return place }
            if !tables.format.isLeaf(place.value, place.level.rawValue) {
                link(stock.take(cpu), at: place, over: permit.guestFrame)
            } else if quirks.existingLeafFails {
                return nil
            } else {
                split(place, into: stock.take(cpu), permit)
            }
        }
    }

    /// Links an empty table into an empty entry. The harts may have cached that there was nothing; the leaf's fence,
    /// which follows under the same lock, covers that too.
    private func link(_ table: HostFrame, at place: RadixPosition, over frame: GuestFrame) {
        let found = place.entry.link(vm.host.table(table), attributes: GStageBits.link, expected: 0)
        precondition(found == nil, "an empty entry changed under mmu_lock")
        count(1, in: place.table)
        noteLink(table, at: place, over: frame, old: 0)
    }

    /// Replaces a huge leaf by a table of 512 leaves with the same rights. Kernels after this baseline do the same;
    /// this one fails with EEXIST (see `GStageQuirks.existingLeafFails`).
    ///
    /// A hart may set A in the huge leaf meanwhile: then the parts are written again.
    private func split(_ place: RadixPosition, into table: HostFrame, _ permit: borrowing InstallPermit) {
        let below = place.level.below
        var old: UInt64
        repeat {
            let huge = place.entry.observe(holding: permit)
            old = huge.value
            for i in 0..<512 {
                tables.entry(i, of: table).storePart(of: huge, index: i, childLevel: below, EntryUpdate())
            }
        } while place.entry.link(vm.host.table(table), attributes: GStageBits.link, expected: old) != nil
        count(512, in: table)
        vm.statistics.addPages(level: place.level.rawValue, -1)
        vm.statistics.addPages(level: below.rawValue, 512)
        noteLink(table, at: place, over: permit.guestFrame, old: old)
    }

    /// Writes the leaf, fences, and frees the table whose place it took, if it took one.
    private func store(_ permit: borrowing InstallPermit, at place: RadixPosition, writable: Bool) {
        let attributes = writable ? GStageBits.writableLeaf : GStageBits.readOnlyLeaf
        let level = place.level
        let base = permit.guestFrame.aligned(to: level)
        let value = place.entry.value(permit, level, attributes)
        let old = place.entry.install(permit, level: level, attributes: attributes)
        var detached: [HostFrame] = []
        if tables.format.isTable(old, level.rawValue) {
            detach(tables.format.field.frame(in: old), level: level.below, base: base, into: &detached)
        } else if old == 0 {
            count(1, in: place.table)
        } else if shows(old, level, permit) {
            noteChange(level, base, old, value)
            vm.flushRemoteTLBs()
            return
        } else {
            noteZap(old, level, base)
        }
        vm.statistics.addPages(level: level.rawValue, 1)
        note(
            Event(
                .entryInstalled, frame: permit.frame(at: level), guest: base.number, level: level.rawValue,
                value: value, extra: old))
        vm.flushRemoteTLBs()
        free(detached)
    }
}
