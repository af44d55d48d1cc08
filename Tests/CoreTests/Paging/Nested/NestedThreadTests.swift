import Audit
import Frames
import HostMemory
import Testing

@testable import GuestMemory
@testable import Machine
@testable import Paging

@Suite struct X86_4_10_NestedThreads {
    /// The hypervisor's faults hold mmu_lock for reading, and mark tables out of sync side by side.
    @Test(
        arguments: [
            HypervisorFormat.ept(accessDirty: true), .old(.twoLevels, levels: 4), .old(.extended, levels: 5),
        ])
    func `two vCPUs, their host and their logs at once`(_ format: HypervisorFormat) async throws {
        let guest = try NestedGuest(cpus: 2) { format.configure(&$0) }
        try format.makeTables(guest)
        for cpu in guest.cpus { cpu.patience = 1_000_000 }
        let (vm, mmu, space, cpus) = (guest.vm, guest.mmu, guest.space, guest.cpus)
        func hypervisor(_ number: Int) -> @Sendable () throws -> Void {
            {
                let cpu = cpus[number]
                for round in 0..<400 {
                    let page = round * 7 % 32
                    mmu.leaveNested(cpu)
                    let (table, entry) = (4 + page / 16, page % 16)
                    _ = cpu.access(
                        .store(format.leaves(page ^ 1)),
                        at: NestedGuest.place(table, format.isNarrow ? entry / 2 : entry))
                    if round % 3 == 0 { mmu.invalidateEPT(NestedGuest.pointer, cpu) }
                    try format.enter(mmu, cpu)
                    let result = cpu.access(
                        .store(UInt64(round)), at: format.address(page, elsewhere: round % 2 == 0))
                    #expect(result == .stored || result == .emulated)
                }
            }
        }
        try await onThreads([
            hypervisor(0), hypervisor(1),
            {
                for round in 0..<200 { try space.advise(pages(16 + round % 30..<18 + round % 30), .dontNeed) }
            },
            {
                for round in 0..<60 {
                    try vm.setMemoryRegion(
                        MemoryRegion(
                            slot: 0, flags: SlotFlags(logDirtyPages: round % 2 == 0), guestAddress: GuestAddress(0),
                            size: 64 * pageSize, userAddress: at(0)))
                    if round % 2 == 0 { _ = try vm.getDirtyLog(slot: 0) }
                }
            },
        ])
        #expect(mmu.checkTables() == [])
    }
}
