import Frames
import Synchrony

/// An entry of the primary page table: x86-64's format, with Linux's software bits.
///
/// Present: bit 0. Not present but a page all the same (PROT_NONE, a NUMA hint): bit 8 without bit 0, frame kept.
/// Poisoned: bit 10 without bits 0 and 8. Zero: nothing. Source: the architecture's 4-level paging; bits 9 and 10 are
/// the processor's "ignored" ones.
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

    /// The exact frame that `address` reaches.
    func frame(of address: UserAddress) -> HostFrame {
        entry.frame.advanced(by: Int(address.page & (level.frames - 1)))
    }
}
