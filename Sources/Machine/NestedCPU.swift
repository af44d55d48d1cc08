import Audit
import Frames
import GuestMemory
import Hardware
import HostMemory
import Paging
import Synchrony

/// A vCPU whose guest is a hypervisor with guests of its own, which performs single accesses of 8 bytes: of the hypervisor
/// (L1), or of its guest (L2). Both may have paging on; all that they reach is behind KVM's tables.
///
/// The hypervisor's instructions are methods of the MMU: `enterNested`, `leaveNested`, `invalidateEPT`.
public final class NestedCPU: VirtualCPU, @unchecked Sendable {
    // Unchecked: restates the base class; the rest belongs to the vCPU's own task.
    public let buffer = LinearTranslationBuffer(capacity: 64)
    let mmu: TDPMMU
    /// Of who runs. Whoever changes them flushes (`dropTranslations`). Default: paging off.
    public var registers = PagingRegisters.unpaged
    /// Faults in a row after which an access counts as a livelock. Spec: X65.
    public var patience = 1000

    /// `mmu` is that of `vm`, and made for nested guests.
    public init(number: Int, vm: VirtualMachine, mmu: TDPMMU) {
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
        if enterGuest() != nil { return sleepUntilReady().map { .failed($0) } }
        guard root != nil else {
            exitGuest()
            return .failed(mmu.shadowState(of: self).rootFailure ?? .ENOMEM)
        }
        let result = attempt(access, address)
        exitGuest()
        switch result {
        case .value(let value): return .value(value)
        case .stored: return .stored
        case .misaligned: preconditionFailure("accesses are 8-byte aligned")
        case .fault(.pageFault(let fault)):
            let code = FaultCode(rawValue: UInt64(fault.errorCode))
            return .pageFault(GuestPageFault(address: fault.address, code: code))
        case .fault(.stageTwo(let fault)): return handle(access, fault)
        case .fault: return fail(.x23, "the processor can't walk KVM's tables", address)
        }
    }

    private func fail(_ rule: Invariant, _ text: StaticReason, _ address: UInt64) -> PagedAccessResult {
        vm.memory.journal?.add(Finding(rule, text, guest: GuestAddress(address).frame))
        return .failed(.EIO)
    }

    private func attempt(_ access: PagedAccess, _ address: UInt64) -> LinearPortResult {
        let stage = StageTwoTables.tdp(mmu).stage(for: self, nil)
        let walker = LegacyWalker(
            tables: .guest(stage), registers: registers, vcpu: UInt8(truncatingIfNeeded: number))
        let port = LinearPort(walker: walker, buffer: buffer)
        switch access {
        case .load: return port.load(address)
        case .store(let value): return port.store(address, value)
        case .fetch: return port.fetch(address)
        case .lockedAdd(let value): return port.lockedAdd(address, value)
        }
    }

    /// Lets KVM handle the fault. Nil: run the guest again.
    private func handle(_ access: PagedAccess, _ stage: StageTwoFault) -> PagedAccessResult? {
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
        let state = mmu.shadowState(of: self)
        state.nestedExit = nil
        let side = vm.slotReaders.enter()
        defer { vm.slotReaders.exit(side) }
        let isNested = mmu.runsNested(self)
        switch vm.mmu.handleFault(self, fault) {
        case .retry, .fixed, .spurious: return state.nestedExit.map { .nestedExit($0) }
        case .writeProtected, .emulate:
            // What was to be done to a guest's table, no instruction names: the processor will do it.
            guard stage.finalTranslation else { return nil }
            let address = isNested ? state.faultedAddress : fault.address
            return emulate(access, address) { mmu.guestMemoryWritten(self, $0, count: 8) }
        case .failed(let errno), .memoryFault(let errno): return .failed(errno)
        }
    }
}
