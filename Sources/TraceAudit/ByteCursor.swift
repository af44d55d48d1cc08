import Glibc

/// A reading position in the bytes of one line.
///
/// Parsing works on the read buffer itself: a `String` for each line would cost more than everything else together.
/// A cursor is only valid inside the call that handed out the buffer.
struct ByteCursor {
    private(set) var position: UnsafePointer<UInt8>
    let end: UnsafePointer<UInt8>

    init(_ start: UnsafePointer<UInt8>, _ end: UnsafePointer<UInt8>) {
        position = start
        self.end = end
    }

    var isAtEnd: Bool { position == end }
    var count: Int { end - position }
    var next: UInt8? { position == end ? nil : position.pointee }

    /// The bytes from here to the end, as text; malformed UTF-8 is repaired.
    var text: String { String(decoding: UnsafeBufferPointer(start: position, count: count), as: UTF8.self) }

    mutating func advance(_ distance: Int = 1) { position += min(distance, count) }

    mutating func skipSpaces() {
        while position != end, position.pointee == UInt8(ascii: " ") { position += 1 }
    }

    /// Steps over `literal` if it stands here.
    mutating func skip(_ literal: StaticString) -> Bool {
        let length = literal.utf8CodeUnitCount
        guard count >= length, memcmp(position, literal.utf8Start, length) == 0 else { return false }
        position += length
        return true
    }

    /// Whether `literal` stands here; the position stays.
    func starts(with literal: StaticString) -> Bool {
        var copy = self
        return copy.skip(literal)
    }

    /// The bytes up to the next blank or the end, which are stepped over.
    mutating func word() -> ByteCursor {
        let start = position
        while position != end, position.pointee != UInt8(ascii: " ") { position += 1 }
        return ByteCursor(start, position)
    }

    /// The bytes up to `literal`; steps over both.
    mutating func upTo(_ literal: StaticString) -> ByteCursor? {
        var probe = self
        while !probe.isAtEnd {
            let here = probe.position
            if probe.skip(literal) {
                let part = ByteCursor(position, here)
                self = probe
                return part
            }
            probe.advance()
        }
        return nil
    }

    /// A decimal number without sign, at least one digit, no overflow.
    mutating func decimal() -> UInt64? {
        let start = position
        var value: UInt64 = 0
        while position != end {
            let digit = position.pointee &- UInt8(ascii: "0")
            guard digit < 10 else { break }
            let (product, overflow) = value.multipliedReportingOverflow(by: 10)
            let (sum, carry) = product.addingReportingOverflow(UInt64(digit))
            guard !overflow, !carry else { return nil }
            value = sum
            position += 1
        }
        return position == start ? nil : value
    }

    /// A decimal number with an optional minus.
    mutating func signedDecimal() -> Int64? {
        let negative = skip("-")
        guard let value = decimal(), value <= UInt64(Int64.max) else { return nil }
        return negative ? -Int64(value) : Int64(value)
    }

    /// A hexadecimal number, with or without `0x`, at most 16 digits that count.
    mutating func hexadecimal() -> UInt64? {
        _ = skip("0x")
        let start = position
        var value: UInt64 = 0
        while position != end, let digit = Self.hexadecimalDigit(position.pointee) {
            guard value >> 60 == 0 else { return nil }
            value = value << 4 | UInt64(digit)
            position += 1
        }
        return position == start ? nil : value
    }

    /// `literal` and a hexadecimal number after it.
    mutating func hexadecimal(after literal: StaticString) -> UInt64? {
        guard skip(literal) else { return nil }
        return hexadecimal()
    }

    /// `literal` and a decimal number after it.
    mutating func decimal(after literal: StaticString) -> UInt64? {
        guard skip(literal) else { return nil }
        return decimal()
    }

    private static func hexadecimalDigit(_ byte: UInt8) -> UInt8? {
        switch byte {
        case UInt8(ascii: "0")...UInt8(ascii: "9"): byte - UInt8(ascii: "0")
        case UInt8(ascii: "a")...UInt8(ascii: "f"): byte - UInt8(ascii: "a") + 10
        case UInt8(ascii: "A")...UInt8(ascii: "F"): byte - UInt8(ascii: "A") + 10
        default: nil
        }
    }
}

/// Fields that are written as `key=value`, wherever they stand.
extension ByteCursor {
    /// The word behind ` key=`.
    func value(of key: StaticString) -> ByteCursor? {
        var cursor = self
        while !cursor.isAtEnd {
            cursor.skipSpaces()
            var word = cursor.word()
            if word.skip(key), word.skip("=") { return word }
        }
        return nil
    }

    /// The number behind ` key=`, decimal or `0x` hexadecimal.
    func number(of key: StaticString) -> Int64? {
        guard var cursor = value(of: key) else { return nil }
        if cursor.starts(with: "0x") {
            guard let value = cursor.hexadecimal() else { return nil }
            return Int64(bitPattern: value)
        }
        return cursor.signedDecimal()
    }

    func unsigned(of key: StaticString) -> UInt64? { number(of: key).map { UInt64(bitPattern: $0) } }
}
