import Frames

/// Where one page of an object is. Kernel: an entry of `address_space.i_pages`.
struct ObjectPage: Equatable {
    private let bits: UInt64
    private init(_ bits: UInt64) { self.bits = bits }
    private static let onSwap: UInt64 = 1 << 63

    /// Not in memory: zeros, or what the disk has.
    static let absent = ObjectPage(0)
    /// Being taken out of memory; only who holds the lock of the object's pages may look further.
    static let leaving = ObjectPage(1 << 62)
    static func frame(_ frame: HostFrame) -> ObjectPage { ObjectPage(frame.number) }
    static func swapped(_ slot: Int) -> ObjectPage { ObjectPage(UInt64(slot) | onSwap) }

    var frame: HostFrame? { bits == 0 || bits >> 62 != 0 ? nil : HostFrame(bits) }
    var slot: Int? { bits & Self.onSwap == 0 ? nil : Int(bits & ~Self.onSwap) }
}
