// A plan as bytes, for machines without a file system or a YAML parser: `Scenario` encodes on the host, bare metal
// decodes. Layout: the letters "FLPN", a version, then the plan's fields in the order of their declaration. Numbers are
// LEB128 (seven bits a byte, least significant first), truth values one byte, lists a count and their elements, cases
// of an enum their code and then their payload. A reader of another version refuses; there is no skipping of unknown
// fields, since both ends are built from one source tree.
//
// Bytes are bad input like any other: every read is bounds-checked, and a decoded plan refers only to regions and
// vCPUs that it has. It never traps on what it reads.

/// Why bytes are not a plan.
public struct PlanDecodingError: Error, Sendable, Equatable {
    public enum Reason: UInt8, Sendable {
        /// The first four bytes are not "FLPN".
        case notAPlan
        /// The encoding is of another version than this reader's.
        case unknownVersion
        /// The bytes end before the plan does.
        case truncated
        /// A number doesn't fit its field, or a code means nothing.
        case badValue
        /// A region or a vCPU that the plan doesn't have.
        case badReference
        /// Bytes follow the plan.
        case trailingBytes
    }
    public var reason: Reason
    /// Index of the byte at which it was seen.
    public var offset: Int
    public init(_ reason: Reason, at offset: Int) {
        self.reason = reason
        self.offset = offset
    }
}

extension Plan {
    static let magic: [UInt8] = [0x46, 0x4c, 0x50, 0x4e]
    static let encodingVersion: UInt8 = 3

    public func encoded() -> [UInt8] {
        var writer = PlanWriter()
        writer.bytes = Plan.magic
        writer.bytes.append(Plan.encodingVersion)
        writer.plan(self)
        return writer.bytes
    }

    public init(decoding bytes: [UInt8]) throws(PlanDecodingError) {
        var reader = PlanReader(bytes)
        for letter in Plan.magic where try reader.byte() != letter {
            throw PlanDecodingError(.notAPlan, at: reader.offset - 1)
        }
        guard try reader.byte() == Plan.encodingVersion else {
            throw PlanDecodingError(.unknownVersion, at: reader.offset - 1)
        }
        self = try reader.plan()
        guard reader.offset == bytes.count else { throw PlanDecodingError(.trailingBytes, at: reader.offset) }
    }
}
