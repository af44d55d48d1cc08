/// The rules that one entry keeps or breaks on its own. Spec: x86 X18, X19, X22 to X24, X26; 1.1, 1.2, 1.4.
extension MachineAudit {
    /// Checks an entry that was just written; returns whether it is a present leaf.
    @discardableResult
    func checkEntry(_ entry: DecodedEntry, frame: UInt64, at moment: Moment) -> Bool {
        guard !entry.isEmpty, !entry.isFrozen, !entry.isMMIO else { return false }
        rules.check(
            .mmuPresent, entry.isPresent, at: moment,
            "entry \(hex(entry.raw)) for gfn \(hex(frame)), level \(entry.level), is set without bit 11: only empty, "
                + "frozen and MMIO entries are not MMU-present")
        guard entry.isPresent else { return false }
        checkReserved(entry, frame: frame, at: moment)
        checkSuppressed(entry, frame: frame, at: moment)
        guard entry.isLeaf else { return false }
        checkWritability(entry, frame: frame, at: moment)
        checkAlignment(entry, frame: frame, at: moment)
        if entry.isAccessTracked { checkTracking(entry, frame: frame, at: moment) }
        return true
    }

    private func checkWritability(_ entry: DecodedEntry, frame: UInt64, at moment: Moment) {
        let legal =
            (!entry.canWrite || entry.mmuWritable) && (!entry.mmuWritable || entry.hostWritable)
        rules.check(
            .writability, legal, at: moment,
            "leaf \(hex(entry.raw)) for gfn \(hex(frame)), level \(entry.level), has W=\(entry.canWrite ? 1 : 0) "
                + "MMU-writable=\(entry.mmuWritable ? 1 : 0) host-writable=\(entry.hostWritable ? 1 : 0); legal are "
                + "111, 011, 001 and 000 (W, MMU-, host-writable)")
    }

    private func checkAlignment(_ entry: DecodedEntry, frame: UInt64, at moment: Moment) {
        guard entry.level > 1, entry.level <= 3 else { return }
        let mask = pages(level: entry.level) - 1
        rules.check(
            .alignment, frame & mask == 0 && entry.hostFrame & mask == 0, at: moment,
            "level \(entry.level) leaf maps gfn \(hex(frame)) to pfn \(hex(entry.hostFrame)): both must be multiples "
                + "of \(hex(mask + 1)) frames")
    }

    private func checkReserved(_ entry: DecodedEntry, frame: UInt64, at moment: Moment) {
        let bits = reservedBits(entry)
        rules.check(
            .reservedBits, bits == nil, at: moment,
            "entry \(hex(entry.raw)) for gfn \(hex(frame)), level \(entry.level), has \(bits ?? "") set, which "
                + "hardware reserves or KVM never writes in the \(entry.format.rawValue) format")
    }

    /// Names what is reserved; nil if nothing is. The host's physical address width is not in a recording, so below
    /// bit 51 an address bit can be judged only against the requested pfn.
    private func reservedBits(_ entry: DecodedEntry) -> String? {
        let raw = entry.raw & ~recording.encryptionBit
        func named(_ mask: UInt64) -> String? {
            let set = raw & mask
            guard set != 0 else { return nil }
            return (0..<64).filter { set >> UInt64($0) & 1 != 0 }.map { "bit \($0)" }.joined(separator: ", ")
        }
        if entry.level > 3, raw & EntryBits.large != 0 { return "bit 7" }
        switch entry.format {
        case .legacy:
            return named(0x7ff << 52 | 1 << 51)
        case .extended:
            if let found = named(1 << 55 | 0xf << 59 | 1 << 51) { return found }
            if raw & 0x3 == 0x2 { return "W without R" }
            guard entry.isLeaf else { return named(0xf << 3 & ~EntryBits.large) }
            let memoryType = raw >> 3 & 7
            return [2, 3, 7].contains(memoryType) ? "memory type \(memoryType)" : nil
        }
    }

    /// Kernels before 6.10 do not suppress #VE: the rule holds from the first entry that shows bit 63.
    private func checkSuppressed(_ entry: DecodedEntry, frame: UInt64, at moment: Moment) {
        guard entry.format == .extended else { return }
        guard recording.format.suppressSeen else {
            rules.skip(.suppressedException, "no entry so far had bit 63: an older kernel, perhaps")
            return
        }
        rules.check(
            .suppressedException, entry.raw & EntryBits.top != 0, at: moment,
            "EPT entry \(hex(entry.raw)) for gfn \(hex(frame)) lacks bit 63: a #VE could reach the guest")
    }

    private func checkTracking(_ entry: DecodedEntry, frame: UInt64, at moment: Moment) {
        let saved = entry.raw & (1 << 54 | 1 << 56) != 0
        rules.check(
            .accessTracking, entry.accessedDirtyType == 1 && !entry.accessed && saved, at: moment,
            "leaf \(hex(entry.raw)) for gfn \(hex(frame)) has no permission, so it is access-tracked, but type is "
                + "\(entry.accessedDirtyType) (should be 1), A is \(entry.accessed ? 1 : 0) (should be 0), saved "
                + "permissions are \(saved ? "there" : "missing")")
    }
}
