/// What all machines of one recording share: the host's entry format, the rules, the memory limit.
final class RecordingState {
    let rules = RuleBook()
    let budget = EntryBudget()
    var format = FormatVotes()
    /// Address bit that memory encryption adds to every entry, as a mask over the entry; 0 if none.
    var encryptionBit: UInt64 = 0
    var comparedRequests = false
    /// Guest pages that may still be looked at.
    var guestPages = TraceAuditLimits.guestPages
    var hasNotifierEvents = false
    var hasEmulationEvents = false
    private(set) var notes: [String] = []

    /// Adds a note once.
    func note(_ text: String) {
        guard notes.count < TraceAuditLimits.listed, !notes.contains(text) else { return }
        notes.append(text)
    }

    /// A host with memory encryption shows one address bit from 43 up in every entry that no requested pfn has. Only
    /// the first comparison may teach it; later ones are judged by it.
    func learnEncryptionBit(installed: UInt64, requested: UInt64) {
        guard !comparedRequests else { return }
        comparedRequests = true
        let difference = installed ^ requested
        guard difference.nonzeroBitCount == 1, installed & difference != 0, difference >= 1 << 31 else { return }
        encryptionBit = difference << 12
        note("address bit \(encryptionBit.trailingZeroBitCount) is in every entry: taken for memory encryption")
    }
}

/// A sum that stays at the largest value: a damaged recording can hold any number.
func saturating(_ left: UInt64, _ right: UInt64) -> UInt64 {
    let (sum, overflow) = left.addingReportingOverflow(right)
    return overflow ? .max : sum
}

/// `0x` and lower-case digits, as KVM's own events print them.
func hex(_ value: UInt64) -> String { "0x" + String(value, radix: 16) }
