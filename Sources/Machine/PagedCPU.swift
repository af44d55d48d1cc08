import Audit
import Frames
import GuestMemory
import Hardware
import HostMemory
import Paging
import Synchrony

/// A vCPU under shadow paging, on a host without two-dimensional paging.
///
/// The processor walks KVM's tables and no other. They decide: the guest's own tables count only where KVM reads them.
public final class PagedCPU: LinearCPU, @unchecked Sendable {
    // Unchecked: restates the base class; `reachedFrames` belongs to the vCPU's own task.
    let mmu: ShadowMMU
    /// What was behind linear pages that the guest has reached, where that is another address. For checks.
    var reachedFrames: [(page: UInt64, count: UInt64, frame: HostFrame, guest: GuestFrame)] = []

    /// `mmu` is that of `vm`.
    public init(number: Int, vm: VirtualMachine, mmu: ShadowMMU) {
        self.mmu = mmu
        super.init(number: number, vm: vm)
    }

    override var shadow: ShadowCPU { mmu.state(of: self) }
    override var isOnShadowTables: Bool { true }
    override func guestMemoryWritten(_ address: GuestAddress) { mmu.guestMemoryWritten(self, address, count: 8) }

    /// The guest flushes: a move to CR3 that keeps its value. Kernel: `kvm_set_cr3`, `KVM_REQ_TLB_FLUSH_GUEST`.
    public func flushAll() {
        mmu.syncRoots(self)
        dropTranslations()
    }

    /// Kernel: the exit of an INVLPG.
    public func flush(_ address: UInt64) { mmu.invalidatePage(self, address) }

    /// The walks that KVM makes for a user's OUT, which it emulates: of the instruction, and of the task state, for whether user
    /// code may use the port. The map's place is told at 0x66: Intel SDM volume 1, 19.5.2. Recorded on 6.18.
    public func walkForOutput(at out: UInt64, taskState: UInt64) {
        vm.withSlots {
            _ = mmu.translate(self, out, .user)
            _ = mmu.translate(self, out, [.user, .fetch])
            _ = mmu.translate(self, taskState + 0x66, [])
            _ = mmu.translate(self, taskState + 2, [])
        }
    }

    /// The registers that the processor really has: KVM's tables, with its own bits of control.
    private var registers: PagingRegisters {
        let state = shadow
        let long = state.registers.levels >= 4
        // Without paging of the guest's own, its CR4 does not count. Kernel: `vmx_set_cr4`.
        let prevention =
            PagingRegisters.supervisorExecutionPreventionBit | PagingRegisters.supervisorAccessPreventionBit
        return PagingRegisters(
            cr0: PagingRegisters.pagingBit | PagingRegisters.writeProtectBit, cr3: root?.physicalAddress ?? 0,
            cr4: PagingRegisters.physicalAddressExtensionBit
                | (state.registers.levels == 5 ? PagingRegisters.fiveLevelsBit : 0)
                | (state.registers.isPaged ? state.registers.cr4 & prevention : 0),
            efer: PagingRegisters.noExecuteBit | (long ? PagingRegisters.longModeBit : 0),
            pointers: pointers(long), privilegeLevel: state.isUser ? 3 : 0)
    }

    private func pointers(_ long: Bool) -> PageDirectoryPointers {
        guard !long, let root else { return PageDirectoryPointers() }
        func pointer(_ i: Int) -> UInt64 { vm.memory.entry(i, of: root).loadRacing() }
        return PageDirectoryPointers(pointer(0), pointer(1), pointer(2), pointer(3))
    }

    /// The processor's walk of KVM's tables.
    var walker: LegacyWalker {
        LegacyWalker(tables: .physical(vm.memory), registers: registers, vcpu: UInt8(truncatingIfNeeded: number))
    }

    override func attempt(_ access: PagedAccess, _ address: UInt64) -> LinearPortResult {
        let port = LinearPort(walker: walker, buffer: buffer)
        let observer = vm.memory.journal?.observer
        if observer != nil { noteGuestFrame(at: address) }
        func reached(_ frame: HostFrame) {
            guard let observer else { return }
            noteGuestFrame(at: address)
            observer.accessed(
                guestFrame(at: address, frame).number, frame.number, isStore: access.kind == .write)
        }
        return port.perform(access, address, reached: reached)
    }

    override func answer(_ fault: LinearResult, to access: PagedAccess, _ address: UInt64) -> PagedAccessResult? {
        guard case .pageFault(let fault) = fault else {
            return failWalk("the processor can't walk a shadow table", address)
        }
        let isPresent = fault.errorCode & PageFault.present != 0
        return handle(
            access, GuestFault(address: GuestAddress(address), access: access.kind, entryPresent: isPresent))
    }
}
