import Frames
import Synchronization

/// What is forbidden to everybody, for good, on an object with a name. Kernel: `F_SEAL_*`.
public struct ObjectSeals: OptionSet, Sendable {
    public let rawValue: UInt32
    public init(rawValue: UInt32) { self.rawValue = rawValue }
    /// It never becomes smaller. Kernel: `F_SEAL_SHRINK`.
    public static let shrink = ObjectSeals(rawValue: 1 << 1)
    /// It never becomes larger. Kernel: `F_SEAL_GROW`.
    public static let grow = ObjectSeals(rawValue: 1 << 2)
}

extension MemoryObject {
    /// Adds seals; none ever goes. Kernel: `fcntl(F_ADD_SEALS)`.
    public func seal(_ new: ObjectSeals) { seals.bitwiseOr(new.rawValue, ordering: .acquiringAndReleasing) }

    /// Kernel: `fcntl(F_GET_SEALS)`.
    public var sealed: ObjectSeals { ObjectSeals(rawValue: seals.load(ordering: .acquiring)) }

    /// Changes the size as a process asks for it. Errors: EPERM where a seal forbids it, EINVAL for a negative size and
    /// of secret memory.
    /// `truncate` asks no seal: it's also how an object ends. Kernel: `ftruncate`, `shmem_setattr`.
    public func setSize(_ bytes: Int) throws(Errno) {
        // Secret memory gets its size once.
        guard bytes >= 0, !isSecret else { throw .EINVAL }
        let size = sizeInBytes
        if bytes < size, sealed.contains(.shrink) { throw .EPERM }
        if bytes > size, sealed.contains(.grow) { throw .EPERM }
        truncate(toBytes: bytes)
    }
}
