import Frames

/// How a processor translates linear addresses. Source: Intel SDM volume 3, "Paging modes and control bits".
public enum PagingMode: Sendable, CaseIterable {
    /// Linear addresses are physical ones.
    case off
    /// 4-byte entries, two levels.
    case bits32
    /// 8-byte entries, two levels below four pointers.
    case pae
    case fourLevel
    case fiveLevel

    /// The level of the table that CR3 points to, or of the pointers of PAE; 0 with paging off.
    public var topLevel: UInt8 {
        switch self {
        case .off: 0
        case .bits32: 2
        case .pae: 3
        case .fourLevel: 4
        case .fiveLevel: 5
        }
    }

    /// Whether the processor is in IA-32e mode: linear addresses of 64 bits, protection keys.
    public var isLong: Bool { self == .fourLevel || self == .fiveLevel }
}

/// What a processor's paging depends on besides its registers. Source: CPUID.
public struct PagingProcessor: Sendable, Equatable {
    /// MAXPHYADDR, 32 to 52.
    public let physicalAddressBits: Int
    /// Whether a level 3 entry may map 1 GiB.
    public let gigabytePages: Bool
    /// AMD reserves bit 8 in entries of level 4 and 5, which Intel ignores. Spec: x86 1.2.
    public let isAMD: Bool

    public init(physicalAddressBits: Int = 46, gigabytePages: Bool = true, isAMD: Bool = false) {
        precondition((32...52).contains(physicalAddressBits), "MAXPHYADDR is 32 to 52")
        self.physicalAddressBits = physicalAddressBits
        self.gigabytePages = gigabytePages
        self.isAMD = isAMD
    }
}

/// The four page-directory pointers of PAE paging, as the processor holds them.
public struct PageDirectoryPointers: Sendable, Equatable {
    public var pointers: (UInt64, UInt64, UInt64, UInt64)

    public init(_ a: UInt64 = 0, _ b: UInt64 = 0, _ c: UInt64 = 0, _ d: UInt64 = 0) { pointers = (a, b, c, d) }

    public subscript(_ index: Int) -> UInt64 {
        switch index & 3 {
        case 0: pointers.0
        case 1: pointers.1
        case 2: pointers.2
        default: pointers.3
        }
    }

    public static func == (a: Self, b: Self) -> Bool { a.pointers == b.pointers }
}

/// The registers that paging reads, as the processor holds them; other bits than those named here are ignored.
/// Left out: CR4.CET, CR4.PKS, linear-address masking.
public struct PagingRegisters: Sendable, Equatable {
    public var cr0: UInt64
    public var cr3: UInt64
    public var cr4: UInt64
    public var efer: UInt64
    public var pkru: UInt32
    /// Loaded with CR3 in PAE paging; see `LegacyWalker.loadPageDirectoryPointers`.
    public var pointers: PageDirectoryPointers
    /// CPL, 0 to 3.
    public var privilegeLevel: UInt8
    /// EFLAGS.AC.
    public var alignmentCheck: Bool

    public init(
        cr0: UInt64, cr3: UInt64, cr4: UInt64, efer: UInt64, pkru: UInt32 = 0,
        pointers: PageDirectoryPointers = PageDirectoryPointers(), privilegeLevel: UInt8 = 0,
        alignmentCheck: Bool = false
    ) {
        self.cr0 = cr0
        self.cr3 = cr3
        self.cr4 = cr4
        self.efer = efer
        self.pkru = pkru
        self.pointers = pointers
        self.privilegeLevel = privilegeLevel
        self.alignmentCheck = alignmentCheck
    }

    // CR0.
    /// Paging off: linear addresses are physical ones.
    public static let unpaged = PagingRegisters(cr0: 1, cr3: 0, cr4: 0, efer: 0)

    public static let writeProtectBit: UInt64 = 1 << 16
    public static let pagingBit: UInt64 = 1 << 31
    // CR4.
    public static let largePagesBit: UInt64 = 1 << 4
    public static let physicalAddressExtensionBit: UInt64 = 1 << 5
    public static let fiveLevelsBit: UInt64 = 1 << 12
    public static let supervisorExecutionPreventionBit: UInt64 = 1 << 20
    public static let supervisorAccessPreventionBit: UInt64 = 1 << 21
    public static let protectionKeysBit: UInt64 = 1 << 22
    // EFER.
    public static let longModeBit: UInt64 = 1 << 8
    public static let noExecuteBit: UInt64 = 1 << 11

    /// CR0.WP.
    public var writeProtect: Bool { cr0 & Self.writeProtectBit != 0 }
    /// CR4.PSE: level 2 entries of 32-bit paging may map 4 MiB.
    public var largePages: Bool { cr4 & Self.largePagesBit != 0 }
    /// CR4.SMEP.
    public var supervisorExecutionPrevention: Bool { cr4 & Self.supervisorExecutionPreventionBit != 0 }
    /// CR4.SMAP.
    public var supervisorAccessPrevention: Bool { cr4 & Self.supervisorAccessPreventionBit != 0 }
    /// CR4.PKE, where it has an effect.
    public var protectionKeys: Bool { mode.isLong && cr4 & Self.protectionKeysBit != 0 }
    /// EFER.NXE, where it has an effect: entries of 32-bit paging have no such bit.
    public var noExecute: Bool {
        efer & Self.noExecuteBit != 0 && cr4 & Self.physicalAddressExtensionBit != 0
    }

    /// Long mode without CR4.PAE, which the processor does not enter, counts as 32-bit paging.
    public var mode: PagingMode {
        guard cr0 & Self.pagingBit != 0 else { return .off }
        guard cr4 & Self.physicalAddressExtensionBit != 0 else { return .bits32 }
        guard efer & Self.longModeBit != 0 else { return .pae }
        return cr4 & Self.fiveLevelsBit != 0 ? .fiveLevel : .fourLevel
    }

    /// The address as the mode uses it: 32 bits of it outside of IA-32e mode. Nil if it is not canonical.
    func effective(_ address: UInt64) -> UInt64? {
        let mode = mode
        guard mode.isLong else { return address & 0xffff_ffff }
        // All bits from the highest that the tables translate on are equal.
        let high = Int64(bitPattern: address) >> (11 + 9 * Int64(mode.topLevel))
        return high == 0 || high == -1 ? address : nil
    }
}
