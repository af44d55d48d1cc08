import Frames
import Synchronization
import Synchrony

/// One bit for each page of a slot, little-endian in 64-bit words. Kernel: `memslot->dirty_bitmap`, first half.
public final class DirtyBitmap: @unchecked Sendable {
    // Unchecked: the words are atomics.
    private let words: UnsafeMutablePointer<Atomic<UInt64>>
    public let wordCount: Int
    public let pages: UInt64
    private let identity = ObjectIdentity()

    init(pages: UInt64, initiallySet: Bool) {
        self.pages = pages
        wordCount = Int((pages + 63) / 64)
        words = .allocate(capacity: wordCount)
        for i in 0..<wordCount { (words + i).initialize(to: Atomic(initiallySet ? ~0 : 0)) }
        if initiallySet, pages % 64 != 0 { words[wordCount - 1].store((1 << (pages % 64)) - 1, ordering: .relaxed) }
    }

    deinit {
        words.deinitialize(count: wordCount)
        words.deallocate()
    }

    func set(_ page: UInt64) {
        schedulingPoint(.atomicAccumulate, identity.part(Int(page / 64)))
        let word = words + Int(page / 64)
        let bit: UInt64 = 1 << (page % 64)
        // A set bit stays set until it is harvested, so the common rewrite costs no locked operation.
        if word.pointee.load(ordering: .acquiring) & bit == 0 {
            word.pointee.bitwiseOr(bit, ordering: .acquiringAndReleasing)
        }
    }

    public func contains(_ page: UInt64) -> Bool {
        words[Int(page / 64)].load(ordering: .acquiring) >> (page % 64) & 1 == 1
    }

    func word(_ index: Int) -> UInt64 {
        schedulingNote(.atomicLoad, identity.part(index))
        return words[index].load(ordering: .acquiring)
    }
    /// Takes all bits of a word.
    func take(_ index: Int) -> UInt64 {
        schedulingPoint(.atomicUpdate, identity.part(index))
        return words[index].exchange(0, ordering: .acquiringAndReleasing)
    }
    /// Takes the bits of `mask`; returns those that were set.
    func take(_ index: Int, _ mask: UInt64) -> UInt64 {
        schedulingPoint(.atomicUpdate, identity.part(index))
        return words[index].bitwiseAnd(~mask, ordering: .acquiringAndReleasing).oldValue & mask
    }
}
