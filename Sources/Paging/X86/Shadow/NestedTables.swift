import Audit
import Frames
import GuestMemory
import HostMemory

/// A nested guest's fault on the tables that its guest hypervisor made: what that sees of it.
public enum NestedExit: Sendable, Equatable {
    /// Kernel: `EXIT_REASON_EPT_VIOLATION`. Bits 2:0 of the qualification the access, 5:3 what the entries permit, 7 and 8
    /// of the real exit. Spec: x86 4.6.
    case violation(GuestAddress, qualification: UInt64)
    /// Kernel: `EXIT_REASON_EPT_MISCONFIG`.
    case misconfiguration(GuestAddress)
    /// Kernel: `EXIT_REASON_PML_FULL`.
    case modificationLogFull
    /// AMD's nested page fault, with EXITINFO1. Kernel: `SVM_EXIT_NPF`.
    case pageFault(GuestAddress, code: UInt64)
}

/// A guest hypervisor's page-modification log: KVM fills it for the processor. Kernel: `pml_address`, `guest_pml_index`
/// of vmcs12.
public struct HypervisorLog: Sendable, Equatable {
    public let page: GuestAddress
    /// The entry that is taken next, from 511 down; above that: full.
    public var index: UInt16

    public init(page: GuestAddress, index: UInt16 = 511) {
        self.page = page
        self.index = index
    }
}

/// Shadowing what a guest hypervisor made for its guest: L2's addresses to L1's, behind which stand the slots, so that
/// reverse maps, logs and notifiers know L1's frames alone. Spec: x86 4.10.
///
/// Left out: MMIO entries.
extension ShadowMMU {
    /// Whether a vCPU's hardware runs on these tables.
    func isInUse(by cpu: VirtualCPU) -> Bool { base.map { $0.state(of: cpu).usesNestedTables } ?? true }

    /// The role of the root that shadows EPT tables. Kernel: `kvm_calc_shadow_ept_root_page_role`. Spec: x86 1.6.
    private func role(of tables: EPTTables, _ cpu: VirtualCPU) -> PageRole {
        var role = PageRole()
        role.level = tables.levels
        role.access = .all
        role.isGuestMode = true
        role.accessDirtyDisabled = !tables.accessDirty
        role.space = cpu.addressSpaceNumber
        return role
    }

    /// EPT: what is cached for the same pointer stays as it is until the guest hypervisor says INVEPT.
    func load(_ tables: EPTTables, on cpu: VirtualCPU) {
        load(GuestEntryFormat(tables), role(of: tables, cpu), on: cpu)
    }

    /// NPT: with each entry of a nested guest and each exit everything is synced. `registers` are the guest hypervisor's,
    /// with nCR3; its CR0.WP does not count, since all accesses are a user's. With fewer than four levels the root is a special
    /// one. Kernel: `kvm_init_shadow_npt_mmu`.
    func loadNPT(_ registers: GuestRegisters, levels: UInt8, on cpu: VirtualCPU) {
        var registers = registers
        registers.cr0 &= ~(1 << 16)
        var role = registers.role(space: cpu.addressSpaceNumber)
        role.isGuestMode = true
        role.level = levels
        role.isPassthrough = levels == 5 && registers.levels == 4
        load(GuestEntryFormat(registers: registers), role, on: cpu)
        syncRoots(cpu)
    }

    /// The guest hypervisor says that it has changed its tables: those that `pointer` names, or all. What shadows them is
    /// forgotten, and made anew when it is needed. Kernel: `handle_invept`. Takes mmu_lock.
    func forget(pointer: UInt64?, _ cpu: VirtualCPU) {
        dropRoots(cpu) { root in
            guard let pointer else { return true }
            return (root.pointer ^ pointer) & EntryBits.frameMask == 0
        }
    }

    /// What the guest hypervisor is told. A stale entry may be cached by other pointers to the same tables too: those are
    /// synced for the address. Kernel: `nested_ept_inject_page_fault`, `nested_svm_inject_npf_exit`.
    func injectNested(_ failure: GuestWalkFailure, _ fault: GuestFault, _ cpu: VirtualCPU) {
        let state = state(of: cpu)
        let address = fault.address
        guard state.format.ept != nil else {
            let which: UInt64 = fault.isOnGuestTables ? 1 << 33 : 1 << 32
            state.nestedExit = .pageFault(address, code: failure.pageFault.code.rawValue | which)
            return
        }
        if failure.logIsFull {
            state.nestedExit = .modificationLogFull
        } else if failure.pageFault.code.contains(.reserved) {
            state.nestedExit = .misconfiguration(address)
        } else {
            // Kernel: `nested_ept_invalidate_addr`.
            let pointer = state.format.pointer
            invalidate(
                address.value, cpu, earlierRoots: { ($0.pointer ^ pointer) & EntryBits.frameMask == 0 })
            let access = UInt64(FaultCode(ofEPT: fault).rightsOfEPT.qualification)
            let permitted = UInt64(failure.rights.qualification) << 3
            let real: UInt64 = 1 << 7 | (fault.isOnGuestTables ? 0 : 1 << 8)
            state.nestedExit = .violation(address, qualification: access | permitted | real)
        }
    }

    /// The nested guest is about to make a page dirty: whether its guest hypervisor's log, if there is one, has taken it.
    /// The page of a log that can't be written is passed over. Caller inside `withSlots`. Kernel: `vmx_write_pml_buffer`.
    func logForHypervisor(_ cpu: VirtualCPU, _ address: GuestAddress) -> Bool {
        let state = state(of: cpu)
        guard isInUse(by: cpu), base != nil, var log = state.hypervisorLog else { return true }
        guard log.index < 512 else { return false }
        let entry = address.value & ~(pageSize - 1)
        do throws(Errno) {
            try withUnsafeBytes(of: entry) { (bytes) throws(Errno) in
                try cpu.writeGuest(GuestAddress(log.page.value + UInt64(log.index) * 8), from: bytes)
            }
        } catch { return true }
        log.index &-= 1
        state.hypervisorLog = log
        return true
    }
}

extension Rights {
    /// As an EPT violation's qualification has them: read, write, execute.
    fileprivate var qualification: UInt8 {
        (contains(.user) ? 1 : 0) | (contains(.write) ? 2 : 0) | (contains(.execute) ? 4 : 0)
    }
}

extension FaultCode {
    /// What an EPT violation says of the access: U stands for a read. Spec: x86 0.3.
    init(ofEPT fault: GuestFault) {
        var code: FaultCode = fault.entryPresent ? .present : []
        switch fault.access {
        case .read: code.insert(.user)
        case .write: code.insert(.write)
        case .execute: code.insert(.fetch)
        }
        self = code
    }

    /// What the access needs of an EPT entry.
    var rightsOfEPT: Rights {
        var rights: Rights = []
        if contains(.user) { rights.insert(.user) }
        if contains(.write) { rights.insert(.write) }
        if contains(.fetch) { rights.insert(.execute) }
        return rights
    }
}
