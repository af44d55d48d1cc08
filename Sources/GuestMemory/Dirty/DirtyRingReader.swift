/// A VMM's side of one ring: where it reads next. It belongs to one task; KVM knows nothing of it.
///
/// The order that a VMM must keep (Spec: generic 5.6): collect from every ring, `resetDirtyRings`, and only then copy the
/// pages. A page copied before the reset may be written afterwards through a translation that is still writable, and no
/// ring tells.
public final class DirtyRingReader {
    public let ring: DirtyRing
    /// The free-running index of the next entry to read.
    public private(set) var next: UInt32 = 0

    public init(_ ring: DirtyRing) { self.ring = ring }

    /// Reads the entries that are dirty, in their order, at most `limit`, and marks each to be reset.
    public func collect(atMost limit: Int = .max) -> [DirtyRingEntry] {
        var found: [DirtyRingEntry] = []
        while found.count < limit {
            let entry = ring.entry(at: next)
            guard entry.flags & DirtyRingEntry.dirty != 0, entry.flags & DirtyRingEntry.reset == 0 else { break }
            found.append(entry)
            ring.setFlags(entry.flags | DirtyRingEntry.reset, at: next)
            next &+= 1
        }
        return found
    }
}
