import Audit
import Frames
import GuestMemory
import Hardware
import Paging

/// A vCPU whose guest is a hypervisor with guests of its own, which performs single accesses of 8 bytes: of the hypervisor
/// (L1), or of its guest (L2). Both may have paging on; all that they reach is behind KVM's tables.
///
/// The hypervisor's instructions are methods of the MMU: `enterNested`, `leaveNested`, `invalidateEPT`.
public final class NestedCPU: LinearCPU, @unchecked Sendable {
    // Unchecked: restates the base class; the registers belong to the vCPU's own task.
    let mmu: TDPMMU
    /// Of who runs. Whoever changes them flushes (`dropTranslations`). Default: paging off.
    public var registers = PagingRegisters.unpaged

    /// `mmu` is that of `vm`, and made for nested guests.
    public init(number: Int, vm: VirtualMachine, mmu: TDPMMU) {
        self.mmu = mmu
        super.init(number: number, vm: vm)
    }

    override var shadow: ShadowCPU { mmu.shadowState(of: self) }
    override var isOnShadowTables: Bool { mmu.runsNested(self) }
    override func guestMemoryWritten(_ address: GuestAddress) { mmu.guestMemoryWritten(self, address, count: 8) }

    override func attempt(_ access: PagedAccess, _ address: UInt64) -> LinearPortResult {
        let stage = StageTwoTables.tdp(mmu).stage(for: self, nil)
        let walker = LegacyWalker(
            tables: .guest(stage), registers: registers, vcpu: UInt8(truncatingIfNeeded: number))
        return LinearPort(walker: walker, buffer: buffer).perform(access, address) { _ in }
    }

    override func answer(_ fault: LinearResult, to access: PagedAccess, _ address: UInt64) -> PagedAccessResult? {
        switch fault {
        case .pageFault(let fault):
            let code = FaultCode(rawValue: UInt64(fault.errorCode))
            return .pageFault(GuestPageFault(address: fault.address, code: code))
        case .stageTwo(let fault): return guestFault(fault).flatMap { handle(access, $0) }
        case .nonCanonical, .outside, .translated: return failWalk("the processor can't walk KVM's tables", address)
        }
    }

    /// Nil: there is nothing to handle; the exit alone has done it.
    private func guestFault(_ stage: StageTwoFault) -> GuestFault? {
        var fault: GuestFault
        switch stage.result {
        case .violation(let found):
            fault = GuestFault(
                address: found.address, access: found.access, entryPresent: found.present,
                isReserved: found.reason == .reservedBits)
        case .misconfiguration(let found):
            fault = GuestFault(
                address: found.address, access: found.access, entryPresent: found.present, isReserved: true)
        case .modificationLogFull, .translated: return nil
        }
        fault.isOnGuestTables = !stage.finalTranslation
        return fault
    }
}
