import Frames
import GuestMemory

/// How the entries of a guest's own page tables are to be read. Spec: x86 1.2, 1.3, 4.6.
struct GuestEntryFormat {
    /// The guest's registers say all of it.
    let registers: GuestRegisters

    /// Bytes of an entry.
    var entrySize: UInt64 { registers.physicalAddressExtension ? 8 : 4 }
    /// Bits of an address that choose an entry of one table.
    private var indexBits: UInt64 { registers.physicalAddressExtension ? 9 : 10 }

    func index(_ address: UInt64, _ level: UInt8) -> UInt64 {
        let bits = indexBits
        // The topmost table of PAE paging has four entries.
        let mask: UInt64 = registers.levels == 3 && level == 3 ? 3 : (1 << bits) - 1
        return address >> (12 + bits * UInt64(level - 1)) & mask
    }

    func isPresent(_ entry: UInt64) -> Bool { entry & 1 != 0 }
    static let accessed: UInt64 = 1 << 5
    static let dirty: UInt64 = 1 << 6
    private static let large: UInt64 = 1 << 7

    /// Without paging extensions only PDEs can be large, and only with CR4.PSE. Kernel: `is_last_gpte`.
    func isLeaf(_ entry: UInt64, _ level: UInt8) -> Bool {
        if level == 1 { return true }
        guard entry & Self.large != 0 else { return false }
        switch registers.levels {
        case 2: return level == 2 && registers.pageSizeExtension
        case 3: return level == 2
        default: return level == 2 || level == 3
        }
    }

    /// Kernel: `FNAME(gpte_access)`. Spec: x86 1.3.
    func rights(_ entry: UInt64) -> Rights {
        var rights: Rights = []
        if entry & 2 != 0 { rights.insert(.write) }
        if entry & 4 != 0 { rights.insert(.user) }
        if !(registers.physicalAddressExtension && registers.noExecute && entry >> 63 != 0) { rights.insert(.execute) }
        return rights
    }

    /// The table or the first page that the entry names. Kernel: `gpte_to_gfn`, `gpte_to_gfn_lvl`, `pse36_gfn_delta`.
    func frame(_ entry: UInt64, _ level: UInt8) -> GuestFrame {
        let leaf = level > 1 && isLeaf(entry, level)
        guard registers.physicalAddressExtension else {
            guard leaf else { return GuestFrame(entry >> 12 & 0xf_ffff) }
            // PSE-36: bits 16:13 are the address's 35:32.
            return GuestFrame(entry >> 22 & 0x3ff).offset(by: 10, plus: entry >> 13 & 0xf)
        }
        let frame = (entry & 0x000f_ffff_ffff_f000) >> 12
        return GuestFrame(leaf ? frame & ~(PageLevel(level).frames - 1) : frame)
    }

    /// Bytes that an entry of `level` spans, as a count of pages.
    func pages(_ level: UInt8) -> UInt64 { 1 << (indexBits * UInt64(level - 1)) }

    /// Whether a bit is set that the processor wants clear. Kernel: `is_rsvd_bits_set`. Spec: x86 1.2.
    func hasReservedBit(_ entry: UInt64, _ level: UInt8) -> Bool { entry & reserved(entry, level) != 0 }

    private func reserved(_ entry: UInt64, _ level: UInt8) -> UInt64 {
        let width = UInt64(registers.physicalAddressBits)
        let leaf = level > 1 && isLeaf(entry, level)
        switch registers.levels {
        case 2: return leaf ? 0x1f << 17 : 0
        case 3:
            let high = (UInt64(1) << 63 - 1) & ~((1 << width) - 1)
            if level == 3 { return high | 1 << 63 | 0x1e6 }
            return high | (registers.noExecute ? 0 : 1 << 63) | (leaf ? 0xff << 13 : 0)
        default:
            let high = (UInt64(1) << 52 - 1) & ~((1 << width) - 1)
            var mask = high | (registers.noExecute ? 0 : 1 << 63)
            if level >= 4 { return mask | Self.large }
            if leaf { mask |= level == 2 ? 0xff << 13 : 0x1ffff << 13 }
            if level == 3 && !registers.hasGigabytePages { mask |= Self.large }
            return mask
        }
    }
}

extension GuestFrame {
    /// A 4 MiB page of 32-bit paging: 10 bits of the entry and 4 more above them.
    fileprivate func offset(by bits: UInt64, plus high: UInt64) -> GuestFrame {
        GuestFrame(number << bits | high << 20)
    }
}
