import Audit
import Frames
import Machine
import Synchrony
import Testing

@testable import GuestMemory
@testable import HostMemory

extension TestGuest {
    /// A slot over an object whose pages must be read from a slow device first.
    func addSlowMemory(_ pages: Int, readOnly: Bool = false, log: Bool = false) throws -> MemoryObject {
        let object = MemoryObject(host: test.host, pages: pages, slow: true)
        try space.mapPages(0, pages, .object(object))
        try setSlot(pages: pages, log: log, readOnly: readOnly)
        return object
    }

    func fault(_ page: Int, _ access: AccessKind = .read, cpu: Int = 0) -> GuestFault {
        GuestFault(address: gfn(page).address, access: access, entryPresent: false)
    }

    /// One fault, without the vCPU's run loop.
    func handle(_ page: Int, _ access: AccessKind = .read) -> GuestMemory.FaultOutcome {
        vm.withSlots { vm.mmu.handleFault(cpus[0], fault(page, access)) }
    }
}

/// The dance: without waiting, then by others, then waiting.
@Suite struct G6_1_AsyncFaults {
    @Test func `a page that must be read is fetched by a worker, mapped as a prefetch, and then used`() throws {
        let guest = TestGuest()
        let object = try guest.addSlowMemory(4)
        let cpu = guest.cpus[0]
        cpu.allowsAsyncFaults = true
        #expect(guest.handle(1, .write) == .retry)
        #expect(cpu.asyncFaults.count == 1 && guest.vm.asyncFaults.pendingCount == 1 && guest.leafCount == 0)
        #expect(guest.heldReferences == 0 && object.frame(of: 1) == nil)
        #expect(guest.vm.asyncFaults.runOne() && !guest.vm.asyncFaults.runOne())
        #expect(object.frame(of: 1) != nil && guest.leafCount == 0 && cpu.asyncFaults.count == 1)
        #expect(guest.test.journal.holdings.isEmpty)
        let fixed = guest.vm.statistics.pf_fixed.load(ordering: .relaxed)
        let taken = guest.vm.statistics.pf_taken.load(ordering: .relaxed)
        #expect(cpu.enterGuest() == nil && !cpu.isHalted)
        cpu.exitGuest()
        let leaf = try #require(guest.leaf(1))
        #expect(leaf.frame == object.frame(of: 1) && leaf.writable && !leaf.accessed)
        #expect(cpu.asyncFaults.count == 0)
        #expect(guest.vm.statistics.pf_fixed.load(ordering: .relaxed) == fixed + 1)
        #expect(guest.vm.statistics.pf_taken.load(ordering: .relaxed) == taken)
        #expect(guest.store(1, 9) == .stored)
        guest.check()
    }

