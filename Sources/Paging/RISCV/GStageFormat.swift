import Frames
import GuestMemory

/// The bits of a G-stage entry. Source: RISC-V privileged architecture, Sv39 and the H extension. Spec: arches 2.1.
///
///     63   62:61  60:54     53:10  9:8  7  6  5  4  3  2  1  0
///     N    PBMT   reserved  PPN    RSW  D  A  G  U  X  W  R  V
enum GStageBits {
    static let valid: UInt64 = 1 << 0
    static let read: UInt64 = 1 << 1
    static let write: UInt64 = 1 << 2
    static let execute: UInt64 = 1 << 3
    /// The G stage checks every access as one from user mode: a leaf without U maps nothing.
    static let user: UInt64 = 1 << 4
    /// Means nothing in the G stage.
    static let global: UInt64 = 1 << 5
    static let accessed: UInt64 = 1 << 6
    static let dirty: UInt64 = 1 << 7
    /// For software; this kernel keeps nothing there, which is why `tracked` has no bit to use.
    static let software: UInt64 = 3 << 8
    /// The frame number: 44 bits, a physical address of 56.
    static let frame: UInt64 = 0x003f_ffff_ffff_fc00
    static let reserved: UInt64 = 0x7f << 54
    /// Svpbmt. The fault path never sets it; the memory's own attributes hold.
    static let memoryType: UInt64 = 3 << 61
    /// Svnapot.
    static let contiguous: UInt64 = 1 << 63

    static let rights = read | write | execute
    /// A leaf is whatever grants something; a link to a table grants nothing.
    static let link = valid
    /// A leaf's bits without its frame. Kernel: `PAGE_WRITE_EXEC` and `PAGE_READ_EXEC` with U, 0xDF and 0xDB.
    ///
    /// A and D are set beforehand, so that harts that fault on a clear A or D (Svade) work like those that set them
    /// (Svadu); only ageing clears A. D is never cleared, since W alone serves the log (RV-4). X is always there: the
    /// kernel grants execution without being asked.
    static let writableLeaf = valid | read | write | execute | user | accessed | dirty
    static let readOnlyLeaf = writableLeaf & ~write

    /// Every bit of the entry has one meaning.
    static var areDisjoint: Bool {
        let low = valid + read + write + execute + user + global + accessed + dirty + software
        return low == 0x3ff && low + frame + reserved + memoryType + contiguous == ~0
    }

    /// No leaf grants W without R, which the architecture reserves, or spells a part of the frame.
    static var leavesAreLegal: Bool {
        writableLeaf == 0xdf && readOnlyLeaf == 0xdb && (writableLeaf | readOnlyLeaf | link) & frame == 0
    }
}

/// Sv39x4 and Sv48x4: the host's formats with a root four pages long, whose index has two bits more.
struct GStageFormat: RadixFormat {
    let levels: UInt8
    /// The root: 2^2 pages, 16 KiB, naturally aligned because hgatp drops the low two bits of its frame number.
    static let rootOrder = 2

    var rootIndexBits: UInt64 { 11 }
    var empty: UInt64 { 0 }
    var field: FrameField { FrameField(mask: GStageBits.frame, shift: 10, write: GStageBits.write) }

    /// Valid and granting nothing. At the last level there is no table to point to.
    func isTable(_ entry: UInt64, _ level: UInt8) -> Bool {
        level > 1 && entry & (GStageBits.valid | GStageBits.rights) == GStageBits.link
    }

    func isLeaf(_ entry: UInt64, _ level: UInt8) -> Bool {
        entry & GStageBits.valid != 0 && entry & GStageBits.rights != 0
    }

    /// The host frame that a leaf of `level` gives to `frame`.
    func target(of leaf: UInt64, _ level: PageLevel, for frame: GuestFrame) -> HostFrame {
        HostFrame(field.frame(in: leaf).number + frame.number & (level.frames - 1))
    }
}
