import Frames
import GuestMemory
import HostMemory
import Paging
import Synchrony

// A world under shadow paging: its guest has page tables, and changes them.

extension World {
    /// The guest's tables are in memory, and its vCPUs' registers say where.
    func startGuest() throws(PlanError) {
        guard let guestTables, case .shadow(let mmu) = tables, let region = plan.pageTables else { return }
        guard guestTables.size <= plan.regions[region].size else { throw .region(region, .ENOSPC) }
        do throws(Errno) {
            for index in guestTables.tables.indices {
                try addressSpace.writePage(
                    plan.regions[region].address + UInt64(index) << pageShift, guestTables.words(of: index))
            }
        } catch {
            throw .region(region, error)
        }
        var registers = GuestRegisters.longMode(root: guestTables.base)
        // More than the guest's memory needs, so that its tables can lie above.
        registers.physicalAddressBits = 48
        for cpu in pagedCPUs { mmu.load(registers, on: cpu) }
    }

    func pagedAccess(_ cpu: Int, _ kind: AccessKind, _ address: GuestAddress, _ value: UInt64) -> StepOutcome {
        switch kind {
        case .read: outcome(of: pagedCPUs[cpu].access(.load, at: address.value), cpu)
        case .write: outcome(of: pagedCPUs[cpu].access(.store(value), at: address.value), cpu)
        case .execute: outcome(of: pagedCPUs[cpu].access(.fetch, at: address.value), cpu, isFetch: true)
        }
    }

    private func outcome(of result: PagedAccessResult, _ cpu: Int, isFetch: Bool = false) -> StepOutcome {
        switch result {
        case .value(let value): isFetch ? .done : .value(value)
        case .stored: .done
        case .emulated: .emulated
        case .mmio: .mmio
        case .dirtyRingFull: .dirtyRingFull
        // Its guest is no hypervisor.
        case .pageFault, .nestedExit: .pageFault
        case .failed(let errno): errno == .EFAULT && pagedCPUs[cpu].memoryFault != nil ? .memoryFault : .error(errno)
        }
    }

    /// Only a vCPU's own task calls it. ENOENT: the guest has no table there.
    func changeGuestTables(_ action: Action, _ actor: TaskPlan.Actor) throws(Errno) -> StepOutcome {
        guard case .virtualCPU(let number) = actor, pagedCPUs.indices.contains(number) else { throw .EINVAL }
        consumers?.writers.lockForRead()
        defer { consumers?.writers.unlockRead() }
        let cpu = pagedCPUs[number]
        switch action {
        case .mapPage(let address, let target, let level, let rights):
            let entry = GuestTables.entry(to: target, level: level, rights)
            return outcome(of: cpu.access(.store(entry), at: try place(address, level)), number)
        case .unmapPage(let address, let level):
            return outcome(of: cpu.access(.store(0), at: try place(address, level)), number)
        case .restorePage(let address, let level):
            let entry = guestTables?.original(of: address.value, level: level) ?? 0
            return outcome(of: cpu.access(.store(entry), at: try place(address, level)), number)
        case .protectPage(let address, let level, let rights):
            let place = try place(address, level)
            let found = cpu.access(.load, at: place)
            guard case .value(let entry) = found else { return outcome(of: found, number) }
            return outcome(of: cpu.access(.store(GuestTables.with(rights, entry)), at: place), number)
        case .flushPage(let address): cpu.flush(address.value)
        case .loadCR3: cpu.flushAll()
        default: throw .EINVAL
        }
        return .done
    }

    /// The linear address of the guest's entry, which is its physical one.
    private func place(_ address: GuestAddress, _ level: UInt8) throws(Errno) -> UInt64 {
        guard let place = guestTables?.place(of: address.value, level: level) else { throw .ENOENT }
        return place.value
    }
}
