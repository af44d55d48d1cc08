import Audit
import Frames
import GuestMemory
import HostMemory
import Testing

@testable import Machine

/// A world whose guest has page tables of its own. Spec: x86 section 4.
@Suite struct X4_ShadowPagingInAWorld {
    private func world(_ change: (inout Plan) -> Void = { _ in }) throws -> TestWorld {
        try TestWorld(architecture: .x86Shadow) { plan in
            plan.phases = [Self.phase([.guest(.write, at: GuestAddress(0), count: 8, stride: 4096, value: 0x10)])]
            change(&plan)
        }
    }

    private static func phase(_ actions: [Action], cpu: Int = 0) -> PhasePlan {
        var task = TaskPlan()
        task.actor = .virtualCPU(cpu)
        task.steps = actions.map { StepPlan($0) }
        var phase = PhasePlan()
        phase.tasks = [task]
        return phase
    }

    /// What the steps come to, in order, from the start of the second phase on.
    private func outcomes(_ actions: [Action]) throws -> [StepOutcome] {
        let test = try world { $0.phases.append(Self.phase(actions)) }
        let outcome = test.world.run()
        #expect(outcome.findings.isEmpty && outcome.holdings.isEmpty)
        return outcome.steps.filter { $0.phase == 1 }.map(\.outcome)
    }
    private func page(_ number: UInt64) -> GuestAddress { GuestAddress(number << 12) }

    @Test func `the guest's tables have memory and a slot that the plan does not know`() throws {
        let test = try world()
        #expect(test.world.plan.regions.count == 2 && test.world.plan.slots.count == 2)
        let slot = try #require(test.world.plan.slots.last)
        #expect(slot.guestAddress.value == 1 << 46 && slot.id == 32763)
        // One of each level: nothing but the eight pages is touched.
        #expect(slot.size == 4 << 12)
        #expect(test.world.run().isClean)
    }
    @Test func `its id and its place are nobody else's`() throws {
        let test = try world { plan in
            plan.slots[0].id = 32763
            plan.regions[0].address = UserAddress(0x7e00_0000_0000)
        }
        #expect(test.world.plan.slots[1].id == 32762)
        #expect(test.world.plan.regions[1].address.value < 0x7e00_0000_0000)
        #expect(test.world.run().isClean)
    }
    @Test func `what the guest maps is what it reaches`() throws {
        let found = try outcomes([
            .mapPage(at: page(0x400), to: page(3), level: 1, .write),
            .guest(.read, at: page(0x400), count: 1, stride: 8, value: 0),
            .guest(.write, at: page(0x400), count: 1, stride: 8, value: 0x99),
            .guest(.read, at: page(3), count: 1, stride: 8, value: 0),
            .protectPage(at: page(0x400), level: 1, .read), .flushPage(at: page(0x400)),
            .guest(.write, at: page(0x400), count: 1, stride: 8, value: 0x77),
            .guest(.read, at: page(0x400), count: 1, stride: 8, value: 0),
            .unmapPage(at: page(0x400), level: 1), .loadCR3,
            .guest(.read, at: page(0x400), count: 1, stride: 8, value: 0),
            .restorePage(at: page(0x400), level: 1), .guest(.read, at: page(0x400), count: 1, stride: 8, value: 0),
        ])
        #expect(
            found == [
                .done, .value(0x13), .done, .value(0x99), .done, .done, .pageFault, .value(0x99), .done, .done,
                .pageFault, .done, .mmio,
            ])
    }
    @Test func `a table above the lowest is written by emulation`() throws {
        let found = try outcomes(
            [
                .unmapPage(at: page(0), level: 2), .guest(.read, at: page(0), count: 1, stride: 8, value: 0),
                .restorePage(at: page(0), level: 2), .guest(.read, at: page(1), count: 1, stride: 8, value: 0),
                .mapPage(at: page(0x9000), to: page(0), level: 1, .write),
                .mapPage(at: page(0x9000), to: page(0), level: 3, .write),
            ].dropLast())
        #expect(found == [.emulated, .pageFault, .emulated, .value(0x11), .done])
    }
    @Test func `a large entry of the guest's`() throws {
        let found = try outcomes([
            .mapPage(at: page(0x400), to: page(0), level: 2, .write), .loadCR3,
            .guest(.read, at: page(0x405), count: 1, stride: 8, value: 0),
        ])
        #expect(found == [.emulated, .done, .value(0x15)] || found == [.done, .done, .value(0x15)])
    }
    @Test func `a table that the guest does not have`() throws {
        let test = try world { $0.phases.append(Self.phase([.unmapPage(at: GuestAddress(1 << 47), level: 1)])) }
        #expect(test.world.run().steps.last?.outcome == .error(.ENOENT))
    }
    @Test func `other MMUs refuse such a plan`() throws {
        for architecture in Architecture.twoStage {
            #expect(throws: PlanError.guestTables) {
                _ = try TestWorld(architecture: architecture) { $0.phases = [Self.phase([.loadCR3])] }
            }
        }
    }
    @Test func `a fault of the host's comes to the guest's tables too`() throws {
        let test = try world { plan in
            var region = RegionPlan()
            region.address = UserAddress(0x7f10_0000_0000)
            region.size = 16 << 12
            plan.regions.append(region)
            var slot = SlotPlan()
            slot.id = 1
            slot.region = 1
            slot.guestAddress = GuestAddress(0x40_0000)
            slot.size = region.size
            slot.logDirtyPages = true
            plan.slots.append(slot)
            plan.pageTables = 1
            var host = PhasePlan()
            host.tasks = [TaskPlan()]
            host.tasks[0].steps = [
                StepPlan(.getDirtyLog(id: 1)), StepPlan(.fork), StepPlan(.childExit),
            ]
            plan.phases += [
                host,
                Self.phase([
                    .mapPage(at: self.page(0), to: self.page(1), level: 1, .write), .loadCR3,
                    .guest(.read, at: self.page(0), count: 1, stride: 8, value: 0),
                ]),
            ]
        }
        let outcome = test.world.run()
        #expect(outcome.isClean)
        // KVM set A in the lowest table; page 3 of the slot.
        #expect(outcome.steps[1].outcome == .pages([3]))
        #expect(outcome.steps.last?.outcome == .value(0x11))
    }
    @Test func `a finding is made when the guest reaches what the process does not map`() throws {
        let test = try world()
        _ = test.world.run()
        let again = try world()
        again.world.runTask(0, 0)
        again.world.endPhase(0)
        let cpu = again.world.pagedCPUs[0]
        #expect(cpu.cachedLeaves.count == 8)
        // The process's entry changes, and nobody is told.
        let frame = try #require(again.frame(2))
        let leaf = try #require(cpu.cachedLeaves.first { $0.frame == frame })
        #expect(leaf.guest == GuestFrame(2) && leaf.writable)
        again.journal.observer?.accessed(3, frame.number, isStore: false)
        #expect(again.journal.findings.map(\.invariant) == [.i13])
    }
}
