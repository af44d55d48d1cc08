/// Entries that are sound for the most part, present and of a table that is there; each bit may be otherwise. Functions of
/// 64 random bits and an address.
enum RandomEntry {
    /// Of 8 bytes, ordinary. Nil: any 64 bits at all.
    static func wide(_ bits: UInt64, _ address: UInt64) -> UInt64? {
        var entry = address | bits & 0xf7f | 1
        if bits >> 12 & 7 == 0 { entry |= 1 << 7 }
        if bits >> 15 & 7 == 0 { entry |= bits & 0xfff0_0000_0000_0000 }
        if bits >> 43 & 3 != 0 { entry |= 6 }
        if bits >> 19 & 31 == 0 { entry &= ~1 }
        if bits >> 24 & 15 == 0 { entry ^= 1 << (bits >> 28 & 63) }
        // A large leaf's lower address bits are reserved.
        if entry & 0x80 != 0, bits >> 34 & 3 != 0 { entry &= bits >> 36 & 1 == 0 ? ~0x1f_f000 : ~0x3fff_f000 }
        return bits >> 37 & 63 == 0 ? nil : entry
    }

    /// Of 4 bytes.
    static func narrow(_ bits: UInt64, _ address: UInt64) -> UInt64 {
        var entry = address & 0xffff_f000 | bits & 0xf7f | 1
        if bits >> 12 & 7 == 0 { entry = entry & ~0x3f_f000 | 1 << 7 | (bits >> 40 & 0x1_e000) }
        if bits >> 15 & 15 == 0 { entry &= ~1 }
        if bits >> 19 & 15 == 0 { entry ^= 1 << (bits >> 23 & 31) }
        return entry & 0xffff_ffff
    }

    static func ept(_ bits: UInt64, _ address: UInt64) -> UInt64 {
        var entry = address | bits & 0xf00 | 7
        // A leaf has a memory type; a table has none.
        if bits >> 12 & 3 == 0 { entry |= 0x30 | (bits >> 14 & 1) << 7 }
        if entry & 0x80 != 0 { entry &= ~0x1f_f000 }
        if bits >> 15 & 15 == 0 { entry ^= bits >> 44 & 7 }
        if bits >> 21 & 7 == 0 { entry |= bits & 0xfff0_0000_0000_0000 }
        if bits >> 24 & 15 == 0 { entry ^= 1 << (bits >> 28 & 63) }
        return entry
    }
}
