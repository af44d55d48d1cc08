import Frames
import Paging
import Testing

@testable import GuestMemory

/// Counters belong to vCPUs; the VM's are sums. Spec: x86 section 9.
@Suite struct X86_9_Statistics {
    @Test func `each vCPU counts its own, and the VM's are the sums`() throws {
        let machine = TDPMachine(cpus: 2)
        try machine.slot(count: 16)
        for frame: UInt64 in [1, 2, 3] { machine.fault(.write, frame, cpu: machine.cpus[0]) }
        machine.fault(.read, 1, cpu: machine.cpus[1])
        machine.fault(.read, 100, cpu: machine.cpus[1])
        let (first, second) = (machine.cpus[0].statistics, machine.cpus[1].statistics)
        #expect(first.pf_taken.load(ordering: .relaxed) == 3 && second.pf_taken.load(ordering: .relaxed) == 2)
        #expect(first.pf_fixed.load(ordering: .relaxed) == 3 && second.pf_fixed.load(ordering: .relaxed) == 0)
        #expect(second.pf_spurious.load(ordering: .relaxed) == 1 && second.pf_emulate.load(ordering: .relaxed) == 1)
        #expect(machine.statistics.pf_taken.load(ordering: .relaxed) == 5)
        #expect(machine.statistics.pf_fixed.value == 3 && machine.statistics.pf_emulate.value == 1)
    }

    @Test func `a guest that was entered counts an exit, one that was not counts none`() throws {
        let machine = TDPMachine()
        machine.cpu.enterGuest()
        machine.cpu.exitGuest()
        machine.vm.flushRemoteTLBs()
        machine.cpu.enterGuest()
        machine.cpu.exitGuest()
        #expect(machine.statistics.exits.value == 2 && machine.statistics.tlb_flush.value == 1)
    }
}
