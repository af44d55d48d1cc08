import Frames

/// A snapshot's memory as a file: a table of the slots, and their pages one slot after another, in the order of the table.
/// Each page has its place, whether it is written or not: what a differential snapshot leaves out is a hole. Kernel:
/// a sparse file, written with lseek(2), read back with `SEEK_DATA`.
public struct SnapshotFile: Sendable, Equatable {
    public struct Slot: Sendable, Equatable {
        public var id: UInt16
        public var pages: UInt64
    }
    /// A page that is written, and its place: pages from the start of the data.
    public struct Page: Sendable, Equatable {
        public var place: UInt64
        public var content: PageContent
    }
    init() {}
    public internal(set) var slots: [Slot] = []
    /// Ascending by place, no place twice.
    public internal(set) var pages: [Page] = []

    /// Brings an image to what the file says: its slots and no others, and the pages that are written.
    func apply(to image: MemoryImage) {
        image.keep(slots.map { GuestSlot(id: $0.id, pages: $0.pages, isLogged: false, making: 0) })
        var next = 0
        var start: UInt64 = 0
        for slot in slots {
            image.place(slot.id, pages: slot.pages)
            while next < pages.count, pages[next].place < start + slot.pages {
                image.set(pages[next].content, pages[next].place - start, of: slot.id)
                next += 1
            }
            start += slot.pages
        }
    }
}

/// Writes a file from its start to its end, as a VMM does with a descriptor: pages are written at the position, and clean
/// ones are skipped by moving it.
struct SnapshotWriter {
    private(set) var file = SnapshotFile()
    private var position: UInt64 = 0
    /// Clean pages behind the last written one: skipped when the next is written.
    private var clean: UInt64 = 0

    mutating func begin(_ slot: GuestSlot) {
        file.slots.append(SnapshotFile.Slot(id: slot.id, pages: slot.pages))
        clean = 0
    }

    mutating func skip() { clean += 1 }

    mutating func write(_ content: PageContent) {
        position += clean
        clean = 0
        file.pages.append(SnapshotFile.Page(place: position, content: content))
        position += 1
    }

    /// The slot's last page has been skipped or written.
    mutating func end(_ mistakes: Mistakes) {
        if !mistakes.make(.trailingPagesNotSkipped) { position += clean }
    }
}
