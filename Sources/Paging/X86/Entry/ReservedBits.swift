import Frames

/// Which bits of an entry hardware wants to be 0. Kernel: `shadow_zero_check`, `is_rsvd_spte`. Spec: x86 1.1, 1.2, X23.
extension EntryBits {
    /// Whether hardware that reads the entry as present would find a reserved bit in it, or rights or a memory type that
    /// mean nothing. `entry` is shadow-present.
    /// - Parameter physicalAddressBits: MAXPHYADDR of the host.
    public func isReserved(
        _ entry: UInt64, _ level: UInt8, physicalAddressBits: UInt64, executeOnly: Bool = true
    ) -> Bool {
        let isLeaf = Self.isLeaf(entry, level)
        guard !isEPT else {
            return Self.isReservedOfEPT(
                entry, level, isLeaf: isLeaf, physicalAddressBits: physicalAddressBits, executeOnly: executeOnly)
        }
        return Self.hasReservedAddress(entry, level, isLeaf: isLeaf, physicalAddressBits)
    }

    /// The same of an entry of EPT's, KVM's own or a guest hypervisor's. The caller knows whether it is a leaf.
    /// Kernel: `rsvd_bits_mask`, `bad_mt_xwr`.
    static func isReservedOfEPT(
        _ entry: UInt64, _ level: UInt8, isLeaf: Bool, physicalAddressBits: UInt64, executeOnly: Bool
    ) -> Bool {
        if hasReservedAddress(entry, level, isLeaf: isLeaf, physicalAddressBits) { return true }
        switch entry & 7 {
        case 0b010, 0b110: return true
        case 0b100: if !executeOnly { return true }
        default: break
        }
        // Of a link, bits 6:3, and that which would make a leaf of an entry that can't be one.
        guard isLeaf else { return entry & 0xf8 != 0 }
        let memoryType = entry >> 3 & 7
        return memoryType == 2 || memoryType == 3 || memoryType == 7
    }

    private static func hasReservedAddress(
        _ entry: UInt64, _ level: UInt8, isLeaf: Bool, _ physicalAddressBits: UInt64
    ) -> Bool {
        entry & frameMask & (~0 << physicalAddressBits) != 0 || (isLeaf && (level > 3 || entry & inside(level) != 0))
    }

    /// Bits of the address within a leaf of `level`. Legacy leaves above level 1 have PAT in bit 12, which KVM leaves
    /// clear.
    private static func inside(_ level: UInt8) -> UInt64 { (1 << (12 + 9 * (UInt64(level) - 1))) - (1 << 12) }

    /// Bits that neither hardware nor KVM gives a meaning to, in any shadow-present entry of a TDP MMU: set, they are a
    /// mistake.
    var meaningless: UInt64 {
        isEPT ? 1 << 10 | 1 << 55 | 7 << 60 : 3 << 3 | 1 << 8 | 0x7f << 52 | 7 << 60
    }
}
