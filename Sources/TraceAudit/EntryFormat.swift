/// The bit layout of a recording's entries. One host has one: EPT, or the legacy format of NPT and shadow paging.
/// Spec: x86 1.1, 1.2, 1.4.
public enum EntryFormat: String, Sendable, Codable {
    case extended = "EPT"
    case legacy = "legacy (NPT or shadow)"
}

/// Bits that mean the same in both formats.
enum EntryBits {
    static let mmuPresent: UInt64 = 1 << 11
    static let large: UInt64 = 1 << 7
    /// Bits 51:12.
    static let address: UInt64 = 0x000f_ffff_ffff_f000
    static let top: UInt64 = 1 << 63
    /// FROZEN_SPTE on 64-bit hosts. Spec: x86 1.4.
    static let frozen: UInt64 = 0x8000_0000_0000_05a0
}

/// One entry read under a format. Spec: x86 1.4, table of masks.
struct DecodedEntry {
    let raw: UInt64
    let format: EntryFormat
    let level: Int

    private func has(_ bit: UInt64) -> Bool { raw >> bit & 1 != 0 }

    /// Empty before or after 6.10 (bit 63 alone suppresses #VE), or frozen by a thread that removes the table.
    var isEmpty: Bool { raw == 0 || raw == EntryBits.top }
    var isFrozen: Bool { raw == EntryBits.frozen }

    /// Spec: x86 1.5.
    var isMMIO: Bool {
        switch format {
        case .extended: raw & (0x7 | EntryBits.top) == 0x6
        case .legacy: has(51) && has(0) && !has(11)
        }
    }
    var isPresent: Bool { has(11) }
    var isLeaf: Bool { isPresent && (level == 1 || has(7)) }

    var canWrite: Bool { has(1) }
    var canExecute: Bool { format == .extended ? has(2) : !has(63) }
    /// EPT has no user bit; its read bit stands in for it.
    var isUser: Bool { format == .extended ? has(0) : has(2) }
    var canRead: Bool { has(0) }
    var accessed: Bool { format == .extended ? has(8) : has(5) }
    var hostWritable: Bool { format == .extended ? has(57) : has(9) }
    var mmuWritable: Bool { format == .extended ? has(58) : has(10) }
    /// 0 enabled, 1 disabled, 2 write-protect only.
    var accessedDirtyType: UInt64 { raw >> 52 & 3 }
    /// R, W and X all clear on a present EPT entry: parked until the next access. Spec: x86 1.4.
    var isAccessTracked: Bool { format == .extended && isPresent && raw & 0x7 == 0 }

    var hostFrame: UInt64 { (raw & EntryBits.address) >> 12 }

    /// `rwxu` as the permissions are, `-` where absent.
    var permissions: String {
        (canRead || isAccessTracked ? "r" : "-") + (canWrite ? "w" : "-") + (canExecute ? "x" : "-")
            + (format == .legacy ? (isUser ? "u" : "-") : "")
    }
}

/// Guest frames that an entry of `level` covers.
func pages(level: Int) -> UInt64 { 1 << UInt64(9 * (level - 1)) }

/// Decides the format by majority, so that one damaged entry cannot turn every other one into a finding.
///
/// Only EPT uses bits 57 and 58 (host- and MMU-writable); only legacy entries leave bit 63 clear on a kernel that
/// suppresses #VE. A legacy no-execute entry has bit 63 too and votes for nothing.
struct FormatVotes {
    private var extended: UInt64 = 0
    private var legacy: UInt64 = 0
    /// Present EPT entries with bit 63: from the first on, the kernel is known to suppress #VE. Spec: x86 X24.
    private(set) var suppressSeen = false

    var decided: EntryFormat? {
        if extended > legacy { return .extended }
        if legacy > extended { return .legacy }
        return nil
    }
    var isMixed: Bool { extended > 0 && legacy > 0 }

    mutating func count(_ entry: UInt64) {
        guard entry & EntryBits.mmuPresent != 0 else { return }
        if entry & (3 << 57) != 0 {
            extended += 1
            if entry & EntryBits.top != 0 { suppressSeen = true }
        } else if entry & EntryBits.top == 0, entry & 1 != 0 {
            legacy += 1
        }
    }
}
