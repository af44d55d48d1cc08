import Frames

/// One EPT entry, as the processor reads it. Source: Intel SDM volume 3, the tables "Format of an EPT ... entry".
/// Spec: x86 1.1.
///
///     2:0 R W X   5:3 memory type (leaf)   6 ignore PAT (leaf)   7 large leaf   8 A   9 D (leaf)   51:12 address
///
/// Mode-based execute control, virtualization-exception suppression, verify-guest-paging, paging-write access,
/// supervisor shadow stack and sub-page permissions are off: their bits (10, 57, 58, 60, 61, 63) are ignored.
struct EPTEntry {
    let bits: UInt64

    static let accessed: UInt64 = 1 << 8
    static let dirty: UInt64 = 1 << 9
    private static let addressBits: UInt64 = 0x000f_ffff_ffff_f000
    /// 6:3, and 7 where no large leaf may be.
    private static let reservedInTable: UInt64 = 0xf8

    /// Any of R, W, X.
    var isPresent: Bool { bits & 7 != 0 }

    var rights: WalkRights {
        WalkRights(read: bits & 1 != 0, write: bits & 2 != 0, execute: bits & 4 != 0)
    }

    /// Physical address of the table or page: bits 51:12.
    var address: UInt64 { bits & Self.addressBits }

    /// At level 1 bit 7 is ignored and every entry is a leaf.
    func isLeaf(at level: PageLevel, largest: PageLevel) -> Bool {
        level == .page4K || (level <= largest && bits & 0x80 != 0)
    }

    /// What makes the entry, which is present, an EPT misconfiguration; nil if nothing does.
    func defect(at level: PageLevel, leaf: Bool, _ processor: EPTProcessor) -> WalkFault.Reason? {
        let permissions = bits & 7
        if permissions == 0b010 || permissions == 0b110 { return .encoding }
        if permissions == 0b100, !processor.executeOnly { return .encoding }
        if bits & processor.reservedAddressBits != 0 { return .reservedBits }
        guard leaf else { return bits & Self.reservedInTable != 0 ? .reservedBits : nil }
        switch bits >> 3 & 7 {
        case 2, 3, 7: return .memoryType
        default: break
        }
        return address & (level.bytes - 1) != 0 ? .misaligned : nil
    }
}

/// What a processor can do in EPT. Source: Intel SDM, `IA32_VMX_EPT_VPID_CAP`, CPUID 80000008H.
struct EPTProcessor: Sendable, Equatable {
    /// MAXPHYADDR.
    let physicalAddressBits: Int
    /// Whether R=0, W=0, X=1 is legal.
    let executeOnly: Bool
    /// The largest leaf: 2 MiB or 1 GiB (or 4 KiB: no large leaf at all).
    let largestLeaf: PageLevel

    init(physicalAddressBits: Int, executeOnly: Bool, largestLeaf: PageLevel) {
        precondition((32...52).contains(physicalAddressBits), "MAXPHYADDR is 32 to 52")
        precondition(largestLeaf >= .page4K && largestLeaf <= .page1G, "EPT has leaves of 4 KiB, 2 MiB and 1 GiB")
        self.physicalAddressBits = physicalAddressBits
        self.executeOnly = executeOnly
        self.largestLeaf = largestLeaf
    }

    /// Bits 51:MAXPHYADDR.
    var reservedAddressBits: UInt64 { (1 << 52) - (1 << UInt64(physicalAddressBits)) }
}
