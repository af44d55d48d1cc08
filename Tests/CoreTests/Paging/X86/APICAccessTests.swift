import Audit
import CSchedule
import Frames
import Synchrony
import Testing

@testable import GuestMemory
@testable import HostMemory
@testable import Paging

/// A vCPU that looks for the page of its VM's APIC, at `at(900)`, step by step.
final class APICLoader {
    let machine: TDPMachine

    init(_ machine: TDPMachine) throws {
        self.machine = machine
        try machine.mmu.makeAPICAccessPage(at: at(900))
        machine.mmu.useAPICAccessPage(true, by: machine.cpu)
    }

    var field: HostFrame? { machine.mmu.apicAccessFrame(of: machine.cpu) }
    var page: HostFrame? { machine.space.translate(at(900))?.frame }

    /// As the entry to guest mode does: whether there was a request.
    @discardableResult
    func serveOnce() -> Bool {
        guard machine.cpu.take(VirtualCPU.Request.reloadAPICPage) else { return false }
        machine.mmu.reloadAPICPage(for: machine.cpu)
        return true
    }
    func serve() { while serveOnce() {} }

    var brokenRules: [Invariant] { machine.mmu.checkTables().map(\.invariant) }

    /// The page gets another frame, between an invalidation's start and its end.
    private func steps(_ at: (start: Int, change: Int, end: Int)) -> [(point: Int, action: () -> Void)] {
        let invalidation = SteppedInvalidation(machine.space, 900..<901)
        let machine = machine
        return [
            (at.start, { invalidation.start() }), (at.change, { machine.movePage(900) }),
            (at.end, { invalidation.end() }),
        ]
    }

    /// Serves, with an invalidation whose steps are at the given points. Returns how many points there were, and the
    /// rules that are broken when the vCPU would go on.
    @discardableResult
    func run(
        at steps: (start: Int, change: Int, end: Int), defects: [Defect] = []
    ) -> (points: Int, broken: [Invariant]) {
        var points = 0
        var steps = self.steps(steps)
        let task = TestTask(defects: defects) { _, _ in
            let held = fl_held_current().pointee
            guard held.atomic_depth == 0, held.ranks == 0 else { return }
            TestTask.elsewhere {
                while let next = steps.first, next.point <= points {
                    steps.removeFirst()
                    next.action()
                }
            }
            points += 1
        }
        #expect(task.run { serve() }.held.isSound)
        var broken = brokenRules
        for step in steps {
            step.action()
            broken += brokenRules
        }
        return (points, broken)
    }
}

extension TDPMachine {
    /// The object's page goes, as truncation takes it, but nobody is told: that is the invalidation's business.
    fileprivate func movePage(_ page: Int) {
        guard case .object(let object, _, _) = space.find(at(page))?.backing, let frame = object.frame(of: 0) else {
            return
        }
        object.replace(0, by: .absent)
        var gather = Gather()
        space.zap(pages(page..<page + 1), &gather)
        gather.flush(test.memory)
        test.memory.put(test.memory.page(frame))
    }
}

/// X17, F16: the processor takes the right page for the APIC's, or looks again before the guest runs. Spec: x86 6.4.
@Suite struct X17_APICAccessPage {
    @Test func `a vCPU finds the page when its APIC becomes memory, and the guest's accesses end there`() throws {
        let machine = TDPMachine(cpus: 2)
        let loader = try APICLoader(machine)
        #expect(loader.field == nil && loader.page == nil)
        #expect(machine.cpu.write(0xfee00, 7) == .done(.stored))
        #expect(loader.field == loader.page && machine.leaf(0xfee00)?.frame == loader.page)
        #expect(machine.mmu.apicAccessFrame(of: machine.cpus[1]) == nil, "that one is not in the mode")
        machine.mmu.useAPICAccessPage(false, by: machine.cpu)
        #expect(loader.field == nil)
        // The VM has no more than one, and a user's slot can't be there.
        try machine.mmu.makeAPICAccessPage(at: at(901))
        #expect(throws: Errno.EEXIST) { try machine.slot(7, frame: 0xfee00, page: 902, count: 1) }
    }

