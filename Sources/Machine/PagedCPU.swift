import Audit
import Frames
import GuestMemory
import Hardware
import HostMemory
import Paging
import Synchrony

/// A vCPU under shadow paging, which performs single accesses of 8 bytes at linear addresses. Kernel: a vCPU thread in
/// `KVM_RUN` on a host without two-dimensional paging.
///
/// The processor walks KVM's tables and no other. They decide: the guest's own tables count only where KVM reads them.
public final class PagedCPU: VirtualCPU, @unchecked Sendable {
    // Unchecked: restates the base class; the buffer belongs to the vCPU's own task.
    public let buffer = LinearTranslationBuffer(capacity: 64)
    let mmu: ShadowMMU
    /// What was behind linear pages that the guest has reached, where that is another address. For checks.
    var reachedFrames: [(page: UInt64, count: UInt64, frame: HostFrame, guest: GuestFrame)] = []
    /// Faults in a row after which an access counts as a livelock. Spec: X65.
    public var patience = 1000

    /// `mmu` is that of `vm`.
    public init(number: Int, vm: VirtualMachine, mmu: ShadowMMU) {
        self.mmu = mmu
        super.init(number: number, vm: vm)
    }

    public override func dropTranslations() { buffer.invalidateAll() }

    /// One access, 8-byte aligned. No lock held.
    public func access(_ access: PagedAccess, at address: UInt64) -> PagedAccessResult {
        defer { vm.runPostponedWork() }
        for round in 0..<patience {
            if round > 1 {
                isExplorerAttached ? vm.waitForProgress(at: GuestAddress(address).frame) : yieldProcessor()
            }
            if let end = step(access, at: address) { return end }
        }
        return fail(.i13, "the guest faults again and again without progress", address)
    }

    /// Runs the guest until the access is done or has faulted once: nil after a fault, when the guest is to try again.
    /// As `access`.
    public func step(_ access: PagedAccess, at address: UInt64) -> PagedAccessResult? {
        if let refusal = enterGuest() {
            guard refusal == .halted else { return .dirtyRingFull }
            return sleepUntilReady().map { .failed($0) }
        }
        guard root != nil else {
            exitGuest()
            return .failed(mmu.state(of: self).rootFailure ?? .ENOMEM)
        }
        let result = attempt(access, address)
        exitGuest()
        switch result {
        case .value(let value): return .value(value)
        case .stored: return .stored
        case .misaligned: preconditionFailure("accesses are 8-byte aligned")
        case .fault(.pageFault(let fault)):
            return handle(access, address, present: fault.errorCode & PageFault.present != 0)
        case .fault: return fail(.x23, "the processor can't walk a shadow table", address)
        }
    }

    private func fail(_ rule: Invariant, _ text: StaticReason, _ address: UInt64) -> PagedAccessResult {
        vm.memory.journal?.add(Finding(rule, text, guest: GuestAddress(address).frame))
        return .failed(.EIO)
    }

    /// The guest flushes: a move to CR3 that keeps its value. Kernel: `kvm_set_cr3`, `KVM_REQ_TLB_FLUSH_GUEST`.
    public func flushAll() {
        mmu.syncRoots(self)
        dropTranslations()
    }

    /// Kernel: the exit of an INVLPG.
    public func flush(_ address: UInt64) { mmu.invalidatePage(self, address) }

    /// The registers that the processor really has: KVM's tables, with its own bits of control.
    private var registers: PagingRegisters {
        let state = mmu.state(of: self)
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
        func pointer(_ i: Int) -> UInt64 { vm.memory.entry(i, of: root).loadRacing() & ~(1 << 63) }
        return PageDirectoryPointers(pointer(0), pointer(1), pointer(2), pointer(3))
    }

    /// The processor's walk of KVM's tables.
    var walker: LegacyWalker {
        LegacyWalker(tables: .physical(vm.memory), registers: registers, vcpu: UInt8(truncatingIfNeeded: number))
    }

    private func attempt(_ access: PagedAccess, _ address: UInt64) -> LinearPortResult {
        let port = LinearPort(walker: walker, buffer: buffer)
        let observer = vm.memory.journal?.observer
        if observer != nil { noteGuestFrame(at: address) }
        func reached(_ frame: HostFrame) {
            guard let observer else { return }
            noteGuestFrame(at: address)
            observer.accessed(
                guestFrame(at: address, frame).number, frame.number, isStore: access.kind == .write)
        }
        switch access {
        case .load: return port.load(address, reached: reached)
        case .store(let value): return port.store(address, value, reached: reached)
        case .fetch: return port.fetch(address, reached: reached)
        case .lockedAdd(let value): return port.lockedAdd(address, value, reached: reached)
        }
    }

    /// Lets KVM handle the fault. Nil: run the guest again.
    private func handle(_ access: PagedAccess, _ address: UInt64, present: Bool) -> PagedAccessResult? {
        let state = mmu.state(of: self)
        state.pageFault = nil
        let side = vm.slotReaders.enter()
        defer { vm.slotReaders.exit(side) }
        let fault = GuestFault(address: GuestAddress(address), access: access.kind, entryPresent: present)
        switch vm.mmu.handleFault(self, fault) {
        case .retry, .fixed, .spurious: return state.pageFault.map { .pageFault($0) }
        case .writeProtected, .emulate:
            return emulate(access, state.faultedAddress) { mmu.guestMemoryWritten(self, $0, count: 8) }
        case .failed(let errno), .memoryFault(let errno): return .failed(errno)
        }
    }
}
