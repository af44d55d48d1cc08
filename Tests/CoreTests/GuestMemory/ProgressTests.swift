import Audit
import Frames
import Machine
import Synchrony
import Testing

@testable import GuestMemory
@testable import HostMemory

/// X64: who posts a request either is heard before guest code runs, or finds the vCPU in guest mode and waits for it.
@Suite struct X64_TheLastLook {
    @Test func `a request that comes at whatever point of an entry is served before guest code runs`() throws {
        var point = 0
        while true {
            let guest = TestGuest()
            try guest.addMemory(0, 1)
            guest.store(0, 1)
            let cpu = guest.cpus[0]
            let interposer = Interposer(point) { cpu.post(VirtualCPU.Request.flushTLB) }
            #expect(interposer.run { cpu.enterGuest() } == nil)
            guard interposer.hasFired else {
                cpu.exitGuest()
                break
            }
            #expect(!cpu.hasRequest && cpu.buffer.entries.isEmpty, "point \(point)")
            cpu.exitGuest()
            point += 1
        }
        #expect(point >= 3)
    }

    @Test func `who posts while guest code runs waits until it is left`() async throws {
        let guest = TestGuest(keepsEvents: false)
        let (runs, isServed) = (Flag(), Flag())
        let cpu = guest.cpus[0]
        try await onThreads([
            {
                cpu.enterGuest()
                runs.raise()
                while !cpu.hasRequest {}
                #expect(!isServed.isRaised)
                cpu.exitGuest()
            },
            {
                while !runs.isRaised {}
                guest.vm.flushRemoteTLBs()
                #expect(!cpu.isInGuest)
                isServed.raise()
            },
        ])
        #expect(cpu.hasRequest)
        cpu.enterGuest()
        cpu.exitGuest()
    }
}

/// X65: a fault that is tried again waits for something that ends.
@Suite struct X65_RetriesEnd {
    @Test func `a guest that faults for ever is found`() throws {
        let guest = TestGuest()
        try guest.addMemory(0, 1)
        guest.cpus[0].patience = 20
        let invalidation = SteppedInvalidation(guest.space, 0..<1)
        invalidation.start()
        guest.expectedFindings = 1
        #expect(guest.load(0) == .failed(.EIO))
        #expect(guest.test.journal.findings.map(\.invariant) == [.i13])
        invalidation.end()
        #expect(guest.load(0) == .value(0))
    }
}

/// X10: nothing but a pin keeps memory that KVM maps for itself.
@Suite struct X10_MapsArePinned {
    @Test func `a map of memory that nothing keeps is found`() throws {
        for isBroken in [false, true] {
            let guest = TestGuest()
            let buffer = try #require(GraphicsBuffer(guest.test.host, pages: 2, order: 0))
            try guest.space.mapPages(0, 2, .driver(buffer))
            try guest.setSlot(pages: 2)
            let task = TestTask(undone: isBroken ? .unpinnedMapsRefused : nil)
            let isMapped = task.run { () -> Bool in
                do throws(Errno) {
                    let map = try guest.vm.map(gfn(1))
                    map.unmap()
                    return true
                } catch { return false }
            }
            #expect(isMapped.result == isBroken)
            guest.expectedFindings = isBroken ? 1 : 0
            #expect(guest.test.journal.findings.map(\.invariant) == (isBroken ? [.i16] : []))
        }
    }
}
