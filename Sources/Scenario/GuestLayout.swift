import Frames
import Machine
import TextInput

/// The guest's memory as it changes along a scenario: which slots there are, what they show, what lies outside.
struct GuestLayout {
    let complaints: Complaints
    let architecture: Architecture
    /// Whether slots may have private memory.
    var hasPrivateMemory = false
    private(set) var slots: [SlotPlan] = []
    /// Slots that were or are there at some time of the current phase. Tasks of a phase run side by side, so an access
    /// may meet any of them.
    private(set) var duringPhase: [SlotPlan] = []
    /// All there ever were, the latest last; a place in a region is still said through a slot that is gone.
    private var past: [SlotPlan] = []
    /// Linear addresses that the guest's tables show something else at, at some time.
    private var mapped: [Range<UInt64>] = []
    /// One past the highest guest address that is used.
    private(set) var end: UInt64 = 0

    init(_ complaints: Complaints, _ architecture: Architecture) {
        self.complaints = complaints
        self.architecture = architecture
    }

    mutating func beginPhase() { duringPhase = slots }

    func slot(_ id: UInt16) -> SlotPlan? { slots.first { $0.id == id } }

    // MARK: Slots

    /// Reads a slot. With `checked` false nothing but its names is checked: a step that expects an error may ask for
    /// anything.
    mutating func slot(_ fields: Fields, _ regions: [RegionPlan], checked: Bool) -> SlotPlan? {
        guard let id = fields.number("slot"), let place = fields.regionPlace("userspace_addr"),
            let address = fields.number("guest_phys_addr"),
            let region = regionIndex(place.region, at: fields.position(of: "userspace_addr"), regions)
        else { return nil }
        var slot = SlotPlan()
        slot.id = UInt16(clamping: id)
        slot.guestAddress = GuestAddress(address)
        slot.region = region
        slot.offset = place.offset
        let size = regions[region].size
        slot.size = fields.number("memory_size") ?? (size > place.offset ? size - place.offset : 0)
        let flags = fields.words("flags")
        slot.logDirtyPages = flags.contains("log_dirty_pages")
        slot.readOnly = flags.contains("readonly")
        slot.guestMemory = fields.flag("guest_memfd")
        guard !checked || fits(slot, regions[region], fields) else { return nil }
        return slot
    }

    private mutating func fits(_ slot: SlotPlan, _ region: RegionPlan, _ fields: Fields) -> Bool {
        let before = complaints.count
        if slot.guestAddress.offset != 0 {
            complaints.add(
                fields.position(of: "guest_phys_addr"),
                "a slot can't be at \(Quantity.hex(slot.guestAddress.value))", "it begins at a multiple of 4 KiB")
        }
        if slot.offset % pageSize != 0 {
            complaints.add(
                fields.position(of: "userspace_addr"),
                "a slot can't begin \(Quantity.shown(slot.offset)) into a region",
                "it begins at a multiple of 4 KiB")
        }
        if slot.offset >= region.size || slot.size > region.size - slot.offset {
            complaints.add(
                fields.position(of: fields["memory_size"] == nil ? "userspace_addr" : "memory_size"),
                "slot \(slot.id) reaches beyond `\(region.shownName)`",
                "`\(region.shownName)` has \(Quantity.shown(region.size)) "
                    + "and the slot begins \(Quantity.shown(slot.offset)) into it")
        } else if slot.size == 0 || slot.size % pageSize != 0 {
            complaints.add(
                fields.position(of: "memory_size"), "a slot can't have \(Quantity.shown(slot.size))",
                "a size is a multiple of 4 KiB, and not zero")
        }
        checkPrivate(slot, fields)
        guard complaints.count == before else { return false }
        return reaches(
            slot.guestAddress.value, slot.size, at: fields.position(of: "guest_phys_addr"), "slot \(slot.id)")
    }

    /// Spec: generic 4.4: which flags go together.
    private func checkPrivate(_ slot: SlotPlan, _ fields: Fields) {
        guard slot.guestMemory else { return }
        if !hasPrivateMemory {
            complaints.add(
                fields.position(of: "guest_memfd"), "`guest_memfd` in a VM without private memory",
                "add `type: sw_protected` to `vm`; else KVM answers EINVAL")
        } else if slot.logDirtyPages || slot.readOnly {
            complaints.add(
                fields.position(of: "flags"), "flags of a slot with `guest_memfd`",
                "such a slot has neither a dirty log nor `readonly`: KVM answers EINVAL")
        }
    }

    /// Whether the guest's addresses reach so far.
    private mutating func reaches(_ start: UInt64, _ bytes: UInt64, at position: Position, _ what: String) -> Bool {
        let limit = UInt64(1) << architecture.guestAddressBits
        guard start < limit, bytes <= limit - start else {
            complaints.add(
                position, "\(what) ends beyond the guest's addresses",
                "on \(Vocabulary.word(architecture)) they have \(architecture.guestAddressBits) bits, "
                    + "the last is \(Quantity.hex(limit - 1))")
            return false
        }
        end = max(end, start + bytes)
        return true
    }

    /// A slot that exists when the VM starts.
    mutating func place(_ slot: SlotPlan, at position: Position) {
        guard self.slot(slot.id) == nil else {
            complaints.add(position, "a second slot \(slot.id)", "each slot has an id of its own")
            return
        }
        guard isFree(slot, at: position, unless: "") else { return }
        insert(slot)
    }

