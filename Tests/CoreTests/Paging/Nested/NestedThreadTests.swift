import Audit
import Frames
import HostMemory
import Testing

@testable import GuestMemory
@testable import Machine
@testable import Paging

@Suite struct X86_4_10_NestedThreads {
    /// The hypervisor's faults hold mmu_lock for reading, and mark tables out of sync side by side.
    @Test func `two vCPUs, their host and their logs at once`() async throws {
        let guest = try NestedGuest(cpus: 2)
        try guest.makeTables()
        for cpu in guest.cpus { cpu.patience = 1_000_000 }
        let (vm, mmu, space, cpus) = (guest.vm, guest.mmu, guest.space, guest.cpus)
        func hypervisor(_ number: Int) -> @Sendable () throws -> Void {
            {
                let cpu = cpus[number]
                for round in 0..<400 {
                    let page = UInt64(round * 7 % 32)
                    mmu.leaveNested(cpu)
                    let entry = NestedGuest.leaf(Int(page) ^ 1)
                    _ = cpu.access(.store(entry), at: NestedGuest.place(4, Int(page)))
                    if round % 3 == 0 { mmu.invalidateEPT(NestedGuest.pointer, cpu) }
                    try mmu.enterNested(EPTTables(pointer: NestedGuest.pointer), cpu)
                    let result = cpu.access(.store(UInt64(round)), at: page << 12)
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
