import Frames
import GuestMemory

/// The registers of a vCPU that decide how its own page tables are read. Kernel: `struct kvm_mmu_role_regs`.
public struct GuestRegisters: Sendable, Equatable {
    public var cr0: UInt64
    public var cr3: UInt64
    public var cr4: UInt64
    public var efer: UInt64
    /// Kernel: `vcpu->arch.cpuid` MAXPHYADDR, of the guest.
    public var physicalAddressBits: UInt8 = 46
    /// Whether the guest's processor has leaves of 1 GiB.
    public var hasGigabytePages = true

    public init(cr0: UInt64, cr3: UInt64, cr4: UInt64, efer: UInt64) {
        self.cr0 = cr0
        self.cr3 = cr3
        self.cr4 = cr4
        self.efer = efer
    }

    /// 64-bit mode with four levels: CR0.PG, WP and PE; CR4.PAE; EFER.LME, LMA and NXE.
    public static func longMode(root: GuestAddress, noExecute: Bool = true) -> GuestRegisters {
        GuestRegisters(cr0: 0x8001_0001, cr3: root.value, cr4: 1 << 5, efer: 0x500 | (noExecute ? 0x800 : 0))
    }

    /// 32-bit mode with two levels: CR0.PG, WP and PE; CR4.PSE if `largePages`.
    public static func twoLevels(_ root: UInt64, largePages: Bool = true) -> GuestRegisters {
        GuestRegisters(cr0: 0x8001_0001, cr3: root, cr4: largePages ? 1 << 4 : 0, efer: 0)
    }

    /// 32-bit mode with PAE: CR0.PG, WP and PE; CR4.PAE; EFER.NXE. `pointers` is where the four topmost entries are.
    public static func physicalExtension(_ pointers: UInt64) -> GuestRegisters {
        GuestRegisters(cr0: 0x8001_0001, cr3: pointers, cr4: 1 << 5, efer: 0x800)
    }

    /// As `longMode`, with five levels: CR4.LA57.
    public static func fiveLevels(root: GuestAddress) -> GuestRegisters {
        var registers = longMode(root: root)
        registers.cr4 |= 1 << 12
        return registers
    }

    /// Paging off: guest addresses are physical ones.
    public static let unpaged = GuestRegisters(cr0: 1, cr3: 0, cr4: 0, efer: 0)

    public var isPaged: Bool { cr0 >> 31 & 1 != 0 }
    public var writeProtect: Bool { cr0 >> 16 & 1 != 0 }
    public var pageSizeExtension: Bool { cr4 >> 4 & 1 != 0 }
    public var physicalAddressExtension: Bool { cr4 >> 5 & 1 != 0 }
    public var fiveLevels: Bool { cr4 >> 12 & 1 != 0 }
    public var smep: Bool { cr4 >> 20 & 1 != 0 }
    public var smap: Bool { cr4 >> 21 & 1 != 0 }
    public var isLong: Bool { efer >> 10 & 1 != 0 }
    public var noExecute: Bool { efer >> 11 & 1 != 0 }

    /// Levels of the guest's own tables; 0 without paging. Kernel: `role_regs_to_root_level`.
    public var levels: UInt8 {
        guard isPaged else { return 0 }
        if isLong { return fiveLevels ? 5 : 4 }
        return physicalAddressExtension ? 3 : 2
    }

    /// What of the registers a shadow page depends on. Kernel: `kvm_calc_cpu_role`, its base. Spec: x86 1.6.
    public func role(space: UInt8) -> PageRole {
        var role = PageRole()
        role.access = .all
        role.space = space
        guard isPaged else {
            role.isDirect = true
            return role
        }
        role.noExecuteEnabled = noExecute
        role.writeProtect = writeProtect
        role.smepWithoutWriteProtect = smep && !writeProtect
        role.smapWithoutWriteProtect = smap && !writeProtect
        role.has4ByteEntries = !physicalAddressExtension
        role.level = levels
        return role
    }

    /// The role of the root that shadows these tables. Shadow tables have at least three levels, and NX: KVM runs in
    /// 64-bit mode whatever its guest does. Kernel: `kvm_init_shadow_mmu`.
    public func rootRole(space: UInt8) -> PageRole {
        var role = role(space: space)
        role.level = max(levels, 3)
        role.noExecuteEnabled = true
        return role
    }
}
