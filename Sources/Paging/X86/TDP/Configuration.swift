import Frames

/// What hardware, module parameters and capabilities make of a TDP MMU. Fixed when it is made.
public struct TDPConfiguration: Sendable, Equatable {
    /// Whose second-stage tables: Intel's or AMD's.
    public enum Format: Sendable { case ept, npt }

    public var format = Format.ept
    /// Levels of tables: 4 or 5. Kernel: `tdp_mmu_root_level`.
    public var levels: UInt8 = 4
    /// Hardware keeps A and D (EPTP bit 6). Without it KVM takes rights away to see accesses. NPT always does.
    public var accessDirty = true
    /// EPT: the processor executes what it may not read. Kernel: `cpu_has_vmx_ept_execute_only`.
    public var executeOnly = true
    /// The largest leaf that a fault installs, up to 1 GiB.
    public var largestPage = PageLevel.page2M
    /// MAXPHYADDR of the host.
    public var physicalAddressBits: UInt64 = 46
    /// Address bits of the first-level cache, of a processor that has the L1TF flaw; 0: it has not. Kernel:
    /// `x86_cache_bits`.
    public var cacheAddressBits: UInt64 = 0
    /// Entries of a vCPU's page-modification log: 512, or 0 for none. Kernel: `cpu_dirty_log_size`. Intel's alone.
    public var modificationLogEntries: UInt32 = 0
    /// Whether huge leaves of a slot are split as soon as it is logged, not at the next write. Kernel:
    /// `eager_page_split`.
    public var eagerSplit = true
    /// Whether huge leaves are never executable, against a machine check that a guest can cause. Kernel:
    /// `nx_huge_pages`. `TDPMMU.setNXHugePages` changes it later.
    public var nxHugePages = false
    /// Whether an access without a slot leaves an entry that makes the next one a quick exit. Kernel:
    /// `enable_mmio_caching`.
    public var cachesMMIO = true
    /// Whether slots can have frames that the guest must not write unheard. Kernel: `kvm_page_track_write_tracking_enabled`.
    public var tracksWrites = false
    /// Whether the guest may be a hypervisor, whose guests' second-stage tables are shadowed. Kernel: the module parameter
    /// `nested`.
    public var nested = false
    /// Whether deleting a slot removes only that slot's leaves. Kernel: the quirk `SLOT_ZAP_ALL`, off.
    public var zapsOnlySlot = false
    /// Bits of the addresses that slots may have; nil: as many as the tables translate. Kernel: `kvm_mmu_max_gfn`, 52
    /// where KVM has no second-stage tables.
    public var slotAddressBits: UInt64?
    /// 2 with system management mode.
    public var addressSpaces = 1

    public init() {}

    /// Traps if no such machine exists.
    func check() {
        precondition(levels == 4 || levels == 5, "second-stage tables have 4 or 5 levels")
        precondition(largestPage <= .page1G, "no second-stage leaf is larger than 1 GiB")
        precondition(addressSpaces == 1 || addressSpaces == 2, "a vCPU is in system management mode or not")
        precondition((32...52).contains(physicalAddressBits), "MAXPHYADDR is 32 to 52")
        precondition(
            cacheAddressBits == 0 || (physicalAddressBits...46).contains(cacheAddressBits),
            "an address that the cache does not know, or no room to hide one from it")
        precondition(accessDirty || format == .ept, "AMD's processors have always had A and D in nested tables")
        precondition(
            modificationLogEntries == 0 || (modificationLogEntries == 512 && format == .ept && accessDirty),
            "the page-modification log has 512 entries, is Intel's, and needs D")
    }

    var entryBits: EntryBits {
        var bits = format == .ept ? EntryBits.ept(executeOnly: executeOnly) : .legacy
        bits.unreachable = EntryBits.unreachable(cacheAddressBits: cacheAddressBits)
        return bits
    }

    /// The first guest frame for which there can be no MMIO entry. Kernel: `kvm_mmu_max_gfn`. Spec: x86 1.5.
    var endOfGuestFrames: UInt64 { 1 << (physicalAddressBits - 12) }
}