    @Test func `the vCPU halts until its page is there; without a worker it fetches the page itself`() throws {
        let guest = TestGuest()
        let object = try guest.addSlowMemory(4)
        guest.cpus[0].allowsAsyncFaults = true
        for page in 0..<4 { #expect(guest.store(page, UInt64(page)) == .stored) }
        for page in 0..<4 { #expect(guest.load(page) == .value(UInt64(page))) }
        #expect((0..<4).allSatisfy { object.frame(of: $0) != nil } && guest.cpus[0].asyncFaults.count == 0)
        guest.check()
    }

    @Test func `not allowed, for a prefetch, or on a read-only slot the vCPU waits itself`() throws {
        for (allowed, prefetch, readOnly) in [(false, false, false), (true, true, false), (true, false, true)] {
            let guest = TestGuest()
            _ = try guest.addSlowMemory(2, readOnly: readOnly)
            let cpu = guest.cpus[0]
            cpu.allowsAsyncFaults = allowed
            var fault = guest.fault(0)
            fault.isPrefetch = prefetch
            #expect(guest.vm.withSlots { guest.vm.mmu.handleFault(cpu, fault) } == .fixed)
            #expect(cpu.asyncFaults.count == 0 && guest.vm.asyncFaults.pendingCount == 0)
            #expect(guest.leafCount == 1)
        }
    }

    @Test func `an INVALID slot is refused`() throws {
        let guest = TestGuest()
        _ = try guest.addSlowMemory(2)
        guest.cpus[0].allowsAsyncFaults = true
        #expect(!guest.cpus[0].postpone(guest.fault(0), in: guest.vm.activeSlots[0].invalidCopy()))
        #expect(guest.cpus[0].asyncFaults.count == 0)
    }

    @Test func `64 at most are underway; the next fault waits itself`() throws {
        let guest = TestGuest()
        _ = try guest.addSlowMemory(70)
        let cpu = guest.cpus[0]
        cpu.allowsAsyncFaults = true
        for page in 0..<64 { #expect(guest.handle(page) == .retry) }
        #expect(cpu.asyncFaults.count == 64)
        #expect(guest.handle(64) == .fixed && cpu.asyncFaults.count == 64 && guest.leafCount == 1)
        #expect(guest.vm.asyncFaults.runOne())
        #expect(guest.handle(65) == .fixed, "done, but not completed")
        #expect(cpu.enterGuest() == nil, "a page is there, so it need not halt")
        cpu.exitGuest()
        #expect(cpu.asyncFaults.count == 63 && guest.handle(66) == .retry && cpu.asyncFaults.count == 64)
    }

    @Test func `the same frame again is not queued twice: the vCPU halts`() throws {
        let guest = TestGuest()
        _ = try guest.addSlowMemory(2)
        let cpu = guest.cpus[0]
        cpu.allowsAsyncFaults = true
        for _ in 0..<3 { #expect(guest.handle(0) == .retry) }
        #expect(cpu.asyncFaults.count == 1 && guest.vm.asyncFaults.pendingCount == 1)
        for _ in 0..<2 { #expect(cpu.enterGuest() == .halted && cpu.isHalted) }
        #expect(guest.vm.asyncFaults.runOne())
        #expect(cpu.sleepUntilReady() == nil && cpu.enterGuest() == nil && !cpu.isHalted)
        cpu.exitGuest()
        #expect(guest.leaf(0) != nil)
    }

    @Test func `a vCPU that halts sees a page that is there before it is told`() throws {
        let guest = TestGuest()
        _ = try guest.addSlowMemory(1)
        let cpu = guest.cpus[0]
        cpu.allowsAsyncFaults = true
        for _ in 0..<2 { #expect(guest.handle(0) == .retry) }
        #expect(cpu.enterGuest() == .halted && guest.vm.asyncFaults.runOne())
        // The worker has put the page on the list; its request comes later.
        #expect(cpu.take(VirtualCPU.Request.asyncFaultReady))
        #expect(cpu.sleepUntilReady() == nil && cpu.enterGuest() == nil && !cpu.isHalted)
        cpu.exitGuest()
        #expect(guest.leaf(0) != nil && cpu.asyncFaults.count == 0)
        cpu.post(VirtualCPU.Request.asyncFaultReady)
        #expect(cpu.enterGuest() == nil, "the request alone does nothing")
        cpu.exitGuest()
    }

    @Test func `a guest that is told runs on, and halts only when it comes back to the page`() throws {
        let guest = TestGuest(cpus: 0)
        _ = try guest.addSlowMemory(3)
        let cpu = ToldCPU(number: 0, vm: guest.vm)
        guest.vm.add(cpu)
        cpu.allowsAsyncFaults = true
        let handle = { (page: Int) in guest.vm.withSlots { guest.vm.mmu.handleFault(cpu, guest.fault(page)) } }
        #expect(handle(0) == .retry && handle(1) == .retry && cpu.told == [gfn(0), gfn(1)])
        #expect(cpu.enterGuest() == nil, "it does something else")
        cpu.exitGuest()
        #expect(handle(1) == .retry && cpu.told.count == 2)
        #expect(cpu.enterGuest() == .halted)
        while guest.vm.asyncFaults.runOne() {}
        #expect(cpu.enterGuest() == nil)
        cpu.exitGuest()
        #expect(guest.leafCount == 2)
    }

    @Test func `a signal ends the halt with EINTR, and the page comes all the same`() throws {
        let guest = TestGuest()
        _ = try guest.addSlowMemory(1)
        guest.cpus[0].allowsAsyncFaults = true
        guest.space.signals.pending = true
        #expect(guest.store(0, 5) == .failed(.EINTR))
        guest.space.signals.pending = false
        #expect(guest.store(0, 5) == .stored && guest.load(0) == .value(5))
    }

    @Test func `the vCPU is woken if the page can't be had, too`() throws {
        let guest = TestGuest()
        _ = try guest.addSlowMemory(1)
        let cpu = guest.cpus[0]
        cpu.allowsAsyncFaults = true
        #expect(guest.handle(0) == .retry)
        try guest.space.unmap(pages(0..<1))
        #expect(guest.vm.asyncFaults.runOne())
        #expect(cpu.enterGuest() == nil && guest.leafCount == 0)
        cpu.exitGuest()
        #expect(guest.store(0, 1) == .failed(.EFAULT))
    }

    @Test func `wake-all wakes with a dummy, unless something is done anyway`() throws {
        let guest = TestGuest()
        _ = try guest.addSlowMemory(2)
        let cpu = guest.cpus[0]
        cpu.allowsAsyncFaults = true
        #expect(guest.handle(0) == .retry && cpu.enterGuest() == .halted)
        cpu.wakeAsyncFaults()
        #expect(cpu.asyncFaults.count == 2 && cpu.sleepUntilReady() == nil)
        #expect(cpu.enterGuest() == nil, "awake, without the page")
        cpu.exitGuest()
        #expect(cpu.asyncFaults.count == 1 && guest.leafCount == 0)
        #expect(guest.vm.asyncFaults.runOne())
        cpu.wakeAsyncFaults()
        #expect(cpu.asyncFaults.count == 1, "no dummy")
        #expect(cpu.enterGuest() == nil && guest.leafCount == 1)
        cpu.exitGuest()
    }

    @Test func `private memory of the process on a slow swap device`() throws {
        let guest = TestGuest(swap: SwapDevice(slots: 16, slow: true))
        try guest.addMemory(0, 2, log: true)
        guest.cpus[0].allowsAsyncFaults = true
        guest.store(0, 77)
        _ = try guest.log()
        try guest.space.advise(pages(0..<1), .pageOut)
        #expect(guest.frame(0) == nil && guest.leaf(0) == nil)
        #expect(guest.load(0) == .value(77))
        #expect(try guest.log() == [0], "mapped writable, as a prefetch, and so logged")
        guest.check()
    }
}

/// A vCPU whose guest knows the paravirtual interface.
private final class ToldCPU: VirtualCPU, @unchecked Sendable {
    // Unchecked: belongs to one test.
    var told: [GuestFrame] = []
    override func pageNotPresent(_ frame: GuestFrame) -> Bool {
        told.append(frame)
        return true
    }
}

/// Workers and the end.
@Suite struct G6_2_AsyncFaultWork {
    @Test func `with the VM every fault ends: not begun, done, and dummies; nothing is left`() throws {
        let guest = TestGuest()
        let object = try guest.addSlowMemory(8)
        let cpu = guest.cpus[0]
        cpu.allowsAsyncFaults = true
        for page in 0..<8 { #expect(guest.handle(page) == .retry) }
        for _ in 0..<3 { #expect(guest.vm.asyncFaults.runOne()) }
        guest.takeDown()
        #expect(cpu.asyncFaults.count == 0 && guest.vm.asyncFaults.pendingCount == 0)
        #expect(!guest.vm.asyncFaults.runOne(), "no work for a VM that has ended (B8)")
        #expect((0..<8).filter { object.frame(of: $0) != nil } == [0, 1, 2])
        #expect(guest.test.journal.holdings.isEmpty)
    }

    @Test func `the end waits for the worker that is at it`() async throws {
        let guest = TestGuest()
        try guest.addMemory(0, 1)
        // A page that another task of the process serves: the worker is held up as long as that takes.
        let faults = UserFaults(of: guest.space)
        try guest.space.register(pages(0..<1), .missing, faults)
        guest.cpus[0].allowsAsyncFaults = true
        #expect(guest.handle(0, .write) == .retry)
        let (isHeldUp, isServed, isDown) = (Flag(), Flag(), Flag())
        try await onThreads([
            { #expect(guest.vm.asyncFaults.runOne()) },
            {
                while !isHeldUp.isRaised { yieldProcessor() }
                guest.cpus[0].asyncFaults.drain()
                #expect(isServed.isRaised, "the worker was still at it")
                isDown.raise()
            },
            {
                #expect(faults.waitForMessage()?.address == at(0))
                isHeldUp.raise()
                for _ in 0..<1000 { yieldProcessor() }
                #expect(!isDown.isRaised)
                isServed.raise()
                try faults.zero(at(0))
            },
        ])
        #expect(!guest.vm.asyncFaults.runOne() && guest.cpus[0].asyncFaults.count == 0 && guest.leafCount == 0)
        #expect(guest.heldReferences == 0)
    }

    /// Two vCPUs, two workers and somebody who evicts: a guest never reads but what it stored.
    @Test func `workers fetch what is evicted again and again`() async throws {
        let seed = UInt64.random(in: 1 ... .max)
        print("seed \(seed)")
        let guest = TestGuest(ramFrames: 512, cpus: 2, keepsEvents: false, swap: SwapDevice(slots: 64, slow: true))
        for cpu in guest.cpus {
            cpu.patience = 1_000_000
            cpu.allowsAsyncFaults = true
        }
        try guest.addMemory(0, 16)
        let ended = (0..<2).map { _ in Flag() }
        let allEnded: @Sendable () -> Bool = { ended.allSatisfy(\.isRaised) }
        var bodies: [@Sendable () throws -> Void] = (0..<2).map { number in
            {
                defer {
                    ended[number].raise()
                    guest.vm.asyncFaults.wake()
                }
                var random = TestRandom(seed: seed &+ UInt64(number))
                var last = [UInt64](repeating: 0, count: 8)
                for round in 1...300 {
                    let slot = Int.random(in: 0..<8, using: &random)
                    let page = slot * 2 + number
                    let loaded = guest.load(page, cpu: number)
                    if loaded != .value(last[slot]) {
                        Issue.record("seed \(seed): \(loaded), not \(last[slot])")
                        return
                    }
                    last[slot] = UInt64(round)
                    guest.store(page, last[slot], cpu: number)
                }
            }
        }
        for _ in 0..<2 { bodies.append { guest.vm.asyncFaults.serve(until: allEnded) } }
        bodies.append {
            var random = TestRandom(seed: seed &+ 7)
            while !allEnded() {
                let page = Int.random(in: 0..<16, using: &random)
                try guest.space.advise(pages(page..<page + 1), .pageOut)
                yieldProcessor()
            }
        }
        try await onThreads(bodies)
        #expect(guest.vm.asyncFaults.pendingCount == 0 && guest.heldReferences == 0)
        guest.check()
    }
}
