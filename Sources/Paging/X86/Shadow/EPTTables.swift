/// Second-stage tables in EPT's format that a guest hypervisor made for its guest: what of its VMCS and of the processor
/// that KVM shows it decides how they are read. Kernel: EPT12, `kvm_init_shadow_ept_mmu`. Spec: x86 1.1, 4.10.
public struct EPTTables: Sendable, Equatable {
    /// EPTP12: 2:0 memory type, 5:3 levels - 1, 6 accessed and dirty bits on, 51:12 the topmost table.
    public let pointer: UInt64
    /// MAXPHYADDR, of the guest hypervisor.
    public let physicalAddressBits: UInt8
    /// Whether its processor has leaves of 1 GiB.
    public let hasGigabytePages: Bool
    /// Whether it may execute what it can't read.
    public let executeOnly: Bool

    public init(
        pointer: UInt64, physicalAddressBits: UInt8 = 46, hasGigabytePages: Bool = true, executeOnly: Bool = true
    ) {
        self.pointer = pointer
        self.physicalAddressBits = physicalAddressBits
        self.hasGigabytePages = hasGigabytePages
        self.executeOnly = executeOnly
    }

    public var accessDirty: Bool { pointer >> 6 & 1 != 0 }
    public var levels: UInt8 { UInt8(truncatingIfNeeded: pointer >> 3 & 7) + 1 }

    /// What the entry of the guest hypervisor's VMCS must be: write-back or uncached, 4 or 5 levels, nothing reserved.
    /// Kernel: `nested_vmx_check_eptp`.
    public var isValid: Bool {
        let memoryType = pointer & 7
        return (memoryType == 0 || memoryType == 6) && (levels == 4 || levels == 5)
            && pointer & (0xf80 | ~0 << UInt64(physicalAddressBits)) == 0
    }

    /// Kernel: `FNAME(gpte_access)`. Spec: x86 1.3.
    static func rights(_ entry: UInt64) -> Rights {
        var rights: Rights = []
        if entry & 1 != 0 { rights.insert(.user) }
        if entry & 2 != 0 { rights.insert(.write) }
        if entry & 4 != 0 { rights.insert(.execute) }
        return rights
    }

    /// Of a present entry. Spec: x86 1.1, 1.2.
    func hasReservedBit(_ entry: UInt64, _ level: UInt8, isLeaf: Bool) -> Bool {
        if isLeaf && level == 3 && !hasGigabytePages { return true }
        return EntryBits.isReservedOfEPT(
            entry, level, isLeaf: isLeaf, physicalAddressBits: UInt64(physicalAddressBits), executeOnly: executeOnly)
    }
}
