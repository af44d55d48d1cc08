import Frames
import Hardware
import HostMemory

/// Ordinary x86 tables of one mode, with a path for guest or linear address 0 (or another below 2 MiB) to each level.
/// The table of level n is at n * 0x1000; the page is at 0xd000.
struct LegacyFixture {
    let tables: RawTables
    let mode: PagingMode
    /// Added to all physical addresses of the tables: where a guest's memory starts, seen from the host.
    let base: UInt64

    static let table: UInt64 = 0x27  // P W U A
    static let leaf: UInt64 = 0x67  // P W U A D
    static let page: UInt64 = 0xd000

    init(_ mode: PagingMode, in tables: RawTables = RawTables(), base: UInt64 = 0) {
        self.tables = tables
        self.mode = mode
        self.base = base
        restore()
    }

    /// Writes all entries of the path anew, with A and D set.
    func restore() {
        for level in stride(from: top, to: 1, by: -1) { self[level] = good(level) }
        self[1] = Self.page | Self.leaf
    }

    /// The good entry of a table at `level`.
    func good(_ level: UInt8) -> UInt64 {
        let next = UInt64(level - 1) * 0x1000
        return mode == .pae && level == 3 ? next | 1 : next | Self.table
    }

    var top: UInt8 { mode.topLevel }
    var isNarrow: Bool { mode == .bits32 }

    /// Where the entry of `level` is for address 0.
    func location(_ level: UInt8) -> UInt64 { UInt64(level) * 0x1000 }

    /// The entry of `level` for address 0.
    subscript(_ level: UInt8) -> UInt64 {
        get { entry(at: location(level)) }
        nonmutating set { set(newValue, at: location(level)) }
    }

    func entry(at location: UInt64) -> UInt64 {
        let word = tables[base + location & ~7]
        return isNarrow ? word >> ((location & 4) * 8) & 0xffff_ffff : word
    }

    func set(_ value: UInt64, at location: UInt64) {
        guard isNarrow else {
            tables[base + location] = value
            return
        }
        let shift = (location & 4) * 8
        let word = tables[base + location & ~7]
        tables[base + location & ~7] = word & ~(0xffff_ffff << shift) | (value & 0xffff_ffff) << shift
    }

    static let cr0: UInt64 = 1 << 31 | 1 << 16

    /// The registers of the mode: WP, PSE and NXE on, CPL 3, pointers loaded.
    func registers(noExecute: Bool = true, cpl: UInt8 = 3) -> PagingRegisters {
        var cr4: UInt64 = 1 << 4
        var efer: UInt64 = noExecute ? 1 << 11 : 0
        if mode != .bits32 { cr4 |= 1 << 5 }
        if mode == .fourLevel || mode == .fiveLevel { efer |= 1 << 8 }
        if mode == .fiveLevel { cr4 |= 1 << 12 }
        return PagingRegisters(
            cr0: mode == .off ? 0 : Self.cr0, cr3: UInt64(top) * 0x1000, cr4: cr4, efer: efer,
            pointers: mode == .pae ? PageDirectoryPointers(self[3]) : PageDirectoryPointers(), privilegeLevel: cpl)
    }

    func walker(
        _ registers: PagingRegisters? = nil, processor: PagingProcessor = PagingProcessor(physicalAddressBits: 46)
    ) -> LegacyWalker {
        LegacyWalker(
            tables: .physical(tables.memory), registers: registers ?? self.registers(), processor: processor, vcpu: 3)
    }

    /// The same tables as nested ones.
    func nested(
        noExecute: Bool = true, processor: PagingProcessor = PagingProcessor(physicalAddressBits: 46, isAMD: true)
    ) -> NPTWalker {
        NPTWalker(
            memory: tables.memory, root: UInt64(top) * 0x1000, mode: mode, noExecute: noExecute,
            processor: processor, vcpu: 3)
    }
}

extension PagingMode {
    static let translating: [PagingMode] = [.bits32, .pae, .fourLevel, .fiveLevel]
}

extension LinearResult {
    var translation: LinearTranslation? {
        guard case .translated(let translation) = self else { return nil }
        return translation
    }
    var pageFault: PageFault? {
        guard case .pageFault(let fault) = self else { return nil }
        return fault
    }
    var stageTwo: StageTwoFault? {
        guard case .stageTwo(let fault) = self else { return nil }
        return fault
    }
}
