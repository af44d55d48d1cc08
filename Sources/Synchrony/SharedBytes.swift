import Synchronization

/// Bytes of memory that other tasks, and processors, read and write at the same time. Whole aligned words go in one piece;
/// of a word that is changed in part, the rest stays what it was. Every word passes a scheduling point.
@frozen
public struct SharedBytes: @unchecked Sendable {
    // Unchecked: as `AtomicWord`, of which these bytes are made.
    @usableFromInline let start: UnsafeMutableRawPointer

    /// The words that `start` and what follows lie in must stay valid while the bytes are used.
    @inlinable public init(at start: UnsafeMutableRawPointer) { self.start = start }

    @inlinable public func advanced(by count: Int) -> SharedBytes { SharedBytes(at: start + count) }

    public func read(into buffer: UnsafeMutableRawBufferPointer) {
        forEachWord(buffer.count) { word, range, done in
            var value = word.loadData()
            withUnsafeBytes(of: &value) { bytes in
                UnsafeMutableRawBufferPointer(rebasing: buffer[done..<done + range.count])
                    .copyMemory(from: UnsafeRawBufferPointer(rebasing: bytes[range]))
            }
        }
    }

    public func write(from buffer: UnsafeRawBufferPointer) {
        forEachWord(buffer.count) { word, range, done in
            var value: UInt64 = 0
            withUnsafeMutableBytes(of: &value) { bytes in
                UnsafeMutableRawBufferPointer(rebasing: bytes[range])
                    .copyMemory(from: UnsafeRawBufferPointer(rebasing: buffer[done..<done + range.count]))
            }
            word.storeData(value, mask: Self.mask(range))
        }
    }

    /// Writes `count` zeros.
    public func clear(_ count: Int) {
        forEachWord(count) { word, range, _ in word.storeData(0, mask: Self.mask(range)) }
    }

    /// Ones in the bytes of `range`, counted from the word's first byte in memory.
    private static func mask(_ range: Range<Int>) -> UInt64 {
        guard range.count < 8 else { return ~0 }
        return (((1 << UInt64(8 * range.count)) - 1) << UInt64(8 * range.lowerBound)).littleEndian
    }

    /// Visits the words of `count` bytes: the word, which of its bytes, and how many came before.
    private func forEachWord(_ count: Int, _ body: (AtomicWord, Range<Int>, Int) -> Void) {
        var done = 0
        while done < count {
            let skipped = Int(UInt(bitPattern: start + done) & 7)
            let part = min(8 - skipped, count - done)
            body(AtomicWord(at: start + done - skipped), skipped..<skipped + part, done)
            done += part
        }
    }
}

extension AtomicWord {
    /// Writes the bits of a word of data that `mask` has.
    func storeData(_ value: UInt64, mask: UInt64) {
        if mask == ~0 { return storeData(value) }
        schedulingPoint(.dataWrite, identity)
        var old = pointer.pointee.load(ordering: .relaxed)
        while true {
            let new = (old & ~mask) | (value & mask)
            let (done, seen) = pointer.pointee.compareExchange(expected: old, desired: new, ordering: .releasing)
            if done { return }
            old = seen
        }
    }
}
