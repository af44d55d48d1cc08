import Audit
import Frames
import HostMemory
import Synchrony
import Testing

@testable import GuestMemory
@testable import Paging

/// Rules of the TDP MMU that are checked when they could be broken; each is broken on purpose. X20, X21 and X30 are in
/// `X86_8_TableChecks`, X17 in `X17_APICAccessPage`.
@Suite struct X86_8_TDPEvents {
    private func broken(_ machine: TDPMachine) -> [Invariant] { machine.journal.findings.map(\.invariant) }

    @Test func `a fault that is to be tried again and marks its page (X7)`() throws {
        for isBroken in [false, true] {
            let machine = TDPMachine()
            try machine.slot(count: 4)
            try machine.space.store(at(1), 5)
            machine.fault(.write, 2)
            let word = machine.word(1)
            var hasLost = false
            let task = TestTask(undone: isBroken ? .retriedIsUnused : nil) { operation, object in
                guard !hasLost, operation == SchedulingPoint.entryWrite.rawValue, object == word.identity else {
                    return
                }
                hasLost = true
                TestTask.elsewhere { word.store(EntryBit.frozen) }
            }
            #expect(task.run { machine.fault(.read, 1) }.result == .retry)
            word.store(EntryBit.empty)
            #expect(broken(machine) == (isBroken ? [.x7] : []))
        }
    }

    @Test func `an entry exchanged by who shares mmu_lock (X31)`() throws {
        let machine = TDPMachine()
        try machine.slot(count: 4)
        for exclusive in [true, false] {
            machine.fault(.write, 1)
            let guardian = exclusive ? machine.vm.lockMMU() : machine.vm.lockMMUForRead()
            #expect(machine.mmu.zapLeaves(of: GuestFrame(1)..<GuestFrame(2), in: 0))
            guardian.unlock()
            #expect(broken(machine) == (exclusive ? [] : [.x31]))
        }
    }

    @Test func `a vCPU that faults on an invalid root and was not asked to leave it (X33)`() throws {
        for isAsked in [true, false] {
            let machine = TDPMachine()
            try machine.slot(0, count: 4)
            try machine.slot(1, frame: 100, page: 100, count: 4)
            machine.cpu.write(1, 1)
            try machine.set(0, count: 0, SlotFlags())
            if !isAsked { #expect(machine.cpu.take(VirtualCPU.Request.reloadRoot)) }
            #expect(machine.fault(.write, 100) == .retry)
            #expect(broken(machine) == (isAsked ? [] : [.x33]))
            machine.mmu.freeObsoleteRoot(machine.cpu)
        }
    }

    @Test func `a huge leaf that takes a table's place and is writable over a tracked frame (X58)`() throws {
        let machine = TDPMachine(thp: true) { $0.tracksWrites = true }
        try machine.slot(count: 1024)
        try machine.mmu.track(GuestFrame(701))
        machine.fault(.write, 702)
        let counts = try #require(machine.vm.activeSlots[0].largePages)
        counts.add(-1, at: GuestFrame(701))
        _ = TestTask(undone: .leafProvesWritable).run { machine.fault(.write, 701) }
        #expect(broken(machine) == [.x58])
        counts.add(1, at: GuestFrame(701))
        machine.start(512..<1024)
        machine.end(512..<1024)
    }

    @Test func `a prefetch that puts its entry in another's place (X59)`() throws {
        for isBroken in [false, true] {
            let machine = TDPMachine()
            try machine.slot(count: 4)
            machine.fault(.write, 1)
            _ = machine.word(1).fetchAnd(~EntryBit.write)
            let fault = GuestFault(
                address: GuestFrame(1).address, access: .write, entryPresent: true, isPrefetch: true)
            let outcome = TestTask(undone: isBroken ? .prefetchKeepsEntries : nil).run {
                machine.vm.withSlots { machine.mmu.handleFault(machine.cpu, fault) }
            }
            #expect(outcome.result == (isBroken ? .fixed : .spurious))
            #expect(broken(machine) == (isBroken ? [.x59] : []))
        }
    }
}
