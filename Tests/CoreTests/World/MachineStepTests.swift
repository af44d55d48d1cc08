import Audit
import Frames
import GuestMemory
import HostMemory
import Testing

@testable import Machine

/// Steps on dirty rings, private memory, frame caches, and faults ahead of use and asynchronous ones, as a plan's world
/// performs them.
@Suite struct G_WorldMachineSteps {
    private func task(_ actor: TaskPlan.Actor, _ steps: (Action, StepExpectation)...) -> TaskPlan {
        var task = TaskPlan()
        task.actor = actor
        task.steps = steps.map { action, expectation in
            var step = StepPlan(action)
            step.expectation = expectation
            return step
        }
        return task
    }

    private func world(_ change: (inout Plan) -> Void, _ tasks: TaskPlan...) throws -> TestWorld {
        try TestWorld { plan in
            plan.phases = tasks.map { task in
                var phase = PhasePlan()
                phase.tasks = [task]
                return phase
            }
            change(&plan)
        }
    }

    private func write(_ page: UInt64, count: Int = 1) -> Action {
        .guest(.write, at: GuestAddress(page * pageSize), count: count, stride: pageSize, value: 1)
    }
    private let vmm = TaskPlan.Actor.background(.vmm)

    @Test func `what was collected is copied when the reset returns, and logged again afterwards`() throws {
        let test = try world(
            {
                $0.dirtyRingBytes = 4096
                $0.slots[0].logDirtyPages = true
            }, task(.virtualCPU(0), (write(1, count: 2), .success)),
            task(vmm, (.collectRing(cpu: 0), .pages([1, 2])), (.resetRings, .value(2))),
            task(.virtualCPU(0), (write(2), .success)),
            task(vmm, (.collectRing(cpu: 0), .pages([2])), (.resetRings, .value(1))))
        let outcome = test.world.run()
        #expect(outcome.isClean, "\(outcome.findings) \(outcome.steps)")
    }

    /// A VMM that copies without the reset, or before it, is wrong: the pages are still owed. I-12 looks at rest.
    @Test func `what was written stays owed until its reset`() throws {
        let test = try world(
            {
                $0.dirtyRingBytes = 4096
                $0.slots[0].logDirtyPages = true
            }, task(.virtualCPU(0), (write(1), .success)), task(vmm, (.collectRing(cpu: 0), .pages([1]))))
        let world = test.world
        world.runTask(0, 0)
        world.runTask(1, 0)
        #expect(world.stepChecks.written == [GuestFrame(1)])
        world.stepChecks.harvested(world.rings.takeCollected())
        #expect(world.stepChecks.written.isEmpty)
        world.endPhase(1)
        #expect(world.finish().findings.isEmpty)
    }

    @Test func `a full ring keeps its vCPU out, and a reset lets it in`() throws {
        let test = try TestWorld(pages: 256) { plan in
            plan.dirtyRingBytes = 4096
            plan.slots[0].logDirtyPages = true
            plan.phases = [PhasePlan(), PhasePlan(), PhasePlan()]
            plan.phases[0].tasks = [
                task(.virtualCPU(0), (write(0, count: 191), .success), (write(191), .dirtyRingFull))
            ]
            plan.phases[1].tasks = [task(vmm, (.collectRing(cpu: 0), .success), (.resetRings, .value(192)))]
            plan.phases[2].tasks = [task(.virtualCPU(0), (write(191), .success))]
        }
        #expect(test.world.run().isClean)
    }

    @Test func `without rings there is nothing to collect`() throws {
        let test = try world(
            { _ in }, task(vmm, (.collectRing(cpu: 0), .error(.EINVAL)), (.resetRings, .error(.EINVAL))))
        #expect(test.world.run().isClean)
    }

    @Test(arguments: [3 * 4096, 512] as [UInt64])
    func `rings that KVM refuses are refused`(bytes: UInt64) {
        #expect(throws: PlanError.dirtyRings(.EINVAL)) { _ = try TestWorld { $0.dirtyRingBytes = bytes } }
    }

    @Test func `an architecture without private memory refuses the plan`() {
        #expect(throws: PlanError.privateMemory) {
            _ = try TestWorld(architecture: .riscvSv48x4) { $0.hasPrivateMemory = true }
        }
    }

    @Test func `a memory fault is told from another EFAULT, and files end with the world`() throws {
        let page = GuestAddress(0x1000)
        let test = try world(
            {
                $0.hasPrivateMemory = true
                $0.slots[0].guestMemory = true
            }, task(.host, (.setAttributes(at: page, size: pageSize, isPrivate: true), .success)),
            task(.virtualCPU(0), (write(1), .success)),
            task(
                .host, (.punchPrivate(at: page, size: pageSize), .success),
                (.punchPrivate(at: GuestAddress(1 << 30), size: pageSize), .error(.ENOENT)),
                (.munmap(region: 0, offset: 0, length: pageSize), .success)),
            task(
                .virtualCPU(0),
                (.guest(.read, at: page, count: 1, stride: pageSize, value: 0), .value(0)),
                (
                    .guest(.read, at: GuestAddress(0), count: 1, stride: pageSize, value: 0),
                    .oneOf([.error(.EFAULT), .memoryFault])
                )),
            task(.host, (.deleteMemoryRegion(id: 0), .success)))
        let outcome = test.world.run()
        #expect(outcome.isClean, "\(outcome.findings) \(outcome.unexpected)")
    }

    @Test func `a slot without a file has no private pages`() throws {
        let test = try world(
            { $0.hasPrivateMemory = true },
            task(.host, (.setAttributes(at: GuestAddress(0), size: pageSize, isPrivate: true), .success)),
            task(.virtualCPU(0), (write(0), .memoryFault)))
        #expect(test.world.run().isClean)
    }

    @Test func `a frame cache lives from its first use to the world's end`() throws {
        let kvm = TaskPlan.Actor.background(.kvm)
        let test = try world(
            { _ in }, task(kvm, (.cacheStore(at: GuestAddress(0x1008), value: 7), .success)),
            task(.virtualCPU(0), (.guest(.read, at: GuestAddress(0x1008), count: 1, stride: 8, value: 0), .value(7))),
            task(.host, (.munmap(region: 0, offset: 0x1000, length: pageSize), .success)),
            task(
                kvm, (.cacheLoad(at: GuestAddress(0x1008)), .error(.EFAULT)),
                (.cacheLoad(at: GuestAddress(1 << 30)), .error(.EFAULT)),
                (.cacheStore(at: GuestAddress(0x2000), value: 9), .success),
                (.cacheLoad(at: GuestAddress(0x2000)), .value(9))))
        let world = test.world
        for phase in 0..<4 {
            world.runTask(phase, 0)
            world.endPhase(phase)
        }
        #expect(world.cachedPages.map { $0.page.number } == [1, 1 << 18, 2])
        let outcome = world.finish()
        #expect(outcome.isClean, "\(outcome.findings) \(outcome.unexpected)")
        #expect(world.vm.cachedFrameCount == 0)
    }

    @Test func `only a vCPU maps ahead of use`() throws {
        let ahead = Action.preFault(at: GuestAddress(0), size: 2 * pageSize)
        let test = try world({ _ in }, task(.host, (ahead, .error(.EINVAL))), task(.virtualCPU(0), (ahead, .value(0))))
        #expect(test.world.run().isClean)
    }

    @Test func `nothing is fetched that nobody waits for`() throws {
        let test = try world(
            { $0.asyncFaults = true }, task(.background(.asyncWorker), (.fetchPage, .error(.EAGAIN))))
        #expect(test.world.run().isClean && test.cpu.allowsAsyncFaults)
    }
}
