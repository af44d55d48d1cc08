import Frames

/// The calls of `AddressSpace` as a process makes them: plain numbers, checked in Linux's order, with the errno that Linux
/// gives for what they can't mean. What Linux rounds is rounded. Kernel: the system calls; x86-64's numbers.
public struct SystemCalls {
    private let space: AddressSpace
    public init(_ space: AddressSpace) { self.space = space }

    /// Bits of the calls' arguments. Kernel: `include/uapi/asm-generic/mman*.h`.
    public enum Bits {
        public static let protRead: UInt64 = 1
        public static let protWrite: UInt64 = 2
        public static let protExec: UInt64 = 4
        public static let protSem: UInt64 = 8
        public static let protGrowsDown: UInt64 = 0x0100_0000
        public static let protGrowsUp: UInt64 = 0x0200_0000
        public static let mapShared: UInt64 = 1
        public static let mapPrivate: UInt64 = 2
        public static let mapSharedValidate: UInt64 = 3
        public static let mapType: UInt64 = 0xf
        public static let mapFixed: UInt64 = 0x10
        public static let mapAnonymous: UInt64 = 0x20
        public static let mapFixedNoReplace: UInt64 = 0x10_0000
        public static let mremapMayMove: UInt64 = 1
        public static let mremapFixed: UInt64 = 2
        public static let mremapDontUnmap: UInt64 = 4
    }

    private static let end = UserAddress.end.value

    /// `length` rounded up to whole pages; 0 where that is too large for a number. Kernel: `PAGE_ALIGN`.
    private static func aligned(_ length: UInt64) -> UInt64 { (length &+ (pageSize - 1)) & ~(pageSize - 1) }

    private static func protection(_ bits: UInt64) -> Protection {
        Protection(
            read: bits & Bits.protRead != 0, write: bits & Bits.protWrite != 0, execute: bits & Bits.protExec != 0)
    }

    private static func range(_ address: UInt64, _ length: UInt64) -> Range<UserAddress> {
        UserAddress(address)..<UserAddress(address + length)
    }

    /// Only at the given address: with `MAP_FIXED` or `MAP_FIXED_NOREPLACE`, or EINVAL, since this model places nothing
    /// itself. - Parameter object: what the descriptor means; nil for a bad one (EBADF), not looked at with `MAP_ANONYMOUS`.
    public func mmap(
        _ address: UInt64, _ length: UInt64, protection: UInt64, flags: UInt64, object: MemoryObject?, offset: UInt64
    ) throws(Errno) {
        if offset & (pageSize - 1) != 0 { throw .EINVAL }
        let isAnonymous = flags & Bits.mapAnonymous != 0
        if !isAnonymous, object == nil { throw .EBADF }
        if length == 0 { throw .EINVAL }
        let size = Self.aligned(length)
        if size == 0 { throw .ENOMEM }
        if (offset >> pageShift) &+ (size >> pageShift) < offset >> pageShift { throw .EOVERFLOW }
        let isFixed = flags & (Bits.mapFixed | Bits.mapFixedNoReplace) != 0
        if size > Self.end { throw .ENOMEM }
        guard isFixed else { throw .EINVAL }
        if address > Self.end - size { throw .ENOMEM }
        if address & (pageSize - 1) != 0 { throw .EINVAL }
        let replaces = flags & Bits.mapFixedNoReplace == 0
        if !replaces, space.overlapsArea(Self.range(address, size)) { throw .EEXIST }
        let most = UInt64(Int64.max)
        if !isAnonymous, size > most || offset >> pageShift > (most - size) >> pageShift { throw .EOVERFLOW }
        let type = flags & Bits.mapType
        let shared = type == Bits.mapShared || (type == Bits.mapSharedValidate && !isAnonymous)
        guard shared || type == Bits.mapPrivate else { throw .EINVAL }
        if type == Bits.mapSharedValidate, flags & ~Self.knownFlags != 0 { throw .EOPNOTSUPP }
        let first = Int(offset >> pageShift)
        let backing: Backing =
            if isAnonymous {
                shared ? .anonymousShared : .anonymous
            } else if let object {
                .object(object, firstPage: first, shared: shared)
            } else {
                throw .EBADF
            }
        try space.map(
            at: UserAddress(address), length: size, protection: Self.protection(protection), backing: backing,
            replacing: replaces, accounted: !shared && protection & Bits.protWrite != 0)
    }

    /// Kernel: `LEGACY_MAP_MASK`, as far as this model knows the flags.
    private static let knownFlags =
        Bits.mapSharedValidate | Bits.mapFixed | Bits.mapAnonymous

    public func munmap(_ address: UInt64, _ length: UInt64) throws(Errno) {
        guard address & (pageSize - 1) == 0, address <= Self.end, length <= Self.end - address else { throw .EINVAL }
        let size = Self.aligned(length)
        guard size > 0 else { throw .EINVAL }
        try space.unmap(Self.range(address, size))
    }

