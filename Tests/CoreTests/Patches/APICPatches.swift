import Audit
import Frames
import HostMemory
import Synchrony
import Testing

@testable import GuestMemory
@testable import Paging

// The page by which a processor knows a VM's APIC.

@Suite struct Patch36_TheAPICPageIsNotFetched {
    @Test func `to make the slot touches no memory`() throws {
        try checkPatch(36) {
            let machine = TDPMachine()
            let free = machine.test.memory.freeFrames
            try machine.mmu.makeAPICAccessPage(at: at(900))
            #expect(machine.space.translate(at(900)) == nil && machine.test.memory.freeFrames == free)
            #expect(machine.events(.hostEntrySet).isEmpty && machine.events(.referenceTaken).isEmpty)
        }
    }

    @Test func `memory that can't be had shows with the access, as EFAULT`() throws {
        let machine = TDPMachine()
        try machine.mmu.makeAPICAccessPage(at: at(900))
        try machine.space.protect(pages(900..<901), .none)
        machine.mmu.useAPICAccessPage(true, by: machine.cpu)
        #expect(machine.cpu.read(0xfee00) == .ended(.failed(.EFAULT)))
        #expect(machine.mmu.apicAccessFrame(of: machine.cpu) == nil && machine.mmu.checkTables() == [])
        try machine.space.protect(pages(900..<901), .readWrite)
    }
}

@Suite struct Patch50_TheAPICPageUnderTheLock {
    @Test func `the page is released before mmu_lock is dropped, whether it was taken or not`() throws {
        try checkPatch(50) {
            for isStale in [false, true] {
                let machine = TDPMachine()
                let loader = try APICLoader(machine)
                if isStale { loader.run(at: (Int.max, Int.max, Int.max)) } else { loader.serve() }
                let released = machine.events(.released).filter { $0.holder == .guestFault }
                #expect(!released.isEmpty && released.allSatisfy { $0.value & 0x100 != 0 })
                #expect(machine.journal.findings.isEmpty)
            }
        }
    }
}

@Suite struct Patch51_TheAPICPageIsFaultedIn {
    @Test func `the reference that the lookup gave is the one that is dropped, and the page is accessed, not dirty`()
        throws
    {
        try checkPatch(51) {
            let machine = TDPMachine()
            let loader = try APICLoader(machine)
            loader.serve()
            let frame = try #require(machine.mmu.apicAccessFrame(of: machine.cpu))
            #expect(machine.ofFaults(.referenceTaken).map(\.frame) == [frame.number])
            #expect(machine.ofFaults(.referenceDropped).map(\.frame) == [frame.number])
            #expect(machine.marksByNumber.isEmpty && machine.journal.findings.isEmpty)
            let flags = machine.test.state(frame).flags
            #expect(flags.isAccessed(by: .kvm) && !flags.isDirty(by: .kvm))
            #expect(machine.journal.holdings.isEmpty)
        }
    }

    @Test func `a look that an invalidation made stale is asked for again`() throws {
        let machine = TDPMachine()
        let loader = try APICLoader(machine)
        machine.start(900..<901)
        // What the start itself posted is served in the midst of it.
        let task = TestTask { operation, _ in
            guard operation == SchedulingPoint.conditionRead.rawValue else { return }
            TestTask.elsewhere {
                #expect(machine.cpu.hasRequest(VirtualCPU.Request.reloadAPICPage))
                if machine.vm.invalidationsInProgress > 0 { machine.end(900..<901) }
            }
        }
        _ = task.run { loader.serveOnce() }
        #expect(machine.mmu.apicAccessFrame(of: machine.cpu) == nil)
        loader.serve()
        #expect(machine.mmu.apicAccessFrame(of: machine.cpu) == machine.space.translate(at(900))?.frame)
    }
}
