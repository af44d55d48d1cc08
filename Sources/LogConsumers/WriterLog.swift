import Frames
import Synchrony

/// The VMM's own dirty log: pages that it has written through its mapping, and pages that devices have written by DMA. KVM
/// hears of neither. Any task may mark; a consumer takes.
///
/// A writer marks *after* its write. Marked before, the mark may be harvested and the page copied while the write is still
/// to come: then it is in no later log.
public final class WriterLog: @unchecked Sendable {
    // Unchecked: `bitmaps` is touched under `lock`.
    private let lock = SpinLock(.writerLog)
    private var bitmaps: [(slot: UInt16, words: [UInt64])] = []
    public init() {}

    public func mark(_ page: UInt64, of slot: UInt16) {
        lock.lock()
        let index = place(of: slot)
        let word = Int(page / 64)
        while bitmaps[index].words.count <= word { bitmaps[index].words.append(0) }
        bitmaps[index].words[word] |= 1 << (page % 64)
        lock.unlock()
    }

    /// Takes the marks of a slot: a bit for each page.
    public func take(_ slot: GuestSlot) -> [UInt64] {
        lock.lock()
        let index = place(of: slot.id)
        var taken = bitmaps[index].words
        bitmaps[index].words = []
        lock.unlock()
        while taken.count < slot.words { taken.append(0) }
        // Marks of a larger slot that had this id before.
        taken.removeLast(taken.count - slot.words)
        if let last = taken.last { taken[slot.words - 1] = last & slot.everyPage[slot.words - 1] }
        return taken
    }

    /// Caller holds `lock`.
    private func place(of slot: UInt16) -> Int {
        if let index = bitmaps.firstIndex(where: { $0.slot == slot }) { return index }
        bitmaps.append((slot, []))
        return bitmaps.count - 1
    }
}
