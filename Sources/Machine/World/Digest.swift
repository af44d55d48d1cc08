import Audit

extension RunOutcome {
    /// One line that says how a run ended and, by a hash of every event in order, that it went the same way: for
    /// comparing runs of one plan on different builds of the core. ASCII bytes, no line break.
    public func digest() -> [UInt8] {
        var line = DigestLine()
        line.add("architecture ")
        line.add(UInt64(architecture.rawValue))
        line.add(" policy ")
        line.add(UInt64(policy.rawValue))
        line.add(isClean ? " ok" : " not-ok")
        line.add(" steps ")
        line.add(UInt64(steps.count))
        line.add(" unexpected ")
        line.add(UInt64(unexpected.count))
        line.add(" findings")
        for finding in findings {
            line.add(" ")
            line.add(UInt64(finding.invariant.rawValue))
        }
        line.add(" held ")
        line.add(UInt64(holdings.count))
        line.add(" events ")
        line.add(UInt64(events.count))
        line.add(" hash ")
        line.add(hash)
        return line.bytes
    }

    /// FNV-1a over the numbers of all events and statistics.
    private var hash: UInt64 {
        var hash: UInt64 = 0xcbf2_9ce4_8422_2325
        func mix(_ value: UInt64) {
            hash = (hash ^ value) &* 0x100_0000_01b3
            hash ^= hash >> 29
        }
        for event in events {
            mix(UInt64(event.kind.rawValue))
            mix(UInt64(event.holder.rawValue))
            mix(UInt64(event.level))
            mix(event.frame)
            mix(event.guest)
            mix(event.value)
            mix(event.extra)
        }
        for statistic in statistics { mix(statistic.value) }
        return hash
    }
}

/// Bytes of a line, without `String`.
private struct DigestLine {
    var bytes: [UInt8] = []

    mutating func add(_ text: StaticString) {
        for i in 0..<text.utf8CodeUnitCount { bytes.append(text.utf8Start[i]) }
    }

    mutating func add(_ number: UInt64) {
        var digits: [UInt8] = []
        var rest = number
        repeat {
            digits.append(UInt8(48 + rest % 10))
            rest /= 10
        } while rest > 0
        for digit in digits.reversed() { bytes.append(digit) }
    }
}
