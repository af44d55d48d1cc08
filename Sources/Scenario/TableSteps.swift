import Frames
import Machine
import TextInput

/// The steps on the guest's own page tables.
extension PhaseBuilder {
    static let tableWords = Vocabulary.tableSteps.map(\.name)

    /// Nil: it was complained about.
    mutating func tableAction(_ field: Field, _ fields: Fields) -> Action? {
        guard layout.architecture == .x86Shadow else {
            complaints.add(
                field.keyPosition, "`\(field.key.name)` on \(Vocabulary.word(layout.architecture))",
                "guests have page tables of their own under shadow paging only: say `architecture: x86-shadow`")
            return nil
        }
        guard case .guestPlace(let place) = field.reading else { return .loadCR3 }
        guard let address = layout.address(place, at: field.position, regions), isLow(address, field.position) else {
            return nil
        }
        let level = UInt8(fields.number("level") ?? 1)
        let linear = GuestAddress(address)
        let word = fields.words("rights").first ?? "write"
        let rights = GuestRights.allCases[Vocabulary.guestRights.firstIndex { $0.word == word } ?? 1]
        switch field.key.name {
        case "invlpg": return .flushPage(at: linear)
        case "unmap_page": return .unmapPage(at: linear, level: level)
        case "restore_page": return .restorePage(at: linear, level: level)
        case "protect_page": return .protectPage(at: linear, level: level, rights)
        default: return mapPage(linear, level, rights, fields)
        }
    }

    private mutating func mapPage(
        _ linear: GuestAddress, _ level: UInt8, _ rights: GuestRights, _ fields: Fields
    ) -> Action? {
        guard level <= 2 else {
            complaints.add(
                fields.position(of: "level"), "`map_page` at level \(level)",
                "an entry maps 4 KiB at level 1 or 2 MiB at level 2")
            return nil
        }
        guard let field = fields["to"], case .guestPlace(let place) = field.reading,
            let target = layout.address(place, at: field.position, regions), isLow(target, field.position)
        else { return nil }
        let bytes = level == 1 ? pageSize : PageLevel.page2M.bytes
        if target % bytes != 0 {
            complaints.add(
                field.position, "\(Quantity.hex(target)) is no page of \(Quantity.shown(bytes))",
                "an entry maps a multiple of its size")
            return nil
        }
        layout.noteMapped(linear.value & ~(bytes - 1), bytes)
        return .mapPage(at: linear, to: GuestAddress(target), level: level, rights)
    }

    /// Above what the guest's memory may take its tables may lie.
    private func isLow(_ address: UInt64, _ position: Position) -> Bool {
        if address < 1 << layout.architecture.guestAddressBits { return true }
        complaints.add(
            position, "\(Quantity.hex(address)) is beyond the guest's addresses",
            "on x86-shadow they have \(layout.architecture.guestAddressBits) bits")
        return false
    }
}

extension ScenarioBuilder {
    /// `page_tables`: the region must be memory that always answers, and a slot must show it from its start.
    func placeTables(_ vm: Fields, _ plan: inout Plan) {
        guard let field = vm["page_tables"], let name = vm.regionPlace("page_tables")?.region else { return }
        guard let index = plan.regions.firstIndex(where: { $0.shownName == name }) else {
            complaints.add(field.position, "there is no region `\(name)`", "name one of `host: {regions: ...}`")
            return
        }
        let region = plan.regions[index]
        guard [.anonymous, .sharedMemory].contains(region.kind), region.read, region.write, region.userFaults == 0
        else {
            complaints.add(
                field.position, "the guest can't have its page tables in `\(name)`",
                "`anonymous` memory or a `memfd`, to read and write, whose faults nobody serves")
            return
        }
        guard plan.slots.contains(where: { $0.region == index && $0.offset == 0 }) else {
            complaints.add(
                field.position, "no slot shows `\(name)` from its start", "add a slot with `userspace_addr: \(name)`")
            return
        }
        plan.pageTables = index
    }

    /// Whether the tables that the guest needs fit in.
    func checkTables(_ fields: Fields, _ plan: Plan) {
        guard let region = plan.pageTables, plan.fits(.x86Shadow) else { return }
        let size = GuestTables(plan).size
        let slot = plan.slots.first { $0.region == region && $0.offset == 0 }
        guard let slot, slot.size < size else { return }
        complaints.add(
            fields.fields("vm")?.position(of: "page_tables") ?? fields.position,
            "the guest's page tables take \(Quantity.shown(size))",
            "the slot of `\(plan.regions[region].shownName)` shows \(Quantity.shown(slot.size))")
    }
}
