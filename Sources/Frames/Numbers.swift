// Frames: numbers and addresses, each with a type of its own, so that a guest frame is never taken for a host frame.
// This module knows nothing else. It never allocates and never fails but by a precondition.

/// Bytes in the smallest page: 4096. Kernel: `PAGE_SIZE`.
@inlinable public var pageSize: UInt64 { 4096 }
/// Kernel: `PAGE_SHIFT`.
@inlinable public var pageShift: UInt64 { 12 }

/// A number of 4 KiB frames. What all frame numbers share.
public protocol FrameNumber: Comparable, Hashable, Sendable, Strideable where Stride == Int {
    var number: UInt64 { get }
    init(_ number: UInt64)
}

extension FrameNumber {
    @inlinable public static func < (a: Self, b: Self) -> Bool { a.number < b.number }
    @inlinable public func distance(to other: Self) -> Int { Int(bitPattern: UInt(other.number &- number)) }
    @inlinable public func advanced(by n: Int) -> Self { Self(number &+ UInt64(bitPattern: Int64(n))) }
    /// This frame rounded down to a multiple of `level`'s size.
    @inlinable @inline(__always) public func aligned(to level: PageLevel) -> Self { Self(number & ~(level.frames - 1)) }
    @inlinable @inline(__always) public func isAligned(to level: PageLevel) -> Bool { number & (level.frames - 1) == 0 }
}

/// A guest frame number. Kernel: `gfn_t`. Unit: frames of 4 KiB.
public struct GuestFrame: FrameNumber {
    public let number: UInt64
    @inlinable public init(_ number: UInt64) { self.number = number }
    /// The first byte of the frame.
    @inlinable public var address: GuestAddress { GuestAddress(number << pageShift) }
}

/// A host frame number; always a frame, never an encoded error. Kernel: `kvm_pfn_t`. Spec: generic 1.3, I-18.
public struct HostFrame: FrameNumber {
    public let number: UInt64
    @inlinable public init(_ number: UInt64) { self.number = number }
    /// The first byte of the frame, a physical address.
    @inlinable public var physicalAddress: UInt64 { number << pageShift }
}

/// A guest physical address, in bytes. Kernel: `gpa_t`.
public struct GuestAddress: Comparable, Hashable, Sendable {
    public let value: UInt64
    @inlinable public init(_ value: UInt64) { self.value = value }
    @inlinable public var frame: GuestFrame { GuestFrame(value >> pageShift) }
    @inlinable public var offset: UInt64 { value & (pageSize - 1) }
    @inlinable public static func < (a: Self, b: Self) -> Bool { a.value < b.value }
    @inlinable public static func + (a: Self, bytes: UInt64) -> Self { Self(a.value &+ bytes) }
}

/// A host user virtual address, in bytes. Kernel: `hva`, `unsigned long`.
public struct UserAddress: Comparable, Hashable, Sendable {
    public let value: UInt64
    @inlinable public init(_ value: UInt64) { self.value = value }
    /// The virtual page number.
    @inlinable public var page: UInt64 { value >> pageShift }
    @inlinable public var offset: UInt64 { value & (pageSize - 1) }
    @inlinable public static func < (a: Self, b: Self) -> Bool { a.value < b.value }
    @inlinable public static func + (a: Self, bytes: UInt64) -> Self { Self(a.value &+ bytes) }
    @inlinable @inline(__always) public func aligned(to level: PageLevel) -> Self { Self(value & ~(level.bytes - 1)) }
    /// The end of user space on a host with 47-bit user addresses. Kernel: `TASK_SIZE_MAX`.
    @inlinable public static var end: UserAddress { UserAddress(0x7fff_ffff_f000) }
}

/// A level of a radix page table: 1 maps 4 KiB, 2 maps 2 MiB, 3 maps 1 GiB. Kernel: `PG_LEVEL_*`.
public struct PageLevel: Comparable, Hashable, Sendable {
    public let rawValue: UInt8
    @inlinable public init(_ rawValue: UInt8) { self.rawValue = rawValue }
    @inlinable public static var page4K: PageLevel { PageLevel(1) }
    @inlinable public static var page2M: PageLevel { PageLevel(2) }
    @inlinable public static var page1G: PageLevel { PageLevel(3) }
    /// 4 KiB frames under one entry of this level.
    @inlinable @inline(__always) public var frames: UInt64 { 1 << (9 * UInt64(rawValue - 1)) }
    @inlinable public var bytes: UInt64 { frames << pageShift }
    @inlinable public static func < (a: Self, b: Self) -> Bool { a.rawValue < b.rawValue }
    @inlinable public var below: PageLevel { PageLevel(rawValue - 1) }
    @inlinable public var above: PageLevel { PageLevel(rawValue + 1) }
}

/// What a guest, or the host's user, does to memory.
public enum AccessKind: UInt8, Sendable, CaseIterable {
    case read, write, execute
}
