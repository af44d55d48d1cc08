import Frames

/// What a table is for: the word by which KVM tells two shadow pages of one guest frame apart.
/// Kernel: `union kvm_mmu_page_role`. Spec: x86 1.6, with the bits where the kernel has them.
public struct PageRole: Sendable, Equatable {
    public var rawValue: UInt32
    public init(rawValue: UInt32 = 0) { self.rawValue = rawValue }

    private func field(_ shift: UInt32, _ mask: UInt32) -> UInt32 { rawValue >> shift & mask }
    private mutating func set(_ shift: UInt32, _ mask: UInt32, _ value: UInt32) {
        rawValue = rawValue & ~(mask << shift) | (value & mask) << shift
    }
    private func flag(_ bit: UInt32) -> Bool { rawValue >> bit & 1 != 0 }
    private mutating func set(_ bit: UInt32, _ value: Bool) { set(bit, 1, value ? 1 : 0) }

    /// 1 to 5.
    public var level: UInt8 {
        get { UInt8(field(0, 15)) }
        set { set(0, 15, UInt32(newValue)) }
    }
    /// The guest's entries are 4 bytes long: a guest table is shadowed by two or four pages.
    public var has4ByteEntries: Bool {
        get { flag(4) }
        set { set(4, newValue) }
    }
    /// Which of those.
    public var quadrant: UInt8 {
        get { UInt8(field(5, 3)) }
        set { set(5, 3, UInt32(newValue)) }
    }
    /// Maps guest frames one to one: no table of the guest's stands behind it.
    public var isDirect: Bool {
        get { flag(7) }
        set { set(7, newValue) }
    }
    public var access: Rights {
        get { Rights(rawValue: UInt8(field(8, 7))) }
        set { set(8, 7, UInt32(newValue.rawValue)) }
    }
    /// On its way out: found by nobody, but perhaps still a vCPU's root.
    public var isInvalid: Bool {
        get { flag(11) }
        set { set(11, newValue) }
    }
    public var noExecuteEnabled: Bool {
        get { flag(12) }
        set { set(12, newValue) }
    }
    public var writeProtect: Bool {
        get { flag(13) }
        set { set(13, newValue) }
    }
    public var smepWithoutWriteProtect: Bool {
        get { flag(14) }
        set { set(14, newValue) }
    }
    public var smapWithoutWriteProtect: Bool {
        get { flag(15) }
        set { set(15, newValue) }
    }
    /// Kernel: `ad_disabled`.
    public var accessDirtyDisabled: Bool {
        get { flag(16) }
        set { set(16, newValue) }
    }
    /// Used while a nested guest runs.
    public var isGuestMode: Bool {
        get { flag(17) }
        set { set(17, newValue) }
    }
    /// The topmost level of a host with five, for a guest hypervisor with four.
    public var isPassthrough: Bool {
        get { flag(18) }
        set { set(18, newValue) }
    }
    /// The address space: 1 in system management mode. Kernel: `smm`, `as_id`.
    public var space: UInt8 {
        get { UInt8(field(24, 255)) }
        set { set(24, 255, UInt32(newValue)) }
    }

    /// Whether the page stands for entries of the guest's. Kernel: `sp_has_gptes`.
    public var shadowsEntries: Bool { !isDirect && !isPassthrough }

    /// Whether a page of this role can be brought up to date under a root of `root`'s role. Kernel: `sync_role_ign`.
    public func canSync(under root: PageRole) -> Bool {
        (rawValue ^ root.rawValue) & ~Self.ignoredBySync == 0
    }
    private static let ignoredBySync: UInt32 = 15 | 3 << 5 | 7 << 8 | 1 << 18

    /// The root of a TDP tree. Kernel: `kvm_calc_tdp_mmu_root_page_role`. Example: 0x3784.
    public static func tdpRoot(levels: UInt8, accessDirty: Bool, space: UInt8 = 0, guestMode: Bool = false) -> PageRole
    {
        var role = PageRole()
        role.level = levels
        role.access = .all
        role.writeProtect = true
        role.noExecuteEnabled = true
        role.isDirect = true
        role.space = space
        role.isGuestMode = guestMode
        role.accessDirtyDisabled = !accessDirty
        return role
    }
}

/// What a guest's tables permit, in KVM's own three bits. Kernel: `ACC_*`. Spec: x86 1.3.
public struct Rights: OptionSet, Sendable {
    public let rawValue: UInt8
    public init(rawValue: UInt8) { self.rawValue = rawValue }
    public static let execute = Rights(rawValue: 1)
    public static let write = Rights(rawValue: 2)
    /// Of EPT entries: read.
    public static let user = Rights(rawValue: 4)
    public static let all: Rights = [.execute, .write, .user]
}
