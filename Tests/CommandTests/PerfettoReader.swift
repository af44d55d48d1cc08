import Foundation
import Testing

/// Reads a Perfetto trace back, with a table of its own, and checks what every trace must keep: each packet parses to its
/// last byte, times of a track never go back, each slice that begins ends and none ends twice, and every event's track
/// has been described.
struct PerfettoReader {
    struct Slice: Equatable {
        var name: String
        var track: String
        var begin: UInt64
        var end: UInt64
        var facts: [String: String]
        /// Slices of the track around it.
        var depth: Int
    }
    struct Instant: Equatable {
        var name: String
        var track: String
        var time: UInt64
        var facts: [String: String]
    }
    struct Thread: Equatable {
        var pid: UInt64
        var tid: UInt64
        var name: String
    }

    private(set) var slices: [Slice] = []
    private(set) var instants: [Instant] = []
    /// Values of each counter, in the file's order.
    private(set) var counters: [String: [(time: UInt64, value: Int64)]] = [:]
    private(set) var threads: [Thread] = []
    private(set) var processes: [String] = []

    private var names: [UInt64: String] = [:]
    private var latest: [UInt64: UInt64] = [:]
    private var open: [UInt64: [Int]] = [:]

    struct Damage: Error { var what: String }

    init(path: String) throws { try self.init(Array(Data(contentsOf: URL(fileURLWithPath: path)))) }

    init(_ bytes: [UInt8]) throws {
        for field in try Self.fields(bytes[...]) {
            guard case .bytes(1, let packet) = field else { throw Damage(what: "no packet") }
            try take(try Self.fields(packet))
        }
        for (track, slices) in open where !slices.isEmpty {
            throw Damage(what: "\(slices.count) slices of \(names[track] ?? "?") never end")
        }
    }

    func slices(_ name: String) -> [Slice] { slices.filter { $0.name == name } }
    func instants(_ name: String) -> [Instant] { instants.filter { $0.name == name } }
    func last(_ counter: String) -> Int64? { counters[counter]?.last?.value }

    // MARK: the wire format

    private enum Field {
        case number(Int, UInt64)
        case bytes(Int, ArraySlice<UInt8>)
    }

    private static func fields(_ bytes: ArraySlice<UInt8>) throws -> [Field] {
        var rest = bytes
        var fields: [Field] = []
        while !rest.isEmpty {
            let key = try varint(&rest)
            switch key & 7 {
            case 0: fields.append(.number(Int(key >> 3), try varint(&rest)))
            case 2:
                let length = Int(try varint(&rest))
                guard length <= rest.count else { throw Damage(what: "a field is longer than its message") }
                fields.append(.bytes(Int(key >> 3), rest.prefix(length)))
                rest = rest.dropFirst(length)
            default: throw Damage(what: "a field of kind \(key & 7)")
            }
        }
        return fields
    }

    private static func varint(_ bytes: inout ArraySlice<UInt8>) throws -> UInt64 {
        var value: UInt64 = 0
        for position in 0..<10 {
            guard let byte = bytes.popFirst() else { throw Damage(what: "a number without an end") }
            value |= UInt64(byte & 0x7f) << (7 * UInt64(position))
            if byte & 0x80 == 0 { return value }
        }
        throw Damage(what: "a number that is too long")
    }

    private static func numbers(_ fields: [Field]) -> [Int: UInt64] {
        var numbers: [Int: UInt64] = [:]
        for case .number(let field, let value) in fields { numbers[field] = value }
        return numbers
    }

    private static func texts(_ fields: [Field]) -> [Int: String] {
        var texts: [Int: String] = [:]
        for case .bytes(let field, let value) in fields { texts[field] = String(decoding: value, as: UTF8.self) }
        return texts
    }

    // MARK: packets

