import Frames

/// The page tables of a guest that has its memory at the linear addresses which are its physical ones, as plain data:
/// four levels, made when the machine starts, of what the guest's steps need. All of its pages are writable, and for its
/// user mode; A is set by the first access, D is set already, so that no fault is for D alone.
///
/// Blocks of 2 MiB that lie in one slot, and behind which the host may have huge pages, are one entry; those of 1 GiB in
/// hugetlb memory of such pages too.
public struct GuestTables: Sendable {
    struct Table: Sendable {
        let level: UInt8
        /// The first linear address that it translates.
        let first: UInt64
    }

    /// Where the guest sees its topmost table; the others follow it.
    public let base: GuestAddress
    private(set) var tables = [Table(level: 4, first: 0)]
    /// Entries that map 2 MiB or 1 GiB.
    private var large: [Table] = []

    static let accessed: UInt64 = 1 << 5
    static let dirty: UInt64 = 1 << 6
    private static let largeBit: UInt64 = 1 << 7
    /// P, W and U.
    private static let allowsAll: UInt64 = 7
    private static let addressMask: UInt64 = 0x000f_ffff_ffff_f000

    /// Where the tables are if no region is named for them: behind all that a scenario can use.
    static let ownBase = GuestAddress(1 << UInt64(Architecture.x86Shadow.guestAddressBits))

    /// The tables that `plan`'s guest needs.
    public init(_ plan: Plan) {
        base =
            plan.pageTables.flatMap { region in
                plan.slots.first(where: { $0.region == region && $0.offset == 0 })?.guestAddress
            } ?? Self.ownBase
        let small = Self.changedBlocks(plan)
        plan.forEachGuestStep { action in
            switch action {
            case .guest(_, let address, let count, let stride, _):
                var last = UInt64.max
                for i in 0..<UInt64(count) {
                    let next = address.value &+ i &* stride
                    if next >> 21 != last { add(next, plan, small) }
                    last = next >> 21
                }
            case .mapPage(let address, _, _, _), .unmapPage(let address, _), .protectPage(let address, _, _),
                .restorePage(let address, _):
                add(address.value, plan, small)
            default: break
            }
        }
        guard plan.changesGuestTables else { return }
        // The guest reaches its tables through them.
        var done = 0
        while done < tables.count {
            add(base.value + UInt64(done) << pageShift, plan, [base.value >> 21])
            done += 1
        }
    }

    public var size: UInt64 { UInt64(tables.count) << pageShift }

    /// Blocks of 2 MiB in which the guest changes an entry of the lowest level.
    private static func changedBlocks(_ plan: Plan) -> [UInt64] {
        var blocks: [UInt64] = []
        plan.forEachGuestStep { action in
            switch action {
            case .mapPage(let address, _, 1, _), .unmapPage(let address, 1), .protectPage(let address, 1, _),
                .restorePage(let address, 1):
                blocks.append(address.value >> 21)
            default: break
            }
        }
        return blocks
    }

    // MARK: Making them

    private mutating func add(_ address: UInt64, _ plan: Plan, _ small: [UInt64]) {
        // What is not in the lower half faults.
        guard address < 1 << 47 else { return }
        if large.contains(where: { Self.span(of: $0.level) > address &- $0.first }) || table(1, address) != nil {
            return
        }
        let level = small.contains(address >> 21) ? 1 : Self.largestEntry(address, plan)
        for above in (level...3).reversed() where table(above, address) == nil {
            tables.append(Table(level: above, first: address & ~(Self.span(of: above + 1) - 1)))
        }
        if level > 1 { large.append(Table(level: level, first: address & ~(Self.span(of: level) - 1))) }
    }

    /// Bytes that an entry of `level` translates.
    private static func span(of level: UInt8) -> UInt64 { 1 << (12 + 9 * UInt64(level - 1)) }

    private static func largestEntry(_ address: UInt64, _ plan: Plan) -> UInt8 {
        for level in [UInt8(3), 2] {
            let first = address & ~(span(of: level) - 1)
            let isHuge = plan.slots.contains { slot in
                slot.guestAddress.value <= first && first - slot.guestAddress.value + span(of: level) <= slot.size
                    && plan.mayHavePages(of: level, behind: slot)
            }
            if isHuge { return level }
        }
        return 1
    }

    private func table(_ level: UInt8, _ address: UInt64) -> Int? {
        tables.firstIndex { $0.level == level && $0.first == address & ~(Self.span(of: level + 1) - 1) }
    }

    // MARK: Entries

