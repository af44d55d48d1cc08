import Frames
import Synchrony

/// An entry of the primary page table: x86-64's format, with Linux's software bits.
///
/// Present: bit 0. Not present but a page all the same (PROT_NONE, a NUMA hint): bit 8 without bit 0, frame kept.
/// Zero: nothing. Anything else without bits 0 and 8 says what the process will find here: poison (bit 10), a page on
/// the swap device (bit 11, the slot in the place of the frame), a page that is being migrated (bit 52), a guard (bit 53).
/// Source: the architecture's 4-level paging; bits 9...11 and 52...58 are the processor's "ignored" ones.
struct HostEntry: Equatable {
    var bits: UInt64
    init(_ bits: UInt64) { self.bits = bits }

    static let present: UInt64 = 1 << 0
    static let writable: UInt64 = 1 << 1
    static let user: UInt64 = 1 << 2
    static let accessed: UInt64 = 1 << 5
    static let dirty: UInt64 = 1 << 6
    /// At level 2: a leaf of 2 MiB. Kernel: `_PAGE_PSE`.
    static let large: UInt64 = 1 << 7
    /// Kernel: `_PAGE_PROTNONE`.
    static let protectNone: UInt64 = 1 << 8
    /// No counted page behind it. Kernel: `_PAGE_SPECIAL`.
    static let special: UInt64 = 1 << 9
    /// Kernel: a `SWP_HWPOISON` swap entry.
    static let poison: UInt64 = 1 << 10
    /// Kernel: a swap entry of a device.
    static let swapped: UInt64 = 1 << 11
    /// Kernel: a `SWP_MIGRATION_*` swap entry.
    static let migrating: UInt64 = 1 << 52
    /// Kernel: `PTE_MARKER_GUARD`.
    static let guarding: UInt64 = 1 << 53
    /// Of a swapped or migrating page: it was the process's own. Kernel: `_PAGE_SWP_EXCLUSIVE`,
    /// `SWP_MIGRATION_READ_EXCLUSIVE`.
    static let wasExclusive: UInt64 = 1 << 54
    /// Of a migrating page: the entry was writable. Kernel: `SWP_MIGRATION_WRITE`.
    static let wasWritable: UInt64 = 1 << 55
    /// Writes go to whoever serves them. Kernel: `_PAGE_UFFD_WP`.
    static let userProtected: UInt64 = 1 << 56
    static let noExecute: UInt64 = 1 << 63
    static let frameMask: UInt64 = 0x000f_ffff_ffff_f000

    /// An entry that points to a lower table.
    static func table(_ frame: HostFrame) -> UInt64 {
        frame.physicalAddress | present | writable | user | accessed
    }

    /// A leaf born by a fault: accessed. A mapping that allows nothing gets a PROT_NONE entry.
    static func leaf(_ frame: HostFrame, _ flags: VMAFlags, writable: Bool, special: Bool = false) -> HostEntry {
        var bits = frame.physicalAddress | user | accessed
        bits |= flags.isAccessible ? present : protectNone
        if writable { bits |= Self.writable }
        if special { bits |= Self.special }
        if !flags.execute { bits |= noExecute }
        return HostEntry(bits)
    }

    var isPresent: Bool { bits & Self.present != 0 }
    /// Names a page, though the processor may not see it. Kernel: x86's `pte_present`.
    var mapsFrame: Bool { bits & (Self.present | Self.protectNone) != 0 }
    var isProtectNone: Bool { bits & (Self.present | Self.protectNone) == Self.protectNone }
    var isPoison: Bool { !mapsFrame && bits & Self.poison != 0 }
    var isSwapped: Bool { !mapsFrame && bits & Self.swapped != 0 }
    var isMigrating: Bool { !mapsFrame && bits & Self.migrating != 0 }
    var isGuard: Bool { !mapsFrame && bits & Self.guarding != 0 }
    var wasExclusive: Bool { bits & Self.wasExclusive != 0 }
    var wasWritable: Bool { bits & Self.wasWritable != 0 }
    var isUserProtected: Bool { bits & Self.userProtected != 0 }
    /// Of a swapped entry.
    var slot: Int { Int(frame.number) }

    /// What stands for `old` while its page is on its way to another frame.
    static func migrating(_ old: HostEntry, exclusive: Bool) -> HostEntry {
        var bits = old.bits & (frameMask | userProtected) | migrating
        if exclusive { bits |= wasExclusive }
        if old.isWritable { bits |= wasWritable }
        return HostEntry(bits)
    }

    static func swapped(slot: Int, exclusive: Bool) -> HostEntry {
        HostEntry(UInt64(slot) << pageShift | swapped | (exclusive ? wasExclusive : 0))
    }
    var isWritable: Bool { bits & Self.writable != 0 }
    var isAccessed: Bool { bits & Self.accessed != 0 }
    var isDirty: Bool { bits & Self.dirty != 0 }
    var isSpecial: Bool { bits & Self.special != 0 }
    /// Of an entry at level 2: a leaf. One that is PROT_NONE counts.
    var isLargeLeaf: Bool { mapsFrame && bits & Self.large != 0 }
    var frame: HostFrame { HostFrame((bits & Self.frameMask) >> pageShift) }

    func setting(_ bits: UInt64) -> HostEntry { HostEntry(self.bits | bits) }
    func clearing(_ bits: UInt64) -> HostEntry { HostEntry(self.bits & ~bits) }
}

/// A leaf of the primary table with its place.
struct HostLeaf {
    let word: AtomicWord
    let entry: HostEntry
    let level: PageLevel
    /// Of a 4 KiB leaf: the level-2 entry through which it was found, and what stood there.
    var upper: (word: AtomicWord, bits: UInt64)?

    /// Whether both entries are still as they were found. Kernel: the second look of `gup_fast_pte_range`.
    @inline(__always) var isUnchanged: Bool {
        if let upper, upper.word.load() != upper.bits { return false }
        return word.load() == entry.bits
    }

    /// The exact frame that `address` reaches.
    @inline(__always)
    func frame(of address: UserAddress) -> HostFrame {
        entry.frame.advanced(by: Int(address.page & (level.frames - 1)))
    }
}