    @Test func `when the host takes the page away every vCPU is asked to look, and finds the new one`() throws {
        let machine = TDPMachine(cpus: 2)
        let loader = try APICLoader(machine)
        machine.mmu.useAPICAccessPage(true, by: machine.cpus[1])
        for cpu in machine.cpus { #expect(cpu.write(0xfee00, 7) == .done(.stored)) }
        let old = try #require(loader.page)
        let flushes = machine.statistics.remote_tlb_flush_requests.load(ordering: .relaxed)
        try machine.space.advise(pages(900..<901), .remove)
        #expect(machine.cpus.allSatisfy { $0.hasRequest(VirtualCPU.Request.reloadAPICPage) })
        #expect(machine.leaf(0xfee00) == nil && machine.mmu.checkTables() == [])
        #expect(
            machine.statistics.remote_tlb_flush_requests.load(ordering: .relaxed) == flushes + 1,
            "one for the leaf; the look is no flush")
        // So that the frame is somebody else's.
        try machine.slot(count: 4)
        machine.fault(.write, 1)
        for cpu in machine.cpus { #expect(cpu.read(0xfee00) == .done(.value(0))) }
        for cpu in machine.cpus { #expect(machine.mmu.apicAccessFrame(of: cpu) == loader.page) }
        #expect(loader.page != old && machine.mmu.checkTables() == [])
    }

    @Test func `what other slots lose asks nobody to look`() throws {
        let machine = TDPMachine()
        let loader = try APICLoader(machine)
        loader.serve()
        try machine.slot(count: 4)
        machine.fault(.write, 1)
        try machine.space.advise(pages(0..<4), .dontNeed)
        #expect(!machine.cpu.hasRequest(VirtualCPU.Request.reloadAPICPage))
        // Nor does a user's own slot at that address, where KVM has none.
        let other = TDPMachine()
        try other.slot(frame: 0xfee00, count: 1)
        other.fault(.write, 0xfee00)
        try other.space.advise(pages(0..<1), .dontNeed)
        #expect(other.leaves().isEmpty && !other.cpu.hasRequest(VirtualCPU.Request.reloadAPICPage))
    }

    @Test func `while a nested guest runs the look is put off until it is left`() throws {
        let machine = TDPMachine()
        let loader = try APICLoader(machine)
        loader.serve()
        let old = loader.field
        machine.mmu.setGuestMode(true, of: machine.cpu)
        try machine.space.advise(pages(900..<901), .remove)
        loader.serve()
        #expect(loader.field == old && machine.mmu.checkTables() == [])
        machine.mmu.setGuestMode(false, of: machine.cpu)
        #expect(machine.cpu.hasRequest(VirtualCPU.Request.reloadAPICPage) && machine.mmu.checkTables() == [])
        loader.serve()
        #expect(loader.field == loader.page && loader.field != nil)
    }

    @Test func `without a slot, in another mode, or without memory nothing is written`() throws {
        let bare = TDPMachine()
        bare.mmu.useAPICAccessPage(true, by: bare.cpu)
        bare.cpu.enterGuest()
        bare.cpu.exitGuest()
        #expect(bare.mmu.apicAccessFrame(of: bare.cpu) == nil && bare.events(.referenceTaken).isEmpty)

        let machine = TDPMachine()
        let loader = try APICLoader(machine)
        machine.mmu.useAPICAccessPage(false, by: machine.cpu)
        loader.serve()
        #expect(machine.events(.referenceTaken).isEmpty)
        machine.mmu.useAPICAccessPage(true, by: machine.cpu)
        loader.serve()
        let old = loader.field
        try machine.space.protect(pages(900..<901), .none)
        loader.serve()
        #expect(loader.field == old && machine.mmu.checkTables() == [], "no table maps it, so nobody ends there")
    }

    @Test func `a processor that takes another page for the APIC's is found`() throws {
        let machine = TDPMachine()
        let loader = try APICLoader(machine)
        loader.serve()
        #expect(loader.brokenRules == [])
        let state = machine.mmu.state(of: machine.cpu)
        let right = state.apicAccess.frame
        state.apicAccess.frame = HostFrame(77)
        #expect(loader.brokenRules == [.x17])
        machine.cpu.post(VirtualCPU.Request.reloadAPICPage)
        #expect(loader.brokenRules == [], "it looks before it runs")
        #expect(machine.cpu.take(VirtualCPU.Request.reloadAPICPage))
        state.apicAccess.frame = right
        // A notifier that asks nobody.
        try machine.space.advise(pages(900..<901), .remove)
        #expect(machine.cpu.take(VirtualCPU.Request.reloadAPICPage))
        #expect(loader.brokenRules == [.x17])
        machine.cpu.post(VirtualCPU.Request.reloadAPICPage)
        loader.serve()
    }

    // MARK: Every order

    /// Every place of an invalidation's start, change and end among the points of a look.
    private func race(_ defects: [Defect]) throws -> (runs: Int, broken: Set<Invariant>) {
        var broken: Set<Invariant> = []
        var runs = 0
        var orders = [(Int.max, Int.max, Int.max)]
        while let order = orders.popLast() {
            let machine = TDPMachine(ramFrames: 96)
            let loader = try APICLoader(machine)
            try machine.space.store(at(900), 1)
            let (points, found) = loader.run(at: order, defects: defects)
            if runs == 0 {
                // A start asks for another look, which has as many points again.
                let end = 2 * points + 1
                for s in 0...points { for p in s...end { for e in p...end { orders.append((s, p, e)) } } }
            }
            runs += 1
            broken.formUnion(found)
            loader.serve()
            #expect(loader.field == loader.page || !defects.isEmpty, "\(order)")
            #expect(machine.journal.holdings.isEmpty && machine.journal.findings.isEmpty, "\(order)")
            machine.cpu.post(VirtualCPU.Request.reloadAPICPage)
            loader.serve()
        }
        return (runs, broken)
    }

    @Test func `whatever part of an invalidation comes at whatever point of a look, the page is right or looked for`()
        throws
    {
        let (runs, broken) = try race([])
        #expect(runs > 100 && broken == [])
    }

    @Test func `without the retry check it would not be`() throws {
        #expect(try race([.retryCheckMissing]).broken == [.x17])
    }
}

/// x86 2.7 step 5: what an access to the page comes to.
@Suite struct X2_7_APICFaults {
    private func machine() throws -> TDPMachine {
        var configuration = TDPConfiguration()
        configuration.cachesMMIO = true
        let machine = TDPMachine(mmu: TDPMMU(configuration))
        try machine.mmu.makeAPICAccessPage(at: at(900))
        return machine
    }
    private func created(_ machine: TDPMachine) -> UInt64 {
        machine.cpu.statistics.pf_mmio_spte_created.load(ordering: .relaxed)
    }

    @Test func `while the APIC is not virtualised the access is emulated, and nothing is left behind`() throws {
        let machine = try machine()
        machine.mmu.setAPICVirtualization(false)
        for access in [AccessKind.read, .write] { #expect(machine.fault(access, 0xfee00) == .emulate) }
        #expect(machine.leaves().isEmpty && created(machine) == 0)
        #expect(machine.mmu.state(of: machine.cpu).lastMMIO.frame == nil)
        machine.mmu.setAPICVirtualization(true)
        #expect(machine.cpu.write(0xfee00, 3) == .done(.stored))
    }

    @Test func `what is mapped goes when the virtualisation ends, and a fault that saw it is stale`() throws {
        let machine = try machine()
        #expect(machine.cpu.write(0xfee00, 3) == .done(.stored))
        machine.mmu.setAPICVirtualization(false)
        #expect(machine.leaves().isEmpty && machine.vm.invalidationsInProgress == 0)
        var point = 0
        var late = 0
        while true {
            machine.mmu.setAPICVirtualization(true)
            let outcome = machine.fault(.write, 0xfee00, point: point) { machine.mmu.setAPICVirtualization(false) }
            guard let outcome else { break }
            #expect(outcome == .retry || outcome == .emulate || outcome == .fixed, "point \(point)")
            if outcome == .retry { late += 1 }
            #expect(machine.leaves().isEmpty, "point \(point)")
            point += 1
        }
        #expect(late > 0)
    }

    @Test func `a nested guest finds no APIC there: its access is emulated and its own tables say so`() throws {
        let machine = try machine()
        #expect(machine.cpu.write(0xfee00, 3) == .done(.stored))
        machine.mmu.setGuestMode(true, of: machine.cpu)
        #expect(machine.fault(.write, 0xfee00) == .emulate && created(machine) == 1)
        #expect(machine.leaves().map(\.guestFrame.number) == [0xfee00], "the other tree's")
        machine.mmu.setGuestMode(false, of: machine.cpu)
        #expect(machine.cpu.read(0xfee00) == .done(.value(3)))
    }
}
