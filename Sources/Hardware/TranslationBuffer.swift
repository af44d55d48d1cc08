import Audit
import Frames
import Synchrony

/// The TLB of one vCPU: fully associative, round-robin replacement, so that two runs evict alike.
///
/// Only the vCPU's own task may touch it; a checker may look while that task stands still. Another CPU's flush reaches
/// it the way it does in KVM: a request and a kick, served by the vCPU before it goes on (Spec: x86 5, arches 2.3). An
/// entry stays until it is flushed, replaced or faulted on, whatever the tables say meanwhile: that is its purpose here
/// (Spec: I-13). It holds translations of one root: loading another root or VMID needs `invalidateAll`.
public final class TranslationBuffer {
    /// What is cached: a whole leaf.
    public struct Entry: Sendable, Equatable {
        /// The leaf's first guest frame.
        public let guest: GuestFrame
        /// With the leaf's first host frame.
        public let translation: Translation

        public var guestFrames: Range<GuestFrame> {
            guest..<GuestFrame(guest.number + translation.level.frames)
        }

        func covers(_ frame: GuestFrame) -> Bool { frame.aligned(to: translation.level) == guest }
    }

    private var kept: RoundRobin<Entry>
    private let journal: Journal?
    private let vcpu: UInt8

    /// - Parameters:
    ///   - capacity: number of leaves, at least 1.
    ///   - journal: where fills are recorded.
    ///   - vcpu: written into the journal's events.
    public init(capacity: Int, journal: Journal? = nil, vcpu: UInt8 = 0xff) {
        kept = RoundRobin(capacity: capacity)
        self.journal = journal
        self.vcpu = vcpu
    }

    public var capacity: Int { kept.capacity }

    /// Leaves cached now.
    public var count: Int {
        var count = 0
        for slot in kept.slots where slot != nil { count += 1 }
        return count
    }

    public let identity = ObjectIdentity()

    /// The cached translation that serves the access. Nil means: walk. A store is not served by an entry without D, and
    /// no access by one that lacks the right: both architectures' KVM relies on a new walk there, not on a fault from
    /// the TLB (Spec: x86 5, F14).
    public func lookup(_ frame: GuestFrame, _ access: AccessKind) -> Translation? {
        schedulingNote(.tlbRead, identity.value)
        for slot in kept.slots {
            guard let entry = slot, entry.covers(frame), entry.translation.serves(access) else { continue }
            let inside = frame.number - entry.guest.number
            return entry.translation.at(HostFrame(entry.translation.frame.number + inside))
        }
        return nil
    }

    /// Caches the leaf that `translation`, a walk's result for `frame`, comes from. Replaces an entry of the same leaf;
    /// one of another size that covers the frame stays, as hardware may use either until it is flushed.
    ///
    /// - Parameter stillWanted: asked at the last moment; a speculative walk's result comes to nothing if the guest was left.
    public func fill(_ frame: GuestFrame, _ translation: Translation, if stillWanted: () -> Bool = { true }) {
        schedulingPoint(.tlbFill, identity.value)
        guard stillWanted() else { return }
        let guest = frame.aligned(to: translation.level)
        let inside = frame.number - guest.number
        let leaf = translation.at(HostFrame(translation.frame.number - inside))
        schedulingNote(.pageUse, leaf.frame.physicalAddress)
        kept.put(Entry(guest: guest, translation: leaf)) {
            $0.guest == guest && $0.translation.level == translation.level
        }
        guard let journal else { return }
        journal.record(
            Event(
                .tlbFill, frame: leaf.frame, guest: guest.number, level: leaf.level.rawValue, value: leaf.bits,
                task: vcpu))
    }

    /// Kernel: `INVEPT`, `HFENCE.GVMA x0`.
    public func invalidateAll() {
        schedulingPoint(.tlbFlush, identity.value)
        kept.dropAll()
    }

    /// Drops every leaf that has a frame in `range`. Kernel: `HFENCE.GVMA` with an address.
    public func invalidate(_ range: Range<GuestFrame>) {
        schedulingPoint(.tlbFlush, identity.value)
        drop(range)
    }

    /// What a fault does to the entries of its frame: the processor drops them (Intel SDM, "Operations that invalidate
    /// guest-physical mappings"); RISC-V lets a hart drop any entry at any time. No scheduling point: nobody else sees.
    func dropAfterFault(_ frame: GuestFrame) {
        schedulingNote(.tlbFlush, identity.value)
        drop(frame..<GuestFrame(frame.number + 1))
    }

    private func drop(_ range: Range<GuestFrame>) { kept.drop { $0.guestFrames.overlaps(range) } }

    /// Every cached leaf, in slot order. For checks; copies.
    public var entries: [Entry] { kept.entries }
}

extension Translation {
    /// For the journal: 1 read, 2 write, 4 execute, 8 dirty.
    var bits: UInt64 { (readable ? 1 : 0) | (writable ? 2 : 0) | (executable ? 4 : 0) | (dirty ? 8 : 0) }
}
