/// One message in the wire format of Protocol Buffers, as far as Perfetto's traces need it: fields of whole numbers
/// (varints) and fields with a length (texts and messages). A field is a key, `number << 3 | kind`, and its value.
struct ProtobufMessage {
    private(set) var bytes: [UInt8] = []

    mutating func add(_ field: Int, _ value: UInt64) {
        key(field, kind: 0)
        varint(value)
    }

    /// A negative number takes its two's complement, as the types `int32` and `int64` do.
    mutating func add(_ field: Int, _ value: Int) { add(field, UInt64(bitPattern: Int64(value))) }

    mutating func add(_ field: Int, _ text: String) { add(field, Array(text.utf8)) }

    mutating func add(_ field: Int, _ message: ProtobufMessage) { add(field, message.bytes) }

    private mutating func add(_ field: Int, _ content: [UInt8]) {
        key(field, kind: 2)
        varint(UInt64(content.count))
        bytes += content
    }

    private mutating func key(_ field: Int, kind: UInt64) { varint(UInt64(field) << 3 | kind) }

    /// Seven bits a byte, the lowest first; the top bit says that more follow.
    private mutating func varint(_ value: UInt64) {
        var rest = value
        while rest >= 0x80 {
            bytes.append(UInt8(truncatingIfNeeded: rest) | 0x80)
            rest >>= 7
        }
        bytes.append(UInt8(rest))
    }
}
