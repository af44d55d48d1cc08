import Frames
import HostMemory
import Paging
import Synchronization
import Testing

@testable import GuestMemory

/// What each kind of fault comes to. Spec: x86 2.2 to 2.7, generic section 7.
@Suite struct X86_2_FaultOutcomes {
    private func expect(
        _ machine: TDPMachine, fixed: UInt64 = 0, emulate: UInt64 = 0, spurious: UInt64 = 0, taken: UInt64
    ) {
        let statistics = machine.statistics
        #expect(statistics.pf_taken.load(ordering: .relaxed) == taken)
        #expect(statistics.pf_fixed.load(ordering: .relaxed) == fixed)
        #expect(statistics.pf_emulate.load(ordering: .relaxed) == emulate)
        #expect(statistics.pf_spurious.load(ordering: .relaxed) == spurious)
        #expect(machine.journal.holdings.isEmpty)
        #expect(machine.journal.findings.isEmpty)
    }

    @Test func `no slot is emulated and leaves no entry`() throws {
        let machine = TDPMachine()
        try machine.slot(count: 4)
        #expect(machine.fault(.read, 100) == .emulate)
        #expect(machine.leaves().isEmpty)
        expect(machine, emulate: 1, taken: 1)
    }

    @Test func `a write to a read-only slot is emulated, a read is mapped without W`() throws {
        let machine = TDPMachine()
        try machine.slot(count: 4, flags: SlotFlags(readOnly: true))
        try machine.space.store(at(1), 5)
        #expect(machine.fault(.write, 1) == .emulate)
        #expect(machine.fault(.read, 1) == .fixed)
        #expect(machine.leaf(1)?.writable == false)
        #expect(machine.fault(.write, 1, present: true) == .emulate)
        expect(machine, fixed: 1, emulate: 2, taken: 3)
    }

    @Test func `a slot on its way out is tried again, not emulated`() throws {
        let machine = TDPMachine()
        try machine.slot(count: 4)
        let slots = machine.vm.slotSets[0]
        let old = slots.active.byFrame.all[0]
        slots.active.replace(old, by: old.invalidCopy())
        #expect(machine.fault(.read, 1) == .retry)
        #expect(machine.leaves().isEmpty)
        slots.active.replace(slots.active.byFrame.all[0], by: old)
        expect(machine, taken: 1)
    }

    @Test func `no user mapping behind the slot fails with EFAULT`() throws {
        let machine = TDPMachine()
        try machine.slot(count: 4, backing: nil)
        #expect(machine.fault(.read, 1) == .failed(.EFAULT))
        expect(machine, taken: 1)
    }

    @Test func `a write where the process may not write fails with EFAULT`() throws {
        let machine = TDPMachine()
        try machine.slot(count: 4, .read)
        #expect(machine.fault(.write, 1) == .failed(.EFAULT))
        #expect(machine.fault(.read, 1) == .fixed)
        expect(machine, fixed: 1, taken: 2)
    }

    @Test func `a poisoned page fails with an errno of its own`() throws {
        let machine = TDPMachine()
        try machine.slot(count: 4)
        try machine.space.store(at(1), 5)
        machine.test.host.poison(machine.space.translate(at(1))!.frame)
        #expect(machine.fault(.read, 1) == .failed(.EHWPOISON))
        expect(machine, taken: 1)
    }

    @Test func `a fatal signal ends the run with EINTR and counts`() throws {
        let machine = TDPMachine()
        try machine.slot(count: 4)
        machine.space.signals.fatal = true
        #expect(machine.fault(.write, 1) == .failed(.EINTR))
        machine.space.signals.fatal = false
        #expect(machine.statistics.signal_exits.load(ordering: .relaxed) == 1)
        expect(machine, taken: 1)
    }

    @Test func `an entry that already allows the access is spurious`() throws {
        let machine = TDPMachine()
        try machine.slot(count: 4)
        machine.fault(.write, 1)
        let before = machine.leaf(1)
        #expect(machine.fault(.read, 1) == .spurious)
        #expect(machine.fault(.write, 1, present: true) == .spurious)
        #expect(machine.leaf(1) == before)
        expect(machine, fixed: 1, spurious: 2, taken: 3)
        #expect(machine.statistics.pf_fast.load(ordering: .relaxed) == 1)
    }

    @Test func `a read-only leaf becomes writable in place when the host page did, without a notifier`() throws {
        let machine = TDPMachine()
        try machine.slot(count: 4)
        try machine.space.store(at(1), 5)
        let child = try machine.space.fork()
        #expect(machine.fault(.read, 1) == .fixed)
        let readOnly = try #require(machine.leaf(1))
        #expect(!readOnly.writable)
        child.exit()
        #expect(machine.fault(.write, 1, present: true) == .fixed)
        let writable = try #require(machine.leaf(1))
        #expect(writable.writable && writable.frame == readOnly.frame)
        expect(machine, fixed: 2, taken: 2)
    }

    @Test func `a write to the page of zeros gets a page of its own`() throws {
        let machine = TDPMachine()
        try machine.slot(count: 4)
        #expect(machine.cpu.read(1) == .done(.value(0)))
        #expect(machine.cpu.write(1, 9) == .done(.stored))
        #expect(machine.leaf(1)?.frame == machine.space.translate(at(1))?.frame)
        #expect(try machine.space.load(at(1)) == 9)
        #expect(machine.journal.holdings.isEmpty)
    }

    @Test func `a vCPU without a root gets one`() throws {
        let machine = TDPMachine()
        try machine.slot(count: 4)
        let outcome = machine.vm.withSlots {
            machine.mmu.handleFault(
                machine.cpu, GuestFault(address: GuestAddress(0), access: .write, entryPresent: false))
        }
        #expect(outcome == .fixed)
    }

    @Test func `no memory for a table fails with ENOMEM and leaks nothing`() throws {
        let machine = TDPMachine(ramFrames: 64)
        try machine.slot(count: 4)
        machine.mmu.loadRoot(machine.cpu)
        var taken: [HostFrame] = []
        while machine.test.memory.freeFrames > 2, let frame = machine.test.host.allocateTable(order: 0, fill: 0) {
            taken.append(frame)
        }
        #expect(machine.fault(.write, 1) == .failed(.ENOMEM))
        #expect(machine.test.memory.freeFrames == 2)
        for frame in taken { machine.test.host.freeTable(frame) }
        #expect(machine.fault(.write, 1) == .fixed)
    }

    @Test func `an address beyond the tables is no slot's and harms nothing`() {
        let machine = TDPMachine()
        #expect(machine.fault(.write, 1 << 36, present: true) == .emulate)
        #expect(machine.fault(.read, 1 << 51) == .emulate)
    }

    @Test func `a slot beyond the tables' reach is refused`() throws {
        let machine = TDPMachine()
        try machine.space.mapPages(0, 4)
        #expect(throws: Errno.EINVAL) {
            try machine.set(frame: (1 << 36) - 3, count: 4, SlotFlags())
        }
        try machine.set(frame: (1 << 36) - 4, count: 4, SlotFlags())
        #expect(machine.fault(.write, (1 << 36) - 1) == .fixed)
    }
}
