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
