import Audit
import Frames
import HostMemory
import Synchrony

/// The processor's walk of ordinary tables, as CR0, CR3, CR4 and EFER set it up: 32-bit, PAE, four and five levels, alone
/// or with every address behind EPT or NPT. Source: Intel SDM volume 3, "Paging"; AMD APM volume 2, "Page translation
/// and protection". Spec: x86 1.2, 4.6, 12.
///
/// Holds no lock. A goes into every entry on the way, A and D into the leaf once the access is permitted, by
/// compare-exchange against the entry that was judged; if it has changed, the whole walk starts again. Each step goes down
/// a level, so that tables which point to themselves end like others. Memory types, G and linear-address masking are left
/// out.
public struct LegacyWalker: Sendable {
    public let tables: TableMemory
    public let registers: PagingRegisters
    let format: LegacyFormat
    /// Written into the journal's events.
    public let vcpu: UInt8
    /// Whether what is translated is a guest physical address after all: the walk is of nested tables.
    var isStageTwo = false

    public init(
        tables: TableMemory, registers: PagingRegisters, processor: PagingProcessor = PagingProcessor(),
        vcpu: UInt8 = 0xff
    ) {
        self.tables = tables
        self.registers = registers
        self.vcpu = vcpu
        format = LegacyFormat(registers, processor)
    }

    public var mode: PagingMode { format.mode }
    public var memory: PhysicalMemory { tables.memory }

    /// Translates one access and sets A and D as the processor does. Outside of IA-32e mode only 32 bits of `address`
    /// count.
    public func walk(_ address: UInt64, _ access: LinearAccess) -> LinearResult {
        guard let address = registers.effective(address) else { return .nonCanonical }
        guard mode != .off else { return untranslated(address, access) }
        return translate(address, access)
    }

    /// `walk`, of an address of which the tables' bits are taken as they are.
    func translate(_ address: UInt64, _ access: LinearAccess) -> LinearResult {
        while true {
            if let result = walkOnce(address, access) { return result }
        }
    }

    private func untranslated(_ address: UInt64, _ access: LinearAccess) -> LinearResult {
        let page = Page(address: address, level: .page4K, leafBytes: pageSize, rights: .all, dirty: true)
        return finish(page, address, access)
    }

    /// One walk from the root; nil if an entry changed before A or D got into it.
    private func walkOnce(_ address: UInt64, _ access: LinearAccess) -> LinearResult? {
        var step: Step
        switch start(address, access) {
        case .go(let first): step = first
        case .end(let result): return result
        }
        while true {
            let location = step.table + format.index(address, step.level) * format.entryBytes
            let slot: TableSlot
            switch tables.slot(at: location, narrow: mode == .bits32, for: address) {
            case .found(let found): slot = found
            case .failed(let result): return result
            }
            let entry = LegacyEntry(bits: slot.load())
            let isPointer = mode == .pae && step.level == .page1G
            if !isPointer { step.rights = entry.rights(below: step.rights) }
            if let reason = defect(of: entry, at: step.level) { return fault(reason, step, entry, address, access) }
            if entry.isLeaf(at: step.level, format) {
                return use(entry, slot, at: location, step, address, access)
            }
            if !isPointer {
                switch setFlags(slot, at: location, entry, entry.bits | LegacyEntry.accessed, for: address) {
                case .set: break
                case .changed: return nil
                case .refused(let result): return result
                }
            }
            step.table = entry.table
            step.level = step.level.below
        }
    }

    /// Where the walk stands.
    private struct Step {
        var table: UInt64
        var level: PageLevel
        var rights: LinearRights
    }

    private enum Start {
        case go(Step)
        case end(LinearResult)
    }

    /// The root, or what the PAE pointer in a register leads to.
    private func start(_ address: UInt64, _ access: LinearAccess) -> Start {
        let top = PageLevel(mode.topLevel)
        let root = Step(table: format.root(registers.cr3), level: top, rights: .all)
        guard mode == .pae, !isStageTwo, !tables.readsPageDirectoryPointers else { return .go(root) }
        let pointer = LegacyEntry(bits: registers.pointers[Int(format.index(address, top))])
        // Loading refuses reserved bits; whoever has put some into the register all the same gets what a walk would give.
        if let reason = defect(of: pointer, at: top) { return .end(fault(reason, root, pointer, address, access)) }
        return .go(Step(table: pointer.table, level: top.below, rights: .all))
    }

