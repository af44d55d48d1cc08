// Interface: KVM's memory ioctls on the model, with KVM's structures, return values and errnos.
//
// It guarantees that each call is judged in KVM's order: who calls, then what is passed, then what the core says. What the
// core checks is never checked here again; here is only what KVM does before it gets there (copying structures, flags of the
// older calls, arguments of capabilities). Read `Calls.swift` next, then `VirtualCPU.swift`; `ModelExecutor.swift` runs
// scripts on it.

import Audit
import CKVMInterface
import Frames
import GuestMemory
import HostMemory
import IoctlScript
import Machine

/// A VM's descriptor. Kernel: what `KVM_CREATE_VM` returns.
///
/// One task calls at a time.
public final class VirtualMachine {
    /// The VM itself, `GuestMemory`'s.
    public let core: GuestMemory.VirtualMachine
    let tables: StageTwoTables
    /// Where the descriptors that calls make are put, and those that they name are looked up.
    public let descriptors: Descriptors
    /// By creation.
    public private(set) var cpus: [VirtualCPU] = []

    /// Of a guest that has page tables.
    private var guestTables: GuestTables?

    /// What the kernel has whose VM this is.
    let features: KernelFeatures

    /// Kernel: `KVM_CREATE_VM`. EINVAL for a type that there is not.
    public init(
        process: AddressSpace, type: UInt64 = UInt64(KVM_X86_DEFAULT_VM), descriptors: Descriptors = Descriptors(),
        features: KernelFeatures = KernelFeatures()
    ) throws(Errno) {
        guard type < 64, features.types >> type & 1 == 1 else { throw .EINVAL }
        self.descriptors = descriptors
        self.features = features
        tables = features.tables
        tables.mmu.mostSlotPages = features.slotPages
        core = GuestMemory.VirtualMachine(
            addressSpace: process, mmu: tables.mmu,
            type: type == UInt64(KVM_X86_SW_PROTECTED_VM) ? .softwareProtected : .standard,
            bindsGuestMemory: features.guestMemoryOfAll)
    }

    /// No descriptor of the VM or of its vCPUs is open any more. It ends now, or with its last file of private memory.
    /// Kernel: `kvm_put_kvm`.
    public func destroy() {
        core.destroy()
        cpus = []
    }

    /// Adds what breaks a rule now, at rest, to the journal.
    public func check(_ journal: Journal) {
        Checks(vm: core, tables: tables, cpus: cpus.compactMap(\.directCore), policy: .precise).run(journal)
    }

    /// The most vCPUs of one VM. Kernel: `KVM_MAX_VCPUS`, 1024 on x86; the model's events have 8 bits for them.
    public static let mostCPUs = 255

    /// Kernel: `KVM_CREATE_VCPU`. EINVAL: no such identity, or too many; EEXIST: it is taken; ENOMEM: no
    /// memory for its dirty ring.
    public func createCPU(id: UInt64) throws(Errno) -> VirtualCPU {
        guard id < features.cpuIdentities, cpus.count < Self.mostCPUs else { throw .EINVAL }
        guard !cpus.contains(where: { $0.id == id }) else { throw .EEXIST }
        let made: VirtualCPU
        if case .shadow(let mmu) = tables, let layout = features.guest {
            let cpu = PagedCPU(number: cpus.count, vm: core, mmu: mmu)
            try core.create(cpu)
            made = VirtualCPU(id: id, paged: PagedGuest(cpu, mmu, layout, try makeGuestTables(layout)), vm: self)
        } else {
            let cpu = GuestCPU(number: cpus.count, vm: core, tables: tables)
            try core.create(cpu)
            made = VirtualCPU(id: id, core: cpu, vm: self)
        }
        cpus.append(made)
        return made
    }

    /// Made with the first vCPU.
    private func makeGuestTables(_ layout: GuestLayout) throws(Errno) -> GuestTables {
        if let guestTables { return guestTables }
        let made = try GuestTables(layout, core)
        guestTables = made
        return made
    }
}
