// A snapshot's file as bytes. Numbers are little-endian. Head: "FLSS", a version (4 bytes), the number of slots and of
// stretches (8 bytes each), the slots (id, pages: 8 bytes each), the stretches of pages that are written, ascending (first
// place, pages: 8 bytes each), zeros up to a multiple of 4096. Data: every page of every slot at its place, and zeros where
// nothing is written. Whoever writes it to a disk seeks over those; what a hole is, the stretches say, not the disk.

import Frames

extension SnapshotFile {
    static let magic: [UInt8] = [0x46, 0x4c, 0x53, 0x53]
    static let version: UInt32 = 1

    /// Why bytes are not a snapshot.
    public enum DecodingError: Error, Sendable, Equatable {
        case notASnapshot
        case unknownVersion
        case truncated
        /// A slot twice, a stretch outside of the slots, or stretches out of order.
        case badTable
    }

    /// All pages of all slots.
    public var places: UInt64 { slots.reduce(0) { $0 + $1.pages } }

    /// Where the data begins: bytes.
    public var dataOffset: UInt64 {
        let head = UInt64(24 + 16 * (slots.count + stretches.count))
        return (head + pageSize - 1) / pageSize * pageSize
    }

    /// Stretches of places that are written.
    public var stretches: [Range<UInt64>] {
        var found: [Range<UInt64>] = []
        for page in pages {
            if let last = found.last, last.upperBound == page.place {
                found[found.count - 1] = last.lowerBound..<page.place + 1
            } else {
                found.append(page.place..<page.place + 1)
            }
        }
        return found
    }

    public func encoded() -> [UInt8] {
        var bytes = Self.magic
        func add(_ value: UInt64, _ count: Int = 8) {
            for i in 0..<count { bytes.append(UInt8(truncatingIfNeeded: value >> UInt64(8 * i))) }
        }
        let stretches = stretches
        add(UInt64(Self.version), 4)
        add(UInt64(slots.count))
        add(UInt64(stretches.count))
        for slot in slots {
            add(UInt64(slot.id))
            add(slot.pages)
        }
        for stretch in stretches {
            add(stretch.lowerBound)
            add(UInt64(stretch.count))
        }
        let data = dataOffset
        bytes += [UInt8](repeating: 0, count: Int(data) - bytes.count)
        for page in pages {
            bytes += [UInt8](repeating: 0, count: Int(data + page.place * pageSize) - bytes.count)
            if page.content.isZero {
                bytes += [UInt8](repeating: 0, count: Int(pageSize))
            } else {
                for word in page.content.words { add(word) }
            }
        }
        return bytes + [UInt8](repeating: 0, count: Int(data + places * pageSize) - bytes.count)
    }

    /// Bytes are bad input like any other: nothing is allocated for what isn't there.
    public init(decoding bytes: [UInt8]) throws(DecodingError) {
        var reader = ByteReader(bytes)
        for letter in Self.magic where try reader.number(1) != UInt64(letter) { throw .notASnapshot }
        guard try reader.number(4) == UInt64(Self.version) else { throw .unknownVersion }
        let (slotCount, stretchCount) = (try reader.count(of: 16), try reader.count(of: 16))
        var places: UInt64 = 0
        for _ in 0..<slotCount {
            let (id, pages) = (try reader.number(8), try reader.number(8))
            guard let id = UInt16(exactly: id), !slots.contains(where: { $0.id == id }), pages < 1 << 32 else {
                throw .badTable
            }
            slots.append(Slot(id: id, pages: pages))
            places += pages
        }
        var stretches: [Range<UInt64>] = []
        for _ in 0..<stretchCount {
            let (first, count) = (try reader.number(8), try reader.number(8))
            guard count > 0, first < places, count <= places - first, first >= stretches.last?.upperBound ?? 0 else {
                throw .badTable
            }
            stretches.append(first..<first + count)
        }
        reader.align()
        guard UInt64(reader.left) == places * pageSize else { throw .truncated }
        let data = reader.offset
        for stretch in stretches {
            for place in stretch {
                reader.offset = data + Int(place * pageSize)
                var words: [UInt64] = []
                for _ in 0..<PageContent.wordCount { words.append(try reader.number(8)) }
                pages.append(Page(place: place, content: PageContent(words)))
            }
        }
    }
}

private struct ByteReader {
    let bytes: [UInt8]
    var offset = 0

    init(_ bytes: [UInt8]) { self.bytes = bytes }

    var left: Int { bytes.count - offset }

    mutating func number(_ count: Int) throws(SnapshotFile.DecodingError) -> UInt64 {
        guard count <= left else { throw .truncated }
        var value: UInt64 = 0
        for i in 0..<count { value |= UInt64(bytes[offset + i]) << UInt64(8 * i) }
        offset += count
        return value
    }

    /// The number of things of `size` bytes that follow somewhere.
    mutating func count(of size: Int) throws(SnapshotFile.DecodingError) -> Int {
        let value = try number(8)
        guard value <= UInt64(bytes.count / size) else { throw .truncated }
        return Int(value)
    }

    mutating func align() { offset = min(bytes.count, (offset + Int(pageSize) - 1) / Int(pageSize) * Int(pageSize)) }
}
