import Frames
import GuestMemory
import Synchrony

/// The bits of the entries that KVM writes into x86 tables, for one kind of hardware table: EPT's, or those of ordinary
/// paging, which nested paging (NPT) and shadow tables use. Kernel: `shadow_present_mask` and its like. Spec: x86 1.4.
///
///     EPT      2:0 R W X   5:3 memory type   6 IPAT   7 large   8 A   9 D   63 suppress #VE
///              KVM: 11 present   53:52 A/D type   54, 56 saved R, X   57 HW   58 MW
///     legacy   0 P   1 W   2 U   5 A   6 D   7 large   63 NX
///              KVM: 9 HW   10 MW   11 present
///
/// In both, 51:12 are the frame and bit 1 is W.
public struct EntryBits: Sendable, Equatable {
    /// What every present entry has besides its rights.
    public let present: UInt64
    /// EPT: R, without which nothing can be read. Legacy: U.
    public let user: UInt64
    public let execute: UInt64
    public let noExecute: UInt64
    public let accessed: UInt64
    public let dirty: UInt64
    /// The primary mapping is writable. Kernel: `shadow_host_writable_mask`.
    public let hostWritable: UInt64
    /// KVM allows W, so the lockless path may set it. Kernel: `shadow_mmu_writable_mask`. Spec: X19.
    public let mmuWritable: UInt64
    /// The rights that are taken away to see an access where hardware keeps no A; 0: it always does.
    /// Kernel: `shadow_acc_track_mask`.
    public let tracked: UInt64
    public let isEPT: Bool
    /// Of an MMIO entry: bits that are set so that the processor's cache can't hold what it speculates from there; 0 where
    /// processors don't. Kernel: `shadow_nonpresent_or_rsvd_mask`. Spec: x86 1.5.
    public var unreachable: UInt64 = 0

    /// The write bit, and that of a leaf above level 1, of both kinds.
    public static let write: UInt64 = 1 << 1
    public static let large: UInt64 = 1 << 7
    /// Kernel: `SPTE_MMU_PRESENT_MASK`. Spec: X18.
    public static let mmuPresent: UInt64 = 1 << 11
    public static let frameMask: UInt64 = 0x000f_ffff_ffff_f000
    public static let field = FrameField(mask: frameMask, shift: 12, write: write)
    /// A/D type 01: the tables of this root have no A and D. Kernel: `SPTE_TDP_AD_DISABLED`.
    public static let adDisabled: UInt64 = 1 << 52
    /// A/D type 10: A is hardware's, D is not to be believed (a nested guest on a host with PML).
    /// Kernel: `SPTE_TDP_AD_WRPROT_ONLY`. Spec: X46.
    public static let writeProtectOnly: UInt64 = 2 << 52
    public static let adType: UInt64 = 3 << 52
    public static let savedRead: UInt64 = 1 << 54
    public static let savedExecute: UInt64 = 1 << 56
    /// Bit 63 alone: "suppress #VE" of EPT; without P the other formats ignore it. Kernel: `SHADOW_NONPRESENT_VALUE`.
    public static let empty: UInt64 = 1 << 63
    /// Kernel: `FROZEN_SPTE`. Spec: X28.
    public static let frozen: UInt64 = 0x8000_0000_0000_05a0

    /// Where the processor can execute what it can't read (`executeOnly`), R is a right like the others.
    public static func ept(executeOnly: Bool = true) -> EntryBits {
        EntryBits(
            present: empty | (executeOnly ? 0 : 1), user: 1 << 0, execute: 1 << 2, noExecute: 0, accessed: 1 << 8,
            dirty: 1 << 9, hostWritable: 1 << 57, mmuWritable: 1 << 58, tracked: 7, isEPT: true)
    }

    /// NPT, and the tables that shadow a guest's.
    public static let legacy = EntryBits(
        present: 1 << 0, user: 1 << 2, execute: 0, noExecute: empty, accessed: 1 << 5, dirty: 1 << 6,
        hostWritable: 1 << 9, mmuWritable: 1 << 10, tracked: 0, isEPT: false)

    // MARK: What an entry is

    /// Whether KVM has put something there, whatever hardware thinks. Kernel: `is_shadow_present_pte`.
    @inline(__always)
    public static func isPresent(_ entry: UInt64) -> Bool { entry & mmuPresent != 0 }

    /// Kernel: `is_last_spte`, of a present entry.
    @inline(__always)
    public static func isLeaf(_ entry: UInt64, _ level: UInt8) -> Bool {
        isPresent(entry) && (level == 1 || entry & large != 0)
    }

