import Audit
import Frames
import HostMemory
import Testing

@testable import GuestMemory
@testable import Paging

/// Frames that the guest must not write unheard. Spec: x86 2.4, 2.11, 3.8, X41, X48, F3.
@Suite struct X48_WriteTracking {
    private func machine(thp: Bool = false, cpus: Int = 1, _ change: (inout TDPConfiguration) -> Void = { _ in })
        -> TDPMachine
    {
        TDPMachine(thp: thp, cpus: cpus) {
            $0.tracksWrites = true
            change(&$0)
        }
    }
    private func flushes(_ machine: TDPMachine) -> UInt64 {
        machine.statistics.remote_tlb_flush_requests.load(ordering: .relaxed)
    }

    @Test func `tracking takes W and MW, and a write is emulated`() throws {
        let machine = machine()
        try machine.slot(count: 8)
        machine.fault(.write, 1)
        machine.fault(.write, 2)
        let before = flushes(machine)
        try machine.mmu.track(GuestFrame(1))
        #expect(flushes(machine) == before + 1)
        let entry = machine.leaf(1)!.entry
        #expect(entry & (EntryBit.write | EntryBit.mmuWritable) == 0 && entry & EntryBit.hostWritable != 0)
        #expect(machine.leaf(2)?.writable == true)
        #expect(machine.fault(.write, 1, present: true) == .writeProtected)
        #expect(machine.fault(.write, 1, present: false) == .writeProtected)
        #expect(machine.fault(.read, 1, present: true) == .spurious)
        // Made anew, the entry would have no D: nobody can write through it.
        #expect(machine.leaf(1)?.entry == entry & ~EntryBit.dirty)
        #expect(machine.statistics.pf_emulate.load(ordering: .relaxed) == 2)
    }

    @Test func `a tracked frame that is not mapped is mapped without W, for a read and for a write`() throws {
        let machine = machine()
        try machine.slot(count: 8)
        try machine.space.store(at(1), 5)
        try machine.mmu.track(GuestFrame(1))
        #expect(machine.fault(.read, 1) == .fixed)
        #expect(machine.leaf(1)!.entry & ~EntryBit.frame == 0x8200_0000_0000_0975)
        try machine.mmu.track(GuestFrame(3))
        #expect(machine.fault(.write, 3) == .writeProtected)
        #expect(machine.leaf(3)!.writable == false)
    }

    @Test func `the flush keys on MW, not on W (F3)`() throws {
        let machine = machine()
        try machine.slot(count: 8)
        machine.fault(.write, 1)
        // As a protection for the log that has not flushed yet.
        _ = machine.word(1).fetchAnd(~EntryBit.write)
        let before = flushes(machine)
        try machine.mmu.track(GuestFrame(1))
        #expect(flushes(machine) == before + 1)
        try machine.mmu.track(GuestFrame(1))
        #expect(flushes(machine) == before + 1, "nothing left to take")
    }

    @Test func `the lockless path gives nothing back`() throws {
        let machine = machine()
        try machine.slot(count: 8)
        machine.fault(.write, 1)
        try machine.logging(true, count: 8)
        try machine.mmu.track(GuestFrame(1))
        #expect(machine.fault(.write, 1, present: true) == .writeProtected)
        #expect(machine.statistics.pf_fast.load(ordering: .relaxed) == 0)
        #expect(try machine.dirtyLog() == [0])
    }

    @Test func `each reason counts, and the last gives W back with the next write`() throws {
        let machine = machine()
        try machine.slot(count: 8)
        try machine.mmu.track(GuestFrame(1))
        try machine.mmu.track(GuestFrame(1))
        try machine.mmu.untrack(GuestFrame(1))
        #expect(machine.fault(.write, 1) == .writeProtected)
        try machine.mmu.untrack(GuestFrame(1))
        #expect(machine.fault(.write, 1, present: true) == .fixed)
        #expect(machine.leaf(1)?.writable == true)
        #expect(throws: Errno.EINVAL) { try machine.mmu.untrack(GuestFrame(1)) }
        #expect(throws: Errno.EINVAL) { try machine.mmu.track(GuestFrame(100)) }
    }

    @Test func `a huge leaf loses W whole, and a write beside the frame splits it`() throws {
        let machine = machine(thp: true)
        try machine.slot(count: 1024)
        machine.fault(.write, 700)
        try machine.mmu.track(GuestFrame(701))
        #expect(machine.leaf(700)?.level == .page2M && machine.leaf(700)?.writable == false)
        #expect(machine.fault(.write, 701, present: true) == .writeProtected)
        #expect(machine.leaf(700)?.level == .page2M)
        #expect(machine.fault(.write, 702, present: true) == .fixed)
        #expect(machine.leaves().count == 512)
        #expect(machine.leaves().filter(\.writable).map(\.guestFrame.number) == [702])
        // A block with a tracked frame is never mapped large; another is.
        try machine.space.advise(at(512)..<at(1024), .dontNeed)
        machine.fault(.write, 800)
        #expect(machine.leaf(800)?.level == .page4K)
        machine.fault(.write, 5)
        #expect(machine.leaf(5)?.level == .page2M)
        try machine.mmu.untrack(GuestFrame(701))
    }

    @Test func `every tree loses W`() throws {
        let machine = machine(cpus: 2)
        try machine.slot(count: 8)
        machine.mmu.setGuestMode(true, of: machine.cpus[1])
        for cpu in machine.cpus { machine.fault(.write, 1, cpu: cpu) }
        try machine.mmu.track(GuestFrame(1))
        #expect(machine.leaves().allSatisfy { !$0.writable })
    }

    @Test func `a change of flags keeps the counts, a moved slot begins anew`() throws {
        let machine = machine()
        try machine.slot(count: 8)
        try machine.mmu.track(GuestFrame(1))
        try machine.logging(true, count: 8)
        #expect(machine.fault(.write, 1) == .writeProtected)
        try machine.logging(false, count: 8)
        try machine.set(frame: 64, count: 8, SlotFlags())
        machine.cpu.enterGuest()
        machine.cpu.exitGuest()
        #expect(machine.fault(.write, 65) == .fixed)
    }

    @Test func `a writable entry of a tracked frame is found (X48), and a wrong count too (X41)`() throws {
        let machine = machine()
        try machine.slot(count: 1024)
        machine.fault(.write, 1)
        try machine.mmu.track(GuestFrame(1))
        #expect(machine.mmu.checkTables() == [])
        let word = machine.word(1)
        let old = word.fetchOr(EntryBit.mmuWritable)
        #expect(machine.mmu.checkTables().map(\.invariant) == [.x48])
        word.store(old)
        let counts = try #require(machine.vm.activeSlots[0].largePages)
        counts.add(1, at: GuestFrame(600))
        #expect(machine.mmu.checkTables().map(\.invariant) == [.x41, .x41])
        counts.add(-1, at: GuestFrame(600))
    }
}