    /// Where the guest has its entry of `level` for `address`. Nil: it has no such table.
    public func place(of address: UInt64, level: UInt8) -> GuestAddress? {
        guard let index = table(level, address) else { return nil }
        return base + UInt64(index) << pageShift + (address / Self.span(of: level) & 511) * 8
    }

    /// The entry of `level` for `address`, as it is at the start.
    func original(of address: UInt64, level: UInt8) -> UInt64? {
        table(level, address).map { words(of: $0)[Int(address / Self.span(of: level) & 511)] }
    }

    /// The bytes of a table, by words.
    func words(of index: Int) -> [UInt64] {
        let table = tables[index]
        if table.level == 1 {
            return (0..<512).map { (table.first + $0 << pageShift) | Self.allowsAll | Self.dirty }
        }
        var words = [UInt64](repeating: 0, count: 512)
        let span = Self.span(of: table.level)
        for (i, child) in tables.enumerated() where child.level + 1 == table.level {
            guard child.first >= table.first, child.first - table.first < 512 * span else { continue }
            words[Int((child.first - table.first) / span)] =
                (base.value + UInt64(i) << pageShift) | Self.allowsAll | Self.accessed
        }
        for leaf in large where leaf.level == table.level {
            guard leaf.first >= table.first, leaf.first - table.first < 512 * span else { continue }
            words[Int((leaf.first - table.first) / span)] =
                leaf.first | Self.allowsAll | Self.dirty | Self.largeBit
        }
        return words
    }

    /// An entry as the guest writes it: not accessed yet.
    static func entry(to address: GuestAddress, level: UInt8, _ rights: GuestRights) -> UInt64 {
        with(rights, address.value & addressMask | (level > 1 ? largeBit : 0))
    }

    /// The same entry with other rights.
    static func with(_ rights: GuestRights, _ entry: UInt64) -> UInt64 {
        let rest = entry & ~(allowsAll | dirty)
        switch rights {
        case .read: return rest | 5
        case .write: return rest | allowsAll | dirty
        case .clean: return rest | allowsAll
        }
    }
}

extension Plan {
    /// Whether the guest changes its own page tables, or flushes what was made of them.
    public var changesGuestTables: Bool {
        var found = false
        forEachGuestStep { if $0.changesGuestTables { found = true } }
        return found
    }

    func forEachGuestStep(_ body: (Action) -> Void) {
        for phase in phases {
            for task in phase.tasks {
                guard case .virtualCPU = task.actor else { continue }
                for step in task.steps { body(step.action) }
            }
        }
    }

    /// Whether the host may have a page of `level` behind a part of `slot`.
    fileprivate func mayHavePages(of level: UInt8, behind slot: SlotPlan) -> Bool {
        let region = regions[slot.region]
        switch region.kind {
        case .hugeShared, .hugePrivate: return region.pageLevel.rawValue >= level
        case .anonymous: return level == 2 && (region.hugePages || transparentHugePages)
        default: return false
        }
    }

    /// The plan with memory for the guest's tables, if it names none.
    func with(_ tables: GuestTables) -> Plan {
        guard pageTables == nil else { return self }
        var plan = self
        plan.pageTables = regions.count
        var region = RegionPlan()
        let name: StaticString = "page-tables"
        region.name = (0..<name.utf8CodeUnitCount).map { name.utf8Start[$0] }
        // What no reclaim takes, no fork copies and no merge finds.
        region.kind = .reservedMemory
        region.size = tables.size
        region.address = freeAddress(tables.size)
        plan.regions.append(region)
        var slot = SlotPlan()
        slot.id = freeSlot
        slot.region = regions.count
        slot.guestAddress = tables.base
        slot.size = tables.size
        plan.slots.append(slot)
        return plan
    }

    /// A place in the process that no region has.
    private func freeAddress(_ size: UInt64) -> UserAddress {
        var address = UserAddress(0x7e00_0000_0000)
        while true {
            let clash = regions.first { $0.address < address + size && address < $0.address + $0.size }
            guard let clash else { return address }
            address = UserAddress((clash.address.value - size) & ~(PageLevel.page2M.bytes - 1))
        }
    }

    /// The highest id that no slot has at any time.
    private var freeSlot: UInt16 {
        var taken = slots.map { $0.id }
        for phase in phases {
            for task in phase.tasks {
                for step in task.steps {
                    if case .setMemoryRegion(let slot) = step.action { taken.append(slot.id) }
                }
            }
        }
        var id: UInt16 = 32763
        while taken.contains(id) { id -= 1 }
        return id
    }
}

extension Action {
    public var changesGuestTables: Bool {
        switch self {
        case .mapPage, .unmapPage, .protectPage, .restorePage, .flushPage, .loadCR3: true
        default: false
        }
    }
}
