/// Counts events by name, the understood and the unknown, without a `String` for each line.
///
/// Open addressing over the name's bytes. The number of distinct names is bounded: a damaged recording can hold
/// millions; what goes beyond is counted together.
struct EventNames {
    private struct Entry {
        var name: [UInt8]
        var kind: EventKind?
        var count: UInt64 = 0
        var malformed: UInt64 = 0
    }

    private var entries: [Entry] = []
    private var table = [Int32](repeating: -1, count: TraceAuditLimits.eventNames * 4)
    private(set) var overflow: UInt64 = 0

    init() {
        for kind in EventKind.allCases {
            let name = Array(kind.rawValue.utf8)
            name.withUnsafeBufferPointer { bytes in
                guard let base = bytes.baseAddress else { return }
                _ = insert(ByteCursor(base, base + bytes.count), kind: kind)
            }
        }
    }

    /// Counts one event; the index is for ``kind(_:)`` and ``countMalformed(_:)``, nil when there are too many names.
    mutating func count(_ name: ByteCursor) -> Int? {
        guard let index = find(name) ?? insert(name, kind: nil) else {
            overflow += 1
            return nil
        }
        entries[index].count += 1
        return index
    }

    func kind(_ index: Int) -> EventKind? { entries[index].kind }

    mutating func countMalformed(_ index: Int) { entries[index].malformed += 1 }

    /// Events by name in alphabetical order; those that never occurred are left out.
    func counts(understood: Bool) -> [EventCount] {
        entries.filter { $0.count > 0 && ($0.kind != nil) == understood }
            .map {
                EventCount(name: String(decoding: $0.name, as: UTF8.self), count: $0.count, malformed: $0.malformed)
            }
            .sorted { $0.name < $1.name }
    }

    private func slot(_ name: ByteCursor) -> Int {
        var hash: UInt64 = 0xcbf2_9ce4_8422_2325
        var cursor = name.position
        while cursor != name.end {
            hash = (hash ^ UInt64(cursor.pointee)) &* 0x100_0000_01b3
            cursor += 1
        }
        return Int(truncatingIfNeeded: hash ^ hash >> 29) & (table.count - 1)
    }

    private func find(_ name: ByteCursor) -> Int? {
        var index = slot(name)
        while table[index] >= 0 {
            let entry = Int(table[index])
            if matches(entries[entry].name, name) { return entry }
            index = (index + 1) & (table.count - 1)
        }
        return nil
    }

    private func matches(_ name: [UInt8], _ bytes: ByteCursor) -> Bool {
        guard name.count == bytes.count else { return false }
        for offset in 0..<name.count where name[offset] != bytes.position[offset] { return false }
        return true
    }

    private mutating func insert(_ name: ByteCursor, kind: EventKind?) -> Int? {
        guard entries.count < TraceAuditLimits.eventNames, name.count <= 128 else { return nil }
        var index = slot(name)
        while table[index] >= 0 { index = (index + 1) & (table.count - 1) }
        table[index] = Int32(entries.count)
        entries.append(
            Entry(name: Array(UnsafeBufferPointer(start: name.position, count: name.count)), kind: kind))
        return entries.count - 1
    }
}
