import Frames

/// One entry of ordinary x86 tables, as the processor reads it; the upper half is 0 with 32-bit paging. Source: Intel SDM
/// volume 3, the tables "Use of CR3 / Format of a ... entry" of each paging mode; AMD APM volume 2, "Page translation".
/// Spec: x86 1.2.
///
///     0 P   1 R/W   2 U/S   3 PWT   4 PCD   5 A   6 D (leaf)   7 PS, or PAT in a PTE   8 G (leaf)   12 PAT (large leaf)
///     51:12 address   62:59 protection key (leaf)   63 XD
struct LegacyEntry {
    let bits: UInt64

    static let accessed: UInt64 = 1 << 5
    static let dirty: UInt64 = 1 << 6
    private static let addressBits: UInt64 = 0x000f_ffff_ffff_f000

    var isPresent: Bool { bits & 1 != 0 }
    private var isLarge: Bool { bits & 0x80 != 0 }
    /// Where the next table is.
    var table: UInt64 { bits & Self.addressBits }

    /// What this entry, of a leaf or a table, takes away from `above`. The pointers of PAE have no rights.
    func rights(below above: LinearRights) -> LinearRights {
        LinearRights(
            user: above.user && bits & 4 != 0, writable: above.writable && bits & 2 != 0,
            executable: above.executable && bits >> 63 == 0, protectionKey: UInt8(bits >> 59 & 0xf))
    }

    func isLeaf(at level: PageLevel, _ format: LegacyFormat) -> Bool {
        level == .page4K || (isLarge && level <= format.largestLeaf)
    }

    /// Whether the entry, which is present, has a reserved bit set.
    func isReserved(at level: PageLevel, leaf: Bool, _ format: LegacyFormat) -> Bool {
        bits & format.reservedBits(at: level, leaf: leaf) != 0
    }

    /// The first byte of what the leaf maps.
    func page(at level: PageLevel, _ format: LegacyFormat) -> UInt64 {
        let page = bits & Self.addressBits & ~(format.leafBytes(level) - 1)
        guard format.mode == .bits32, level == .page2M else { return page }
        // PSE-36: what is left of 20:13 after the reserved bits are the address's bits from 32 on.
        return page | (bits >> 13 & 0xff) << 32
    }
}

/// The entries of one paging mode: sizes and reserved bits.
struct LegacyFormat: Sendable {
    let mode: PagingMode
    let processor: PagingProcessor
    /// Bit 63 has a meaning.
    let noExecute: Bool
    /// The largest level at which bit 7 makes a leaf.
    let largestLeaf: PageLevel

    init(_ registers: PagingRegisters, _ processor: PagingProcessor) {
        mode = registers.mode
        self.processor = processor
        noExecute = registers.noExecute
        switch mode {
        case .off: largestLeaf = .page4K
        case .bits32: largestLeaf = registers.largePages ? .page2M : .page4K
        case .pae: largestLeaf = .page2M
        case .fourLevel, .fiveLevel: largestLeaf = processor.gigabytePages ? .page1G : .page2M
        }
    }

    var entryBytes: UInt64 { mode == .bits32 ? 4 : 8 }

    func leafBytes(_ level: PageLevel) -> UInt64 { mode == .bits32 && level == .page2M ? 4 << 20 : level.bytes }

    /// The index into a table of `level`.
    func index(_ address: UInt64, _ level: PageLevel) -> UInt64 {
        if mode == .bits32 { return address >> (level == .page4K ? 12 : 22) & 0x3ff }
        let index = address >> (12 + 9 * UInt64(level.rawValue - 1))
        return mode == .pae && level == .page1G ? index & 3 : index & 0x1ff
    }

    /// Where CR3 says that the root is: a table, or the 32 bytes of the pointers of PAE.
    func root(_ cr3: UInt64) -> UInt64 {
        switch mode {
        case .off: 0
        case .bits32: cr3 & 0xffff_f000
        case .pae: Self.pointerTable(cr3)
        case .fourLevel, .fiveLevel: cr3 & 0x000f_ffff_ffff_f000
        }
    }

    /// 32 bytes, aligned to that, below 4 GiB.
    static func pointerTable(_ cr3: UInt64) -> UInt64 { cr3 & 0xffff_ffe0 }

    /// The bits that must be 0 in a present entry.
    func reservedBits(at level: PageLevel, leaf: Bool) -> UInt64 {
        switch mode {
        case .off: 0
        case .bits32: leaf && level == .page2M ? Self.between(processor.pageSizeExtensionBits - 19, 22) : 0
        case .pae: reservedInPAE(level, leaf)
        case .fourLevel, .fiveLevel: reservedInLongMode(level, leaf)
        }
    }

    private func reservedInPAE(_ level: PageLevel, _ leaf: Bool) -> UInt64 {
        if level == .page1G { return reservedInPointer }
        return Self.between(processor.physicalAddressBits, 63) | reservedExecute
            | (leaf && level == .page2M ? Self.between(13, 21) : 0)
    }

    /// Of PAE's page-directory pointers: 2:1, 8:5, and all from MAXPHYADDR on.
    var reservedInPointer: UInt64 { 0x1e6 | ~0 << UInt64(processor.physicalAddressBits) }

    private func reservedInLongMode(_ level: PageLevel, _ leaf: Bool) -> UInt64 {
        let common = Self.between(processor.physicalAddressBits, 52) | reservedExecute
        if leaf {
            return level == .page4K ? common : common | Self.between(13, 12 + 9 * (Int(level.rawValue) - 1))
        }
        // Bit 7 in what is no leaf: of a size that is not to be had.
        let root = level > .page1G && processor.isAMD
        return common | 1 << 7 | (root ? 1 << 8 : 0)
    }

    private var reservedExecute: UInt64 { noExecute ? 0 : 1 << 63 }

    /// Bits `low` to `end` - 1.
    private static func between(_ low: Int, _ end: Int) -> UInt64 { (1 << UInt64(end)) - (1 << UInt64(low)) }
}

extension PagingProcessor {
    /// How wide an address a 4 MiB page may have. Source: Intel SDM, "32-bit paging": the smaller of 40 and MAXPHYADDR.
    /// KVM's own walk takes 36 on every processor (Spec: x86 1.2), which is the same for a guest of 36 bits.
    var pageSizeExtensionBits: Int { min(40, physicalAddressBits) }
}