    private func defect(of entry: LegacyEntry, at level: PageLevel) -> WalkFault.Reason? {
        guard entry.isPresent else { return .absent }
        return entry.isReserved(at: level, leaf: entry.isLeaf(at: level, format), format) ? .reservedBits : nil
    }

    // MARK: Leaves

    /// What a leaf maps, and how.
    private struct Page {
        /// The very byte.
        let address: UInt64
        let level: PageLevel
        let leafBytes: UInt64
        let rights: LinearRights
        let dirty: Bool
    }

    /// Judges the leaf, sets its flags, and goes where it leads. Nil if it has changed.
    private func use(
        _ entry: LegacyEntry, _ slot: TableSlot, at location: UInt64, _ step: Step, _ address: UInt64,
        _ access: LinearAccess
    ) -> LinearResult? {
        guard registers.permits(access, step.rights) else { return fault(.rights, step, entry, address, access) }
        let size = format.leafBytes(step.level)
        let first = entry.page(at: step.level, format)
        let page = first | address & (size - 1)
        if case .physical(let memory) = tables, !memory.exists(HostFrame(page >> pageShift)) { return .outside(page) }
        let wanted = entry.bits | LegacyEntry.accessed | (access.kind == .write ? LegacyEntry.dirty : 0)
        switch setFlags(slot, at: location, entry, wanted, for: address) {
        case .set: break
        case .changed: return nil
        case .refused(let result): return result
        }
        record(entry.bits, wanted, first, step.level, address)
        return finish(
            Page(
                address: page, level: step.level, leafBytes: size, rights: step.rights,
                dirty: wanted & LegacyEntry.dirty != 0), address, access)
    }

    /// Through the second stage, if there is one. The guest's own A and D are set by then, whatever comes of it.
    private func finish(_ page: Page, _ address: UInt64, _ access: LinearAccess) -> LinearResult {
        let guest = GuestFrame(page.address >> pageShift)
        switch tables {
        case .physical(let memory):
            let frame = HostFrame(guest.number)
            guard memory.exists(frame) else { return .outside(page.address) }
            return .translated(
                LinearTranslation(
                    guest: guest, frame: frame, level: page.level, leafBytes: page.leafBytes, bytes: page.leafBytes,
                    rights: page.rights, stageTwo: .all, dirty: page.dirty))
        case .guest(let stage):
            let result = stage.walk(GuestAddress(page.address), access.kind)
            guard case .translated(let second) = result else {
                return .stageTwo(StageTwoFault(result: result, address: address, finalTranslation: true))
            }
            return .translated(
                LinearTranslation(
                    guest: guest, frame: second.frame, level: page.level, leafBytes: page.leafBytes,
                    bytes: min(page.leafBytes, second.level.bytes), rights: page.rights, stageTwo: second.rights,
                    dirty: page.dirty && second.dirty))
        }
    }

    private enum FlagUpdate {
        case set
        /// The entry is another by now.
        case changed
        /// The second stage does not permit to write the table.
        case refused(LinearResult)
    }

    private func setFlags(
        _ slot: TableSlot, at location: UInt64, _ entry: LegacyEntry, _ wanted: UInt64, for address: UInt64
    ) -> FlagUpdate {
        guard wanted != entry.bits else { return .set }
        guard slot.isWritable else {
            return tables.writeFault(at: location, for: address).map { .refused($0) } ?? .changed
        }
        return slot.replace(entry.bits, by: wanted) ? .set : .changed
    }

    /// Only of tables in physical memory: a guest's own are its data.
    private func record(_ old: UInt64, _ new: UInt64, _ leaf: UInt64, _ level: PageLevel, _ address: UInt64) {
        guard case .physical(let memory) = tables, old != new else { return }
        recordFlags(
            in: memory, address: isStageTwo ? GuestAddress(address) : nil, leaf: HostFrame(leaf >> pageShift),
            level: level, old: old, new: new, accessed: LegacyEntry.accessed, dirty: LegacyEntry.dirty, vcpu: vcpu)
    }

    // MARK: Faults

    private func fault(
        _ reason: WalkFault.Reason, _ step: Step, _ entry: LegacyEntry, _ address: UInt64, _ access: LinearAccess
    ) -> LinearResult {
        var code = registers.errorBits(of: access)
        if reason != .absent { code |= PageFault.present }
        if reason == .reservedBits { code |= PageFault.reserved }
        if reason == .rights, registers.deniedByKey(access, step.rights) { code |= PageFault.protectionKey }
        return .pageFault(
            PageFault(
                errorCode: code, address: address, reason: reason, level: step.level, entry: entry.bits,
                rights: step.rights))
    }
}
