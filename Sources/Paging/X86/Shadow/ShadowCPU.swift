import Frames
import GuestMemory
import HostMemory

/// A root in use or remembered: a table of KVM's, for one CR3, nCR3 or EPT pointer. Kernel: `struct kvm_mmu_root_info`.
struct ShadowRoot {
    var page: ShadowPage
    var pointer: UInt64
}

/// What the shadow MMU keeps for a vCPU: the guest's registers, its roots, and tables in reserve.
/// Kernel: `vcpu->arch.mmu`. The vCPU's own task's.
public final class ShadowCPU: CPUExtra, @unchecked Sendable {
    // Unchecked: as the base class.
    /// What is shadowed. Changed with `ShadowMMU.load`.
    var format = GuestEntryFormat(registers: .unpaged)
    public var registers: GuestRegisters { format.registers }
    /// Whether the guest runs at privilege level 3.
    public var isUser = true
    var role = PageRole()
    /// The root of four or five levels, or nil: see `fourRoots`.
    var root: ShadowRoot?
    /// There is no memory where CR3 points: an empty table stands in, and every access faults. Kernel: a dummy root.
    var hasDummyRoot = false
    /// Why there is no root at all.
    public internal(set) var rootFailure: Errno?
    /// Kernel: `prev_roots`, the last used first.
    var earlierRoots: [ShadowRoot] = []
    /// The four pages of level 2 where what is shadowed has fewer than four levels, or has none. See `SpecialRoots.swift`.
    var fourRoots: [ShadowPage?] = []
    /// The tables above them, lowest first: four pointers, and with nested paging those of level 4 and 5.
    var specialTables: [HostFrame] = []
    private var pointers: (UInt64, UInt64, UInt64, UInt64) = (0, 0, 0, 0)
    /// Taken before mmu_lock, where sleeping is allowed. Kernel: `mmu_shadow_page_cache`.
    var stock: [HostFrame] = []
    /// The guest's own fault that the last access came to; whoever runs the guest takes it.
    public var pageFault: GuestPageFault?
    /// The nested guest's fault on its guest hypervisor's tables that the last access came to; likewise.
    public var nestedExit: NestedExit?
    /// The guest hypervisor's own page-modification log, if it has switched it on. Kernel: vmcs12's.
    public var hypervisorLog: HypervisorLog?
    /// The guest physical address of the last fault, if its walk found one. Of a nested guest: the guest hypervisor's.
    public internal(set) var faultedAddress = GuestAddress(0)

    /// Kernel: `kvm_pdptr_read`.
    func pageDirectoryPointers(_ index: Int) -> UInt64 {
        switch index {
        case 0: pointers.0
        case 1: pointers.1
        case 2: pointers.2
        default: pointers.3
        }
    }

    func setPageDirectoryPointers(_ values: (UInt64, UInt64, UInt64, UInt64)) { pointers = values }

    /// Of direct tables: where the last access was that no slot contained.
    var lastMMIO = RememberedMMIO()

    /// Whether the root is made of four pages. Kernel: `pae_root` in use.
    var usesFourRoots: Bool { role.level < 4 || !role.isDirect && format.levels < 4 }
    /// What the processor starts from then.
    var specialTop: HostFrame? { fourRoots.isEmpty ? nil : specialTables.last }
    var hasRoot: Bool { usesFourRoots ? !fourRoots.isEmpty : root != nil || hasDummyRoot }
}
