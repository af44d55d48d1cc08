import Frames

/// A guest's memory as somebody else has it: the destination of a migration, or what snapshots restore to. A page that was
/// never given is zeros, as new memory is.
public final class MemoryImage {
    public struct Slot: Sendable, Equatable {
        public var id: UInt16
        public var pages: [PageContent]
    }
    public private(set) var slots: [Slot] = []
    public init() {}

    /// What the image has there; zeros where nothing was given.
    public func content(_ page: UInt64, of slot: GuestSlot) -> PageContent {
        guard let index = index(of: slot.id), page < UInt64(slots[index].pages.count) else { return PageContent() }
        return slots[index].pages[Int(page)]
    }

    /// Makes room for a slot; one of another size that had the id is forgotten.
    func place(_ id: UInt16, pages: UInt64) {
        if let index = index(of: id) {
            if slots[index].pages.count == Int(pages) { return }
            slots.remove(at: index)
        }
        slots.append(Slot(id: id, pages: [PageContent](repeating: PageContent(), count: Int(pages))))
    }

    /// Precondition: the slot was placed, and has the page.
    func set(_ content: PageContent, _ page: UInt64, of id: UInt16) {
        guard let index = index(of: id) else { preconditionFailure("a page of a slot that has no place") }
        slots[index].pages[Int(page)] = content
    }

    /// Forgets slots that are gone.
    func keep(_ present: [GuestSlot]) { slots.removeAll { slot in !present.contains { $0.id == slot.id } } }

    private func index(of id: UInt16) -> Int? { slots.firstIndex { $0.id == id } }
}
