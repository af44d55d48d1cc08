import Frames
import GuestMemory

/// What only EPT has: memory types in leaves, and the EPT pointer. All else is in `EntryBits`. Spec: x86 1.1.
enum EPT {
    /// Leaf, 5:3: write-back.
    static let writeBack: UInt64 = 6 << 3
    /// Leaf, 5:3: uncached.
    static let uncached: UInt64 = 0
    static let memoryType: UInt64 = 7 << 3
    /// Leaf: the guest's PAT does not count.
    static let ignorePAT: UInt64 = 1 << 6

    /// EPTP: write-back, the walk's length, bit 6 where hardware keeps A and D. Spec: x86 1.1.
    static func pointer(root: HostFrame, levels: UInt8, accessDirty: Bool) -> UInt64 {
        EntryBits.field.bits(for: root) | (accessDirty ? 1 << 6 : 0) | UInt64(levels - 1) << 3 | 6
    }
}

extension EntryBits {
    /// Policy `tracked` alone: a counted page stands behind the frame. Ignored by hardware in both kinds of entry.
    /// Spec: generic 10.2.
    static let counted: UInt64 = 1 << 59

    /// Traps if two meanings share a bit. Called when the MMU is made.
    func checkLayout() {
        let hardware = Self.write | Self.large | user | execute | accessed | dirty | present
        let software = [
            Self.mmuPresent, Self.adDisabled, Self.writeProtectOnly, Self.savedRead, Self.savedExecute, hostWritable,
            mmuWritable, Self.counted,
        ]
        var seen = hardware | noExecute | Self.frameMask | Self.empty
        if isEPT { seen |= EPT.memoryType | EPT.ignorePAT }
        for bit in software {
            precondition(seen & bit == 0, "a software bit of an entry is taken")
            seen |= bit
        }
        for value in [Self.empty, Self.frozen] {
            // 2:0: all of EPT's rights, and P of the others. 6 there is KVM's MMIO marker, so nothing else may be.
            precondition(value & (Self.mmuPresent | 7 | Self.frameMask) == 0, "a marker maps something")
        }
        precondition(Self.empty != Self.frozen)
    }
}

/// Second-stage tables of 4 or 5 levels, for the walker that the radix formats share. EPT and NPT differ in their bits
/// alone, and a table from a leaf is told by bits that they share.
struct TDPFormat: RadixFormat {
    let levels: UInt8
    @inline(__always) var rootIndexBits: UInt64 { 9 }
    @inline(__always) var field: FrameField { EntryBits.field }
    @inline(__always) var empty: UInt64 { EntryBits.empty }

    @inline(__always)
    func isTable(_ entry: UInt64, _ level: UInt8) -> Bool { EntryBits.isTable(entry, level) }

    @inline(__always)
    func isLeaf(_ entry: UInt64, _ level: UInt8) -> Bool { EntryBits.isLeaf(entry, level) }
}
