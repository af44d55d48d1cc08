// How numbers, sizes and places are written.

/// A place in a region, as written.
struct RegionPlace {
    var region: String
    var offset: UInt64
}

/// A guest address, as written.
enum GuestPlace {
    case address(UInt64)
    case region(RegionPlace)
}

enum Quantity {
    static let units: [(name: String, bytes: UInt64)] = [("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30)]

    /// The same rules for editors, as a regular expression.
    static let numberPattern = "(0x[0-9a-fA-F]+(_[0-9a-fA-F]+)*|0|[1-9][0-9]*(_[0-9]+)*)"
    static let sizePattern = numberPattern + "( ?(KiB|MiB|GiB))?"
    static let namePattern = "[A-Za-z][A-Za-z0-9_-]*"
    static let regionPlacePattern = namePattern + "( ?\\+ ?" + sizePattern + ")?"

    /// `4096`, `0x1000`, `1_000_000`. A leading zero is refused: YAML 1.1 reads such numbers as octal.
    static func number(_ text: some StringProtocol) -> UInt64? {
        let isHex = text.hasPrefix("0x")
        let digits = isHex ? text.dropFirst(2)[...] : text[...]
        let groups = digits.split(separator: "_", omittingEmptySubsequences: false)
        guard !groups.isEmpty, groups.allSatisfy({ !$0.isEmpty }) else { return nil }
        let joined = groups.joined()
        if isHex {
            guard joined.utf8.allSatisfy(isHexDigit) else { return nil }
            return UInt64(joined, radix: 16)
        }
        return Vocabulary.decimal(joined)
    }

    private static func isHexDigit(_ byte: UInt8) -> Bool {
        (0x30...0x39).contains(byte) || (0x41...0x46).contains(byte) || (0x61...0x66).contains(byte)
    }

    /// `64 KiB`, `2MiB`, or a number of bytes.
    static func size(_ text: some StringProtocol) -> UInt64? {
        for unit in units where text.hasSuffix(unit.name) {
            var digits = text.dropLast(unit.name.count)
            if digits.last == " " { digits = digits.dropLast() }
            guard let count = number(digits) else { return nil }
            let (bytes, overflow) = count.multipliedReportingOverflow(by: unit.bytes)
            return overflow ? nil : bytes
        }
        return number(text)
    }

    static func isName(_ text: some StringProtocol) -> Bool {
        guard let first = text.utf8.first, isLetter(first), text.utf8.count <= 64 else { return false }
        return text.utf8.allSatisfy { isLetter($0) || (0x30...0x39).contains($0) || $0 == 0x2d || $0 == 0x5f }
    }

    private static func isLetter(_ byte: UInt8) -> Bool {
        (0x41...0x5a).contains(byte) || (0x61...0x7a).contains(byte)
    }

    /// `ram`, `ram+0x1000`, `ram + 2 MiB`.
    static func regionPlace(_ text: String) -> RegionPlace? {
        guard let plus = text.firstIndex(of: "+") else {
            return isName(text) ? RegionPlace(region: text, offset: 0) : nil
        }
        var name = text[..<plus]
        var rest = text[text.index(after: plus)...]
        if name.last == " " { name = name.dropLast() }
        if rest.first == " " { rest = rest.dropFirst() }
        guard isName(name), let offset = size(rest) else { return nil }
        return RegionPlace(region: String(name), offset: offset)
    }

    static func guestPlace(_ text: String) -> GuestPlace? {
        if let address = number(text) { return .address(address) }
        return regionPlace(text).map(GuestPlace.region)
    }

    static func hex(_ value: UInt64) -> String { "0x" + String(value, radix: 16) }

    /// A size as a person would write it.
    static func shown(_ bytes: UInt64) -> String {
        for unit in units.reversed() where bytes >= unit.bytes && bytes % unit.bytes == 0 {
            return "\(bytes / unit.bytes) \(unit.name)"
        }
        return bytes == 1 ? "1 byte" : "\(bytes) bytes"
    }
}
