import Frames

/// A #PF: what the processor pushes and what it puts into CR2, and where the walk ended, which it does not tell.
public struct PageFault: Sendable, Equatable {
    /// Bits 0 P, 1 W, 2 U, 3 RSVD, 4 I/D, 5 PK. Spec: x86 0.3.
    public let errorCode: UInt32
    /// The linear address.
    public let address: UInt64
    /// `absent`, `rights` or `reservedBits`.
    public let reason: WalkFault.Reason
    /// The level at which the walk ended.
    public let level: PageLevel
    /// The entry at which it ended.
    public let entry: UInt64
    /// What the walked entries permit together.
    public let rights: LinearRights

    public static let present: UInt32 = 1 << 0
    public static let write: UInt32 = 1 << 1
    public static let user: UInt32 = 1 << 2
    public static let reserved: UInt32 = 1 << 3
    public static let fetch: UInt32 = 1 << 4
    public static let protectionKey: UInt32 = 1 << 5
}

/// What the processor's walk for a linear address comes to.
public enum LinearResult: Sendable, Equatable {
    case translated(LinearTranslation)
    case pageFault(PageFault)
    /// #GP, or #SS for the stack: the address has no translation.
    case nonCanonical
    /// The second stage refused: an EPT violation or misconfiguration, a nested page fault, a full log.
    case stageTwo(StageTwoFault)
    /// The walk, or its result, left physical memory: real hardware reports what the bus returns. The physical address.
    case outside(UInt64)
}

/// A second-stage exit in the course of a linear address's translation.
public struct StageTwoFault: Sendable, Equatable {
    /// Never `.translated`.
    public let result: WalkResult
    /// The linear address. With paging off, the guest physical one.
    public let address: UInt64
    /// Whether what the linear address leads to was being translated, not a table of the guest's.
    public let finalTranslation: Bool
}

/// A linear address's translation: what a TLB keeps.
public struct LinearTranslation: Sendable, Equatable {
    /// The 4 KiB frame that the tables name; behind a second stage a guest frame.
    public let guest: GuestFrame
    /// The 4 KiB frame in physical memory.
    public let frame: HostFrame
    /// The level of the leaf.
    public let level: PageLevel
    /// What the leaf maps, in bytes: 4 KiB, 2 MiB, 4 MiB or 1 GiB; with paging off 4 KiB.
    public let leafBytes: UInt64
    /// What one translation covers, both stages considered, in bytes.
    public let bytes: UInt64
    public let rights: LinearRights
    /// What the second stage permits.
    public let stageTwo: WalkRights
    /// Whether a store needs no walk to set a D.
    public let dirty: Bool

    public init(
        guest: GuestFrame, frame: HostFrame, level: PageLevel, leafBytes: UInt64, bytes: UInt64, rights: LinearRights,
        stageTwo: WalkRights, dirty: Bool
    ) {
        self.guest = guest
        self.frame = frame
        self.level = level
        self.leafBytes = leafBytes
        self.bytes = bytes
        self.rights = rights
        self.stageTwo = stageTwo
        self.dirty = dirty
    }

    /// Whether the access may go through this translation without a new walk: permitted, and D set for a store.
    public func serves(_ access: LinearAccess, _ registers: PagingRegisters) -> Bool {
        registers.permits(access, rights) && stageTwo.allow(access.kind) && (access.kind != .write || dirty)
    }

    /// The same translation for another 4 KiB frame of it, `delta` frames on.
    func moved(by delta: UInt64) -> LinearTranslation {
        LinearTranslation(
            guest: GuestFrame(guest.number &+ delta), frame: HostFrame(frame.number &+ delta), level: level,
            leafBytes: leafBytes, bytes: bytes, rights: rights, stageTwo: stageTwo, dirty: dirty)
    }
}