    /// TracePacket: 8 timestamp, 10 sequence, 11 event, 13 flags, 60 track.
    private mutating func take(_ packet: [Field]) throws {
        let numbers = Self.numbers(packet)
        guard numbers[10] == 1 else { throw Damage(what: "a packet of no sequence") }
        if names.isEmpty, numbers[13] != 1 { throw Damage(what: "the sequence does not say that it begins") }
        for case .bytes(let field, let message) in packet {
            switch field {
            case 11:
                guard let time = numbers[8] else { throw Damage(what: "an event without a time") }
                try event(try Self.fields(message), at: time)
            case 60: try track(try Self.fields(message))
            default: throw Damage(what: "field \(field) in a packet")
            }
        }
    }

    /// TrackDescriptor: 1 uuid, 2 name, 3 process (1 pid, 6 name), 4 thread (1 pid, 2 tid, 5 name), 5 parent, 8 counter.
    private mutating func track(_ fields: [Field]) throws {
        let numbers = Self.numbers(fields)
        guard let uuid = numbers[1], uuid != 0, names[uuid] == nil else { throw Damage(what: "a track's number") }
        if let parent = numbers[5], names[parent] == nil { throw Damage(what: "a parent that is not there") }
        var name = Self.texts(fields)[2]
        for case .bytes(let field, let message) in fields {
            if field == 3 {
                name = Self.texts(try Self.fields(message))[6]
                processes.append(name ?? "?")
            } else if field == 4 {
                let inner = try Self.fields(message)
                name = Self.texts(inner)[5]
                let ids = Self.numbers(inner)
                guard let pid = ids[1], let tid = ids[2], let name else { throw Damage(what: "a thread without ids") }
                threads.append(Thread(pid: pid, tid: tid, name: name))
            } else if field == 8, let name {
                guard counters[name] == nil else { throw Damage(what: "two counters \(name)") }
                counters[name] = []
            }
        }
        guard let name else { throw Damage(what: "a track without a name") }
        names[uuid] = name
    }

    /// TrackEvent: 4 annotation, 9 type, 11 track, 22 category, 23 name, 30 counter value.
    private mutating func event(_ fields: [Field], at time: UInt64) throws {
        let numbers = Self.numbers(fields)
        guard let uuid = numbers[11], let track = names[uuid] else { throw Damage(what: "an event of no track") }
        guard time >= latest[uuid] ?? 0 else { throw Damage(what: "time goes back on \(track)") }
        latest[uuid] = time
        let name = Self.texts(fields)[23] ?? ""
        switch numbers[9] {
        case 1:
            guard !name.isEmpty else { throw Damage(what: "a slice without a name") }
            open[uuid, default: []].append(slices.count)
            slices.append(
                Slice(
                    name: name, track: track, begin: time, end: 0, facts: try Self.facts(fields),
                    depth: open[uuid, default: []].count - 1))
        case 2:
            guard let index = open[uuid]?.popLast() else { throw Damage(what: "an end without a begin on \(track)") }
            slices[index].end = time
        case 3: instants.append(Instant(name: name, track: track, time: time, facts: try Self.facts(fields)))
        case 4:
            guard let value = numbers[30], counters[track] != nil else { throw Damage(what: "a value of no counter") }
            counters[track]?.append((time, Int64(bitPattern: value)))
        default: throw Damage(what: "an event of type \(numbers[9] ?? 0)")
        }
    }

    /// DebugAnnotation: 3 number, 6 text, 7 address, 10 name.
    private static func facts(_ fields: [Field]) throws -> [String: String] {
        var facts: [String: String] = [:]
        for case .bytes(4, let message) in fields {
            let inner = try Self.fields(message)
            let numbers = Self.numbers(inner)
            let texts = Self.texts(inner)
            guard let name = texts[10] else { throw Damage(what: "a fact without a name") }
            facts[name] = texts[6] ?? numbers[3].map { "\($0)" } ?? numbers[7].map { "0x" + String($0, radix: 16) }
        }
        return facts
    }
}