    @inline(__always)
    public static func isTable(_ entry: UInt64, _ level: UInt8) -> Bool {
        level > 1 && entry & (mmuPresent | large) == mmuPresent
    }

    /// Whether an old entry of a table of `level` proves that the guest may write the frame that a new one maps there: a
    /// leaf that it can write. A link has W for other reasons. Kernel: a condition in `make_spte`. Spec: x86 2.11, X58.
    @inline(__always)
    public static func provesWritable(_ old: UInt64, _ level: UInt8) -> Bool {
        guard isPresent(old), old & write != 0 else { return false }
        return isLeaf(old, level) || SeriesPatch.leafProvesWritable.isUndone
    }

    /// Whether a prefetch leaves the entry as it is: a leaf, which may be better than what it would make, or a table.
    /// Spec: I-26, X59, x86 0.1.
    @inline(__always)
    public static func outlastsPrefetch(_ old: UInt64) -> Bool {
        isPresent(old) && !SeriesPatch.prefetchKeepsEntries.isUndone
    }

    /// Kernel: `is_executable_pte`.
    @inline(__always)
    public func isExecutable(_ entry: UInt64) -> Bool { entry & (execute | noExecute) == execute }

    /// Whether the present leaf lets `access` through. A read asks for bit 0 in both kinds.
    /// Kernel: `is_access_allowed`. Spec: x86 2.6.
    @inline(__always)
    public func allows(_ access: AccessKind, _ entry: UInt64) -> Bool {
        switch access {
        case .read: entry & 1 != 0
        case .write: entry & Self.write != 0
        case .execute: isExecutable(entry)
        }
    }

    /// Whether hardware's A and D in the entry are to be had at all. Kernel: `spte_ad_enabled`.
    @inline(__always)
    public static func hasAD(_ entry: UInt64) -> Bool { entry & adType != adDisabled }

    /// Kernel: `is_access_track_spte`. Spec: X26.
    @inline(__always)
    public func isAccessTracked(_ entry: UInt64) -> Bool {
        tracked != 0 && entry & Self.adType == Self.adDisabled && entry & tracked == 0
    }

    /// Whether the leaf may change under the hands of mmu_lock's holder, so that only an atomic exchange gives its last
    /// value: the lockless path may set W, or give back rights; hardware may set A and D.
    /// Kernel: `spte_needs_atomic_update`. Spec: x86 1.4.
    @inline(__always)
    public func needsAtomicUpdate(_ entry: UInt64) -> Bool {
        if entry & Self.write == 0 && entry & mmuWritable != 0 { return true }
        if isAccessTracked(entry) { return true }
        guard Self.hasAD(entry) else { return false }
        return entry & accessed == 0 || (entry & Self.write != 0 && entry & dirty == 0)
    }

    /// What ageing does to a leaf: A goes or, where hardware keeps none, the rights are set aside.
    /// Kernel: `mark_spte_for_access_track`.
    @inline(__always)
    public func ageing(_ entry: UInt64) -> EntryUpdate {
        guard entry & Self.adType == Self.adDisabled, tracked != 0 else { return EntryUpdate(clear: accessed) }
        if isAccessTracked(entry) { return EntryUpdate() }
        var saved: UInt64 = 0
        if entry & 1 != 0 { saved |= Self.savedRead }
        if entry & 4 != 0 { saved |= Self.savedExecute }
        return EntryUpdate(set: saved, clear: tracked | accessed | (Self.savedRead | Self.savedExecute) & ~saved)
    }

    /// Gives back what `ageing` set aside; W is not among it. Kernel: `restore_acc_track_spte`.
    @inline(__always)
    public func restoring(_ entry: UInt64) -> EntryUpdate {
        var rights: UInt64 = 0
        if entry & Self.savedRead != 0 { rights |= 1 }
        if entry & Self.savedExecute != 0 { rights |= 4 }
        return EntryUpdate(set: rights, clear: tracked & ~rights | Self.savedRead | Self.savedExecute)
    }

    /// All bits of an entry that points to a table, but its address: all rights, since rights live in leaves.
    /// Kernel: `make_nonleaf_spte`.
    @inline(__always)
    public func link(adDisabled: Bool) -> UInt64 {
        let rights = Self.mmuPresent | present | Self.write | user | execute
        return rights | (adDisabled ? Self.adDisabled : accessed)
    }
}
