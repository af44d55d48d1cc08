import Frames
import SeededRandom
import Testing

@testable import LogConsumers

/// The file of a snapshot: each page at its place, holes between, and bytes that are no snapshot refused.
@Suite struct SnapshotFiles {
    /// Two slots, 3 and 2 pages; the second page of the first and the first of the second are written.
    private static func sample() -> SnapshotFile {
        var writer = SnapshotWriter()
        writer.begin(GuestSlot(id: 4, pages: 3, isLogged: true, making: 1))
        writer.skip()
        writer.write(PaperGuest.content(7))
        writer.skip()
        writer.end(Mistakes())
        writer.begin(GuestSlot(id: 1, pages: 2, isLogged: true, making: 1))
        writer.write(PageContent())
        writer.skip()
        writer.end(Mistakes())
        return writer.file
    }

    @Test func `a page's place is that of the slots before it and the pages before it`() {
        let file = Self.sample()
        #expect(file.pages.map(\.place) == [1, 3])
        #expect(file.stretches == [1..<2, 3..<4])
        #expect(file.places == 5)
    }
    @Test func `the data is at the places, and zeros are in the holes`() {
        let bytes = Self.sample().encoded()
        #expect(bytes.count == 6 * Int(pageSize))
        #expect(bytes[2 * Int(pageSize) + 7 * 8] == 7)
        #expect(bytes[Int(pageSize)...].count { $0 != 0 } == 1)
    }
    @Test func `a zero page that was written is no hole`() throws {
        var image = MemoryImage()
        image.place(4, pages: 3)
        image.place(1, pages: 2)
        let slot = GuestSlot(id: 1, pages: 2, isLogged: false, making: 0)
        image.set(PaperGuest.content(9), 0, of: 1)
        image.set(PaperGuest.content(9), 1, of: 1)
        try SnapshotFile(decoding: Self.sample().encoded()).apply(to: image)
        #expect(image.content(0, of: slot).isZero)
        #expect(image.content(1, of: slot) == PaperGuest.content(9))
        image = MemoryImage()
        Self.sample().apply(to: image)
        #expect(image.content(1, of: GuestSlot(id: 4, pages: 3, isLogged: false, making: 0)) == PaperGuest.content(7))
    }
    @Test func `random files come back`() throws {
        let seed = UInt64.random(in: 0...UInt64.max)
        print("seed \(seed)")
        var random = SplitMix(seed: seed)
        for _ in 0..<50 {
            var writer = SnapshotWriter()
            for id in 0..<UInt16.random(in: 0...4, using: &random) {
                let pages = UInt64.random(in: 1...70, using: &random)
                writer.begin(GuestSlot(id: id, pages: pages, isLogged: true, making: 0))
                for page in 0..<pages {
                    switch UInt8.random(in: 0...5, using: &random) {
                    case 0: writer.write(PaperGuest.content(page))
                    case 1: writer.write(PageContent())
                    default: writer.skip()
                    }
                }
                writer.end(Mistakes())
            }
            #expect(try SnapshotFile(decoding: writer.file.encoded()) == writer.file, "seed \(seed)")
        }
    }
    @Test func `every prefix is refused`() {
        let bytes = Self.sample().encoded()
        for length in Array(0..<100) + [4095, 4096, 8192, bytes.count - 1] {
            #expect(throws: SnapshotFile.DecodingError.self) { _ = try SnapshotFile(decoding: Array(bytes[..<length])) }
        }
    }
    @Test func `changed bytes never trap`() {
        let seed = UInt64.random(in: 0...UInt64.max)
        print("seed \(seed)")
        var random = SplitMix(seed: seed)
        let original = Self.sample().encoded()
        var refused = 0
        for _ in 0..<500 {
            var bytes = original
            for _ in 0...2 {
                bytes[Int.random(in: 0..<100, using: &random)] = UInt8.random(in: 0...255, using: &random)
            }
            do { _ = try SnapshotFile(decoding: bytes) } catch { refused += 1 }
        }
        #expect(refused > 100)
    }
}
