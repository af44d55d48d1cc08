import Frames
import GuestMemory

/// The tables that are shadowed: where they begin, and how their entries are to be read. Spec: x86 1.1 to 1.3, 4.6.
struct GuestEntryFormat: Equatable {
    /// Of the ordinary format they say all. With EPT they are not asked.
    let registers: GuestRegisters
    /// A guest hypervisor's, for its guest.
    let ept: EPTTables?

    init(registers: GuestRegisters) {
        self.registers = registers
        ept = nil
    }

    init(_ ept: EPTTables) {
        registers = .unpaged
        self.ept = ept
    }

    var isPaged: Bool { ept != nil || registers.isPaged }
    /// 0 without paging.
    var levels: UInt8 { ept.map { $0.levels } ?? registers.levels }
    /// The highest level whose entries a walk reads: of PAE's topmost, the processor keeps copies.
    var topLevel: UInt8 { levels == 3 ? 2 : levels }
    /// What names the tables: CR3, nCR3, an EPT pointer. Kernel: `get_guest_pgd`.
    var pointer: UInt64 { ept.map { $0.pointer } ?? registers.cr3 }
    /// Where the topmost table is.
    var top: UInt64 {
        if let ept { return ept.pointer & Self.wideFrame }
        return registers.cr3 & (registers.physicalAddressExtension ? Self.wideFrame : 0xffff_f000)
    }

    /// Where the four pointers of PAE are: 32 bytes, below 4 GiB.
    var pointers: UInt64 { registers.cr3 & 0xffff_ffe0 }

    private var isWide: Bool { ept != nil || registers.physicalAddressExtension }
    /// Bytes of an entry.
    var entrySize: UInt64 { isWide ? 8 : 4 }
    /// Bits of an address that choose an entry of one table.
    private var indexBits: UInt64 { isWide ? 9 : 10 }

    func index(_ address: UInt64, _ level: UInt8) -> UInt64 {
        let bits = indexBits
        // The topmost table of PAE paging has four entries.
        let mask: UInt64 = levels == 3 && level == 3 ? 3 : (1 << bits) - 1
        return address >> (12 + bits * UInt64(level - 1)) & mask
    }

    func isPresent(_ entry: UInt64) -> Bool { entry & (ept == nil ? 1 : 7) != 0 }
    /// 0: there is none.
    var accessed: UInt64 { ept.map { $0.accessDirty ? 1 << 8 : 0 } ?? 1 << 5 }
    /// 0: there is none.
    var dirty: UInt64 { accessed << 1 }
    private static let large: UInt64 = 1 << 7
    private static let wideFrame: UInt64 = 0x000f_ffff_ffff_f000

    /// Without paging extensions only PDEs can be large, and only with CR4.PSE. Kernel: `is_last_gpte`.
    func isLeaf(_ entry: UInt64, _ level: UInt8) -> Bool {
        if level == 1 { return true }
        guard entry & Self.large != 0 else { return false }
        switch levels {
        case 2: return level == 2 && registers.pageSizeExtension
        case 3: return level == 2
        default: return level == 2 || level == 3
        }
    }

    /// Kernel: `FNAME(gpte_access)`. Spec: x86 1.3.
    func rights(_ entry: UInt64) -> Rights {
        if ept != nil { return EPTTables.rights(entry) }
        var rights: Rights = []
        if entry & 2 != 0 { rights.insert(.write) }
        if entry & 4 != 0 { rights.insert(.user) }
        if !(registers.physicalAddressExtension && registers.noExecute && entry >> 63 != 0) { rights.insert(.execute) }
        return rights
    }

    /// The table or the first page that the entry names. Kernel: `gpte_to_gfn`, `gpte_to_gfn_lvl`, `pse36_gfn_delta`.
    func frame(_ entry: UInt64, _ level: UInt8) -> GuestFrame {
        let leaf = level > 1 && isLeaf(entry, level)
        guard isWide else {
            guard leaf else { return GuestFrame(entry >> 12 & 0xf_ffff) }
            // PSE-36: bits 16:13 are the address's 35:32.
            return GuestFrame(entry >> 22 & 0x3ff).offset(by: 10, plus: entry >> 13 & 0xf)
        }
        let frame = (entry & Self.wideFrame) >> 12
        return GuestFrame(leaf ? frame & ~(PageLevel(level).frames - 1) : frame)
    }

    /// Whether the rights that the entries give together allow the access. Kernel: `permission_fault`.
    func permits(_ code: FaultCode, _ rights: Rights) -> Bool {
        if ept != nil {
            // R is asked for like the others.
            return rights.isSuperset(of: code.rightsOfEPT)
        }
        let user = code.contains(.user)
        if code.contains(.fetch) {
            if !rights.contains(.execute) { return false }
            if !user && rights.contains(.user) && registers.smep { return false }
        } else if !user && rights.contains(.user) && registers.smap {
            return false
        }
        if user && !rights.contains(.user) { return false }
        if code.contains(.write), !rights.contains(.write) { return !user && !registers.writeProtect }
        return true
    }

    /// What of an access the guest's own fault tells. Kernel: the end of `FNAME(walk_addr_generic)`. Spec: x86 4.6.
    var reported: FaultCode {
        let fetches =
            ept != nil || registers.noExecute && registers.physicalAddressExtension || registers.smep
        return fetches ? [.write, .user, .fetch] : [.write, .user]
    }

    /// Present, accessed and free of reserved bits: of level 1. Kernel: `FNAME(prefetch_invalid_gpte)`.
    func isUsable(_ entry: UInt64) -> Bool {
        isPresent(entry) && entry & accessed == accessed && !hasReservedBit(entry, 1)
    }

    /// Of EPT, an entry that permits nothing is none.
    func isNothing(_ rights: Rights) -> Bool { ept != nil && rights.isDisjoint(with: [.user, .execute]) }

    /// A clean page must fault when it is written, so that the guest's D gets set. Kernel: `FNAME(protect_clean_gpte)`.
    func withoutWriteIfClean(_ rights: Rights, _ entry: UInt64) -> Rights {
        dirty != 0 && entry & dirty == 0 ? rights.subtracting(.write) : rights
    }

    /// Bytes that an entry of `level` spans, as a count of pages.
    func pages(_ level: UInt8) -> UInt64 { 1 << (indexBits * UInt64(level - 1)) }

    /// Whether a bit is set that the processor wants clear. Kernel: `is_rsvd_bits_set`. Spec: x86 1.2.
    func hasReservedBit(_ entry: UInt64, _ level: UInt8) -> Bool {
        if let ept { return ept.hasReservedBit(entry, level, isLeaf: isLeaf(entry, level)) }
        return entry & reserved(entry, level) != 0
    }

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
