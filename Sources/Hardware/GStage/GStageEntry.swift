import Frames

/// One G-stage entry, as the hart reads it. Source: RISC-V privileged architecture, "Two-Stage Address Translation".
/// Spec: arches 2.1, 12.7.
///
///     0 V   1 R   2 W   3 X   4 U   5 G (ignored)   6 A   7 D   9:8 RSW (ignored)   53:10 PPN   62:61 PBMT   63 N
struct GStageEntry {
    let bits: UInt64

    static let user: UInt64 = 1 << 4
    static let accessed: UInt64 = 1 << 6
    static let dirty: UInt64 = 1 << 7
    /// 60:54, and N: Svnapot is not offered.
    private static let alwaysReserved: UInt64 = 0x7f << 54 | 1 << 63

    var isValid: Bool { bits & 1 != 0 }
    /// Any of R, W, X; a table's pointer has none.
    var isLeaf: Bool { bits & 0xe != 0 }

    var rights: WalkRights {
        WalkRights(read: bits & 2 != 0, write: bits & 4 != 0, execute: bits & 8 != 0)
    }

    /// Physical address of the table or page: PPN in 53:10.
    var address: UInt64 { (bits >> 10 & 0xfff_ffff_ffff) << pageShift }

    /// What forbids using the entry, which is valid, at all; nil if nothing does.
    func defect(at level: PageLevel, memoryTypes: Bool) -> WalkFault.Reason? {
        if bits & 0b110 == 0b100 { return .encoding }
        if bits & Self.alwaysReserved != 0 { return .reservedBits }
        let memoryType = bits >> 61 & 3
        guard isLeaf else {
            let reserved = Self.accessed | Self.dirty | Self.user
            return bits & reserved != 0 || memoryType != 0 ? .reservedBits : nil
        }
        if memoryType != 0 {
            guard memoryTypes else { return .reservedBits }
            guard memoryType != 3 else { return .memoryType }
        }
        return nil
    }
}
