import Frames

/// The entries of one paging mode: sizes and reserved bits. Source: Intel SDM volume 3, "Paging"; AMD APM volume 2, "Page
/// translation and protection". Spec: x86 1.2.
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
