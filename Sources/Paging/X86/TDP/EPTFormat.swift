import Frames
import GuestMemory

/// The bits of an EPT entry, hardware's and KVM's. Spec: x86 1.1, 1.4.
///
///     2:0 R W X   5:3 memory type   6 IPAT   7 large leaf   8 A   9 D   51:12 frame   63 suppress #VE
///     KVM: 11 MMU_PRESENT   53:52 A/D type   54, 56 saved R, X   57 HW   58 MW   59 counted
///
/// Why these bits: 11 and 62:52 are ignored by the walker in every entry, so software may keep what it likes there.
/// 57, 58, 60 and 61 have a meaning only with VM-execution controls that KVM leaves off (guest-paging verification,
/// paging-write access, supervisor shadow stack, sub-page permissions).
enum EPT {
    // MARK: Hardware

    static let read: UInt64 = 1 << 0
    static let write: UInt64 = 1 << 1
    static let execute: UInt64 = 1 << 2
    static let rights: UInt64 = 7
    /// Leaf, 5:3: write-back.
    static let writeBack: UInt64 = 6 << 3
    /// Leaf, 5:3: uncached.
    static let uncached: UInt64 = 0
    static let memoryType: UInt64 = 7 << 3
    /// Leaf: the guest's PAT does not count.
    static let ignorePAT: UInt64 = 1 << 6
    /// A leaf above level 1. At level 1 the bit is ignored and KVM leaves it clear.
    static let large: UInt64 = 1 << 7
    static let accessed: UInt64 = 1 << 8
    static let dirty: UInt64 = 1 << 9
    static let field = FrameField(mask: 0x000f_ffff_ffff_f000, shift: 12, write: write)
    /// An access through the entry exits instead of raising #VE in the guest. Set in every entry (Spec: X24).
    static let suppressVE: UInt64 = 1 << 63

    // MARK: KVM

    /// The entry maps something, whatever R, W and X say (an access-tracked leaf has none). Ignored by hardware in
    /// every entry, and clear in the empty and in the frozen value. Kernel: `SPTE_MMU_PRESENT_MASK`. Spec: X18.
    static let mmuPresent: UInt64 = 1 << 11
    /// A/D type 01: the tables of this root have no A and D; bits 8 and 9 are then software's. Kernel:
    /// `SPTE_TDP_AD_DISABLED`. Type 10, write-protect only, is for nested guests on PML hosts and has no place yet.
    static let adDisabled: UInt64 = 1 << 52
    /// Where access tracking keeps R and X. W needs no place: MW says whether it may come back.
    static let savedRead: UInt64 = 1 << 54
    static let savedExecute: UInt64 = 1 << 56
    /// The primary mapping is writable. Kernel: `host-writable`.
    static let hostWritable: UInt64 = 1 << 57
    /// KVM allows W, so the lockless path may set it. Kernel: `MMU-writable`. Spec: X19.
    static let mmuWritable: UInt64 = 1 << 58
    /// Policy `tracked` alone: a counted page stands behind the frame. Spec: generic 10.2.
    static let counted: UInt64 = 1 << 59

    /// An entry that maps nothing: new tables are filled with it.
    static let empty: UInt64 = suppressVE
    /// Stands in every entry of a table that is being removed: whoever meets it starts again. No frame, no rights, not
    /// present; bits 10, 8, 7 and 5 set, a pattern that nothing else writes. Kernel: `FROZEN_SPTE`. Spec: X28.
    static let frozen: UInt64 = 0x8000_0000_0000_05a0

    /// The bits of an entry that points to a table: all rights, since rights live in leaves.
    static func link(accessDirty: Bool) -> UInt64 {
        suppressVE | mmuPresent | rights | (accessDirty ? accessed : adDisabled)
    }

    /// EPTP: write-back, walk length 4, bit 6 where hardware keeps A and D. Spec: x86 1.1.
    static func pointer(root: HostFrame, accessDirty: Bool) -> UInt64 {
        field.bits(for: root) | (accessDirty ? 1 << 6 : 0) | (4 - 1) << 3 | 6
    }

    /// Whether the leaf's rights are taken away to see the next access. Spec: x86 1.4, X26.
    static func isAccessTracked(_ entry: UInt64) -> Bool { entry & adDisabled != 0 && entry & rights == 0 }

    /// Whether the present leaf lets `access` through. Kernel: `is_access_allowed`. Spec: x86 2.6 step 2.
    static func allows(_ access: AccessKind, _ entry: UInt64) -> Bool {
        switch access {
        case .read: entry & read != 0
        case .write: entry & write != 0
        case .execute: entry & execute != 0
        }
    }

    /// Traps if two meanings share a bit. Each of these folds to a constant; called when the MMU is made.
    static func checkLayout() {
        let leaf = rights | memoryType | ignorePAT | large | accessed | dirty
        let software = [mmuPresent, adDisabled, 1 << 53, savedRead, savedExecute, hostWritable, mmuWritable, counted]
        var seen = leaf | field.mask | suppressVE
        precondition(leaf & (field.mask | suppressVE) == 0)
        for bit in software {
            precondition(seen & bit == 0, "a software bit of an EPT entry is taken")
            seen |= bit
        }
        precondition(frozen & (mmuPresent | rights | field.mask) == 0 && frozen != empty)
        precondition(empty & (mmuPresent | rights | field.mask) == 0)
        // Hardware would take 6 in 2:0 for a misconfiguration; KVM's MMIO marker uses it, so nothing else may.
        precondition(empty & rights != 6 && frozen & rights != 6)
    }
}

/// EPT with four levels, for the walker that the radix formats share.
struct EPTFormat: RadixFormat {
    @inline(__always) var levels: UInt8 { 4 }
    @inline(__always) var rootIndexBits: UInt64 { 9 }
    @inline(__always) var field: FrameField { EPT.field }
    @inline(__always) var empty: UInt64 { EPT.empty }

    @inline(__always)
    func isTable(_ entry: UInt64, _ level: UInt8) -> Bool {
        level > 1 && entry & (EPT.mmuPresent | EPT.large) == EPT.mmuPresent
    }

    @inline(__always)
    func isLeaf(_ entry: UInt64, _ level: UInt8) -> Bool {
        entry & EPT.mmuPresent != 0 && (level == 1 || entry & EPT.large != 0)
    }
}
