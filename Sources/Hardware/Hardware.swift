// Hardware: what the silicon does with the tables that KVM writes: walkers, accessed and dirty updates, TLBs.
//
// It is decoded from the architecture manuals' facts and shares no line with `Paging`, which encodes: a format mistake
// would have to be made twice, in two ways, to hide. It guarantees: entries are read and changed only by atomic
// operations that pass scheduling points; an accessed or dirty bit is set only in the very entry that was walked; no
// table content makes it crash, whatever an entry says. It never allocates frames, takes no lock, and knows no slot.
// Read `EPT/EPTWalker.swift` next; for a guest's own tables, shadow tables and NPT, `X86/LegacyWalker.swift`.

import Frames

/// What a table walk comes to.
public enum WalkResult: Sendable, Equatable {
    /// The access may go ahead; accessed and dirty bits have been set.
    case translated(Translation)
    /// EPT violation; AMD: nested page fault; RISC-V: guest-page fault. The last two report reserved encodings, too.
    case violation(WalkFault)
    /// EPT misconfiguration. On both architectures also a table or page outside physical memory, which real hardware
    /// reports as whatever the bus returns (RISC-V: an access fault).
    case misconfiguration(WalkFault)
    /// EPT: D would have to be logged and the log is full. Nothing was written but A on the way; the access is not made.
    case modificationLogFull
}

/// A guest frame's translation: what a TLB keeps.
public struct Translation: Sendable, Equatable {
    /// The exact 4 KiB frame, also inside a large leaf.
    public let frame: HostFrame
    /// The level of the leaf.
    public let level: PageLevel
    public let readable: Bool
    public let writable: Bool
    public let executable: Bool
    /// Whether a store needs no walk to set D: the leaf's D was set, or the mode keeps no D.
    public let dirty: Bool

    public init(
        frame: HostFrame, level: PageLevel, readable: Bool, writable: Bool, executable: Bool, dirty: Bool
    ) {
        self.frame = frame
        self.level = level
        self.readable = readable
        self.writable = writable
        self.executable = executable
        self.dirty = dirty
    }

    init(frame: HostFrame, level: PageLevel, rights: WalkRights, dirty: Bool) {
        self.init(
            frame: frame, level: level, readable: rights.read, writable: rights.write,
            executable: rights.execute, dirty: dirty)
    }

    public var rights: WalkRights { WalkRights(read: readable, write: writable, execute: executable) }

    /// Whether the access may go through this translation without a new walk: permitted, and D set for a store.
    public func serves(_ access: AccessKind) -> Bool { rights.allow(access) && (access != .write || dirty) }

    /// The same leaf's translation for another 4 KiB frame of it.
    func at(_ frame: HostFrame) -> Translation { Translation(frame: frame, level: level, rights: rights, dirty: dirty) }
}

/// What a walk's entries permit together.
public struct WalkRights: Sendable, Equatable {
    public var read: Bool
    public var write: Bool
    public var execute: Bool

    public init(read: Bool, write: Bool, execute: Bool) {
        self.read = read
        self.write = write
        self.execute = execute
    }

    public static let all = WalkRights(read: true, write: true, execute: true)
    public static let none = WalkRights(read: false, write: false, execute: false)

    public func allow(_ access: AccessKind) -> Bool {
        switch access {
        case .read: read
        case .write: write
        case .execute: execute
        }
    }

    /// What both permit.
    func intersection(_ other: WalkRights) -> WalkRights {
        WalkRights(read: read && other.read, write: write && other.write, execute: execute && other.execute)
    }
}

/// Where and why a walk ended.
public struct WalkFault: Sendable, Equatable {
    public enum Reason: UInt8, Sendable, CaseIterable {
        /// The entry is not present.
        case absent
        /// The walked entries do not permit the access.
        case rights
        /// The permission bits are a combination that no entry may have.
        case encoding
        /// A leaf's memory type is none.
        case memoryType
        /// A reserved bit is set.
        case reservedBits
        /// A large leaf's frame is no multiple of its size.
        case misaligned
        /// The guest address has more bits than the tables translate.
        case addressWidth
        /// A is clear, or D is clear at a store, and hardware does not set them (RISC-V Svade).
        case accessedDirty
        /// The entry's own address, or the leaf's frame, lies outside physical memory.
        case noMemory
        /// The root pointer (EPTP, hgatp) is not one that hardware accepts.
        case rootPointer
    }

    public let reason: Reason
    public let address: GuestAddress
    public let access: AccessKind
    /// The level at which the walk ended.
    public let level: PageLevel
    /// The entry at which it ended; 0 when none was read.
    public let entry: UInt64
    /// Whether that entry is present.
    public let present: Bool
    /// What the walked entries permit together; nothing if one was absent or none was read.
    public let rights: WalkRights
}

extension WalkFault {
    /// A walk that ended before it read an entry.
    init(_ reason: Reason, _ address: GuestAddress, _ access: AccessKind, level: PageLevel) {
        self.init(
            reason: reason, address: address, access: access, level: level, entry: 0, present: false, rights: .none)
    }
}
