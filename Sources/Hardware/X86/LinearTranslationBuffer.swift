import Frames
import Synchrony

/// The TLB of one vCPU for linear addresses, under shadow paging or in two dimensions: fully associative, round-robin
/// replacement, so that two runs evict alike.
///
/// Only the vCPU's own task may touch it; a checker may look while that task stands still. It holds translations of one
/// address space under one second stage: a new CR3, CR0, CR4, EFER or EPTP needs `invalidateAll` (PCIDs and G are not
/// modelled), other registers are asked at each lookup. An entry stays until it is flushed, replaced or faulted on,
/// whatever the tables say meanwhile (Spec: x86 12).
public final class LinearTranslationBuffer {
    public struct Entry: Sendable, Equatable {
        /// The first byte that the entry translates.
        public let first: UInt64
        /// With the first frames.
        public let translation: LinearTranslation

        func covers(_ address: UInt64) -> Bool { address & ~(translation.bytes - 1) == first }

        /// Whether the entry is of the leaf that maps `address`: a large leaf's entries may each be of a part of it.
        func isOfLeaf(at address: UInt64) -> Bool {
            (address ^ first) & ~(translation.leafBytes - 1) == 0
        }
    }

    private var kept: RoundRobin<Entry>
    public var capacity: Int { kept.capacity }
    public let identity = ObjectIdentity()

    /// - Parameter capacity: number of translations, at least 1.
    public init(capacity: Int) { kept = RoundRobin(capacity: capacity) }

    /// The cached translation that serves the access. Nil means: walk. Neither a store without D nor a missing right ends
    /// in a fault from here.
    public func lookup(
        _ address: UInt64, _ access: LinearAccess, _ registers: PagingRegisters
    ) -> LinearTranslation? {
        schedulingNote(.tlbRead, identity.value)
        for slot in kept.slots {
            guard let entry = slot, entry.covers(address), entry.translation.serves(access, registers) else { continue }
            return entry.translation.moved(by: (address - entry.first) >> pageShift)
        }
        return nil
    }

    /// Caches `translation`, a walk's result for `address`, and what one TLB entry covers with it.
    ///
    /// - Parameter stillWanted: asked at the last moment; a speculative walk's result comes to nothing if the guest was left.
    public func fill(_ address: UInt64, _ translation: LinearTranslation, if stillWanted: () -> Bool = { true }) {
        schedulingPoint(.tlbFill, identity.value)
        guard stillWanted() else { return }
        let first = address & ~(translation.bytes - 1)
        let entry = Entry(first: first, translation: translation.moved(by: 0 &- (address - first) >> pageShift))
        schedulingNote(.pageUse, entry.translation.frame.physicalAddress)
        kept.put(entry) { $0.first == entry.first && $0.translation.bytes == entry.translation.bytes }
    }

    /// x86: a move to CR3, `INVEPT`, a new ASID.
    public func invalidateAll() {
        schedulingPoint(.tlbFlush, identity.value)
        kept.dropAll()
    }

    /// Drops all of the page that maps `address`, of whatever size the leaf is. x86: `INVLPG`. Source: Intel SDM volume 3,
    /// "Operations that invalidate TLBs".
    public func invalidatePage(_ address: UInt64) {
        schedulingPoint(.tlbFlush, identity.value)
        drop(address)
    }

    /// What a page fault or a second-stage fault does to the entries of its address. No scheduling point: nobody else sees.
    func dropAfterFault(_ address: UInt64) {
        schedulingNote(.tlbFlush, identity.value)
        drop(address)
    }

    private func drop(_ address: UInt64) { kept.drop { $0.isOfLeaf(at: address) } }

    /// Every cached translation, in slot order. For checks; copies.
    public var entries: [Entry] { kept.entries }
}