    /// What KVM_SET_USER_MEMORY_REGION does with a slot that it takes. Spec: generic 4.4, rules 13 to 17.
    mutating func set(_ slot: SlotPlan, at position: Position) {
        if let old = self.slot(slot.id) {
            let same = old.region == slot.region && old.offset == slot.offset && old.size == slot.size
            guard same && old.readOnly == slot.readOnly, !old.guestMemory, !slot.guestMemory else {
                complaints.add(
                    position, "slot \(slot.id) exists, and KVM answers EINVAL",
                    "a slot's memory, size and `readonly` never change, with `guest_memfd` nothing does: delete it first, or say `expect: EINVAL`"
                )
                return
            }
        }
        guard isFree(slot, at: position, unless: ", or say `expect: EEXIST`") else { return }
        slots.removeAll { $0.id == slot.id }
        insert(slot)
    }

    mutating func noteMapped(_ first: UInt64, _ bytes: UInt64) { mapped.append(first..<first + bytes) }

    mutating func delete(_ id: UInt16) { slots.removeAll { $0.id == id } }

    private mutating func insert(_ slot: SlotPlan) {
        slots.append(slot)
        duringPhase.append(slot)
        past.append(slot)
    }

    private func isFree(_ slot: SlotPlan, at position: Position, unless: String) -> Bool {
        let other = slots.first { $0.id != slot.id && $0.guestRange.overlaps(slot.guestRange) }
        guard let other else { return true }
        complaints.add(
            position, "slot \(slot.id) overlaps slot \(other.id) in the guest",
            "slot \(other.id) takes \(Quantity.hex(other.guestRange.lowerBound)) up to "
                + "\(Quantity.hex(other.guestRange.upperBound))" + unless)
        return false
    }

    // MARK: Places

    func regionIndex(_ name: String, at position: Position, _ regions: [RegionPlan]) -> Int? {
        if let index = regions.firstIndex(where: { $0.shownName == name }) { return index }
        let names = regions.map(\.shownName)
        let suggestion = nearest(name, in: names).map { "did you mean `\($0)`? " } ?? ""
        complaints.add(
            position, "there is no region `\(name)`", suggestion + "the regions are: \(names.joined(separator: ", "))")
        return nil
    }

    /// The guest address of a place: as the slots are now, else as they are in this phase, else as they were last.
    mutating func address(_ place: GuestPlace, at position: Position, _ regions: [RegionPlan]) -> UInt64? {
        guard case .region(let place) = place else {
            if case .address(let address) = place { return address }
            return nil
        }
        guard let region = regionIndex(place.region, at: position, regions) else { return nil }
        var found = slots.filter { $0.shows(region, place.offset) }
        if found.isEmpty { found = duringPhase.filter { $0.shows(region, place.offset) } }
        if found.isEmpty { found = past.last { $0.shows(region, place.offset) }.map { [$0] } ?? [] }
        guard let slot = found.first else {
            complaints.add(
                position, "no slot shows `\(place.region)` at \(Quantity.shown(place.offset)) to the guest",
                shownSlots)
            return nil
        }
        if let other = found.dropFirst().first(where: { $0.guestAddress != slot.guestAddress }) {
            complaints.add(
                position, "`\(place.region)` is in two slots, \(slot.id) and \(other.id)", "write the guest address")
            return nil
        }
        return slot.guestAddress.value + (place.offset - slot.offset)
    }

    /// Whether every one of `count` accesses of 8 bytes meets a slot; the addresses' width is checked in any case.
    mutating func checkAccesses(
        _ kind: AccessKind, _ start: UInt64, count: UInt64, stride: UInt64, mayMissMemory: Bool, at position: Position
    ) {
        let (distance, overflow) = (count - 1).multipliedReportingOverflow(by: stride)
        let length = overflow ? UInt64.max : distance.addingReportingOverflow(8).partialValue
        guard reaches(start, length < 8 ? .max : length, at: position, "the access"), !mayMissMemory else { return }
        var index: UInt64 = 0
        while index < count {
            let address = start + index * stride
            if mapped.contains(where: { $0.contains(address) }) {
                index += 1
                continue
            }
            guard let slot = duringPhase.first(where: { $0.guestRange.contains(address) }) else {
                let which = count > 1 ? " (access \(index + 1) of \(count))" : ""
                let remedy = kind == .execute ? "" : "; an access outside of them is MMIO: say `expect: mmio`"
                complaints.add(
                    position, "\(Quantity.hex(address)) is not the guest's memory\(which)", shownSlots + remedy)
                return
            }
            index += (slot.guestRange.upperBound - address - 1) / stride + 1
        }
    }

    private var shownSlots: String {
        guard !duringPhase.isEmpty else { return "there are no slots at this point" }
        let shown = duringPhase.prefix(8).map {
            "\($0.id): \(Quantity.hex($0.guestRange.lowerBound)) up to \(Quantity.hex($0.guestRange.upperBound))"
        }
        return "the slots are " + shown.joined(separator: ", ") + (duringPhase.count > 8 ? ", ..." : "")
    }
}

extension SlotPlan {
    var guestRange: Range<UInt64> { guestAddress.value..<guestAddress.value + size }
    var pages: UInt64 { size / pageSize }

    /// Whether this slot shows the byte at `offset` of a region.
    func shows(_ region: Int, _ offset: UInt64) -> Bool {
        self.region == region && offset >= self.offset && offset - self.offset < size
    }
}