    public func mprotect(_ address: UInt64, _ length: UInt64, _ protection: UInt64) throws(Errno) {
        let grows = protection & (Bits.protGrowsDown | Bits.protGrowsUp)
        if grows == Bits.protGrowsDown | Bits.protGrowsUp { throw .EINVAL }
        if address & (pageSize - 1) != 0 { throw .EINVAL }
        if length == 0 { return }
        let size = Self.aligned(length)
        let (end, overflow) = address.addingReportingOverflow(size)
        if overflow || end <= address { throw .ENOMEM }
        let known = Bits.protRead | Bits.protWrite | Bits.protExec | Bits.protSem
        if protection & ~grows & ~known != 0 { throw .EINVAL }
        if address >= Self.end { throw .ENOMEM }
        if grows != 0 {
            // No mapping grows here: stacks are not modelled.
            let range = UserAddress(address)..<UserAddress(min(end, Self.end))
            let begins =
                grows == Bits.protGrowsUp ? space.area(containing: range.lowerBound) != nil : space.overlapsArea(range)
            throw begins ? .EINVAL : .ENOMEM
        }
        try space.protect(
            UserAddress(address)..<UserAddress(min(end, Self.end)), Self.protection(protection))
        if end > Self.end { throw .ENOMEM }
    }

    public func madvise(_ address: UInt64, _ length: UInt64, _ advice: UInt64) throws(Errno) {
        guard let advice = Advice(number: advice) else { throw .EINVAL }
        if address & (pageSize - 1) != 0 { throw .EINVAL }
        let size = Self.aligned(length)
        if length != 0, size == 0 { throw .EINVAL }
        let (end, overflow) = address.addingReportingOverflow(size)
        if overflow { throw .EINVAL }
        if size == 0 { return }
        if address >= Self.end { throw .ENOMEM }
        try space.advise(UserAddress(address)..<UserAddress(min(end, Self.end)), advice)
        if end > Self.end { throw .ENOMEM }
    }

    /// `newAddress` counts only with `MREMAP_FIXED`.
    public func mremap(
        _ address: UInt64, _ oldLength: UInt64, _ newLength: UInt64, flags: UInt64, newAddress: UInt64
    ) throws(Errno) {
        let known = Bits.mremapFixed | Bits.mremapMayMove | Bits.mremapDontUnmap
        if flags & ~known != 0 { throw .EINVAL }
        if address & (pageSize - 1) != 0 { throw .EINVAL }
        let old = Self.aligned(oldLength)
        let new = Self.aligned(newLength)
        if new == 0 || new > Self.end { throw .EINVAL }
        let isFixed = flags & Bits.mremapFixed != 0
        if isFixed || flags & Bits.mremapDontUnmap != 0 {
            if newAddress & (pageSize - 1) != 0 { throw .EINVAL }
            if flags & Bits.mremapMayMove == 0 { throw .EINVAL }
            if flags & Bits.mremapDontUnmap != 0 { throw .EINVAL }
            if newAddress > Self.end - new { throw .EINVAL }
            if address &+ old > newAddress, newAddress + new > address { throw .EINVAL }
        }
        let (end, overflow) = address.addingReportingOverflow(old)
        guard old > 0 else {
            guard address < Self.end else { throw .EFAULT }
            return try space.mapAgain(
                UserAddress(address), length: new, at: isFixed ? UserAddress(newAddress) : nil)
        }
        guard !overflow, end <= Self.end else {
            // Nothing is to change: the length is not looked at.
            if !isFixed, new == old, address < Self.end, space.area(containing: UserAddress(address)) != nil { return }
            // A move that changes no length takes what is there, however far it asks.
            if isFixed, new == old, address < Self.end {
                return try space.remap(
                    UserAddress(address)..<UserAddress(Self.end), length: Self.end - address,
                    to: UserAddress(newAddress))
            }
            guard address < Self.end, let area = space.area(containing: UserAddress(address)), new < old else {
                throw .EFAULT
            }
            if isFixed {
                guard address + new <= area.upperBound.value else { throw .EFAULT }
                // What it would be shortened by can't be unmapped; the target is by then.
                try space.unmap(Self.range(newAddress, new))
                guard space.area(containing: UserAddress(address)) != nil else { throw .EFAULT }
            }
            throw .EINVAL
        }
        try space.remap(
            UserAddress(address)..<UserAddress(end), length: new, to: isFixed ? UserAddress(newAddress) : nil)
    }
}

extension Advice {
    /// Kernel: `MADV_*`. Nil: not an advice, or none that is modelled.
    public init?(number: UInt64) {
        switch number {
        case 4: self = .dontNeed
        case 8: self = .free
        case 9: self = .remove
        case 12: self = .mergeable
        case 13: self = .unmergeable
        case 25: self = .collapse
        case 100: self = .hardwarePoison
        case 14: self = .hugePage
        case 15: self = .noHugePage
        case 20: self = .cold
        case 21: self = .pageOut
        case 22: self = .populateRead
        case 23: self = .populateWrite
        case 102: self = .guardInstall
        case 103: self = .guardRemove
        default: return nil
        }
    }
}
