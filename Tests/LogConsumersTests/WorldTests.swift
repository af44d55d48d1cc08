import Audit
import Frames
import LogConsumers
import SeededRandom
import Testing

@testable import Machine

/// A plan of random slots, writers, rounds and snapshots over the model's own KVM and host.
private struct RandomPlan {
    private var random: SplitMix
    private var plan = Plan()
    private var pinned: [(region: Int, offset: UInt64)] = []
    private var isMigrating = false
    private var hasSnapshot = false

    init(seed: UInt64) {
        random = SplitMix(seed: seed)
        plan.ramFrames = 2048
        plan.swapPages = 256
        plan.reclaims = true
        plan.transparentHugePages = flip()
        plan.virtualCPUs = 2
        for index in 0..<below(3) + 2 {
            var region = RegionPlan()
            region.kind = flip() ? .anonymous : .sharedMemory
            region.address = UserAddress(0x7f00_0000_0000 + UInt64(index) << 24)
            region.size = UInt64(below(4) == 0 ? 60 + below(80) : 1 + below(6)) * pageSize
            plan.regions.append(region)
            if index == 0 || flip() { plan.slots.append(slot(index)) }
        }
    }

    private mutating func below(_ bound: Int) -> Int { Int.random(in: 0..<bound, using: &random) }
    private mutating func flip() -> Bool { Bool.random(using: &random) }

    private mutating func slot(_ region: Int) -> SlotPlan {
        var slot = SlotPlan()
        slot.id = UInt16(region * 3)
        slot.region = region
        slot.guestAddress = GuestAddress(UInt64(region) << 28 + 0x10_0000)
        slot.size = plan.regions[region].size
        slot.logDirtyPages = below(4) == 0
        return slot
    }

    private mutating func place() -> (region: Int, offset: UInt64) {
        let region = below(plan.regions.count)
        return (region, UInt64(below(Int(plan.regions[region].size / 8))) * 8)
    }

    private mutating func task(_ actor: TaskPlan.Actor, _ action: Action) {
        var task = TaskPlan()
        task.actor = actor
        var step = StepPlan(action)
        step.expectation = .anything
        task.steps = [step]
        plan.phases[plan.phases.count - 1].tasks.append(task)
    }

    mutating func make() -> Plan {
        if flip() { phase { $0.task(.host, .enableManualProtect(initiallySet: $0.flip())) } }
        for _ in 0..<60 { phase { $0.step() } }
        if isMigrating { phase { $0.task(.background(.vmm), .precopy(.stop)) } }
        return plan
    }

    private mutating func phase(_ body: (inout RandomPlan) -> Void) {
        plan.phases.append(PhasePlan())
        body(&self)
    }

    private mutating func step() {
        let (region, offset) = place()
        switch below(16) {
        case 0, 1, 2, 3:
            let address = GuestAddress(UInt64(region) << 28 + 0x10_0000 + offset)
            let kind: AccessKind = below(4) == 0 ? .read : .write
            task(
                .virtualCPU(below(2)), .guest(kind, at: address, count: 1, stride: 8, value: random.next()))
        case 4, 5: task(.host, .ownStore(region: region, offset: offset, value: random.next()))
        case 6:
            pinned.append((region, offset & ~(pageSize - 1)))
            task(.host, .pin(region: region, offset: offset & ~(pageSize - 1), write: true))
        case 7 where !pinned.isEmpty:
            let pin = pinned[below(pinned.count)]
            task(
                .background(.device),
                .deviceStore(region: pin.region, offset: pin.offset + offset % pageSize, value: random.next()))
        case 8 where !pinned.isEmpty:
            let pin = pinned.remove(at: below(pinned.count))
            task(.host, .unpin(region: pin.region, offset: pin.offset))
        case 9: task(.host, .setMemoryRegion(slot(region)))
        case 10: task(.host, .deleteMemoryRegion(id: UInt16(region * 3)))
        case 11:
            task(.host, .advise(region: region, offset: 0, length: plan.regions[region].size, .pageOut))
        case 12: task(.host, .migrate(region: region, offset: 0, length: plan.regions[region].size))
        default: useLog()
        }
    }

    private mutating func useLog() {
        let action: Action
        if isMigrating {
            action = .precopy(below(3) == 0 ? .stop : .round)
            isMigrating = action == .precopy(.round)
        } else if hasSnapshot, below(3) > 0 {
            action = below(4) == 0 ? .restore : .snapshot(.difference)
        } else {
            isMigrating = flip()
            hasSnapshot = !isMigrating
            action = isMigrating ? .precopy(.start) : .snapshot(.full)
        }
        task(.background(.vmm), action)
    }
}

/// On the model: no image is wrong, and no user of the log makes KVM break a rule.
@Suite struct LOG1_Worlds {
    private func run(_ plan: Plan, _ architecture: Architecture) throws -> RunOutcome {
        let arena = try #require(MappedArena(size: World.arenaSize(for: plan)))
        defer { withExtendedLifetime(arena) {} }
        let world = try World(
            plan, policy: .precise, architecture: architecture, arena: arena.base, arenaIsZero: true)
        return world.run()
    }

    @Test(arguments: Architecture.allCases) func `no write is lost`(architecture: Architecture) throws {
        let seed = UInt64.random(in: 0...UInt64.max / 2)
        print("seed \(seed)")
        var copied = 0
        for round in 0..<60 {
            var random = RandomPlan(seed: seed + UInt64(round))
            let outcome = try run(random.make(), architecture)
            let found = outcome.findings.map { "\($0.invariant) \($0.reason.text) \($0.place as Any)" }
            #expect(found.isEmpty && outcome.holdings.isEmpty, "seed \(seed + UInt64(round)): \(found)")
            for case .value in outcome.steps.map(\.outcome) { copied += 1 }
        }
        #expect(copied > 300)
    }

    /// Four pages behind slots 2 and 5, the second with a hole before it in the guest.
    private static func plan(_ phases: [(TaskPlan.Actor, [Action])]) -> Plan {
        var plan = Plan()
        plan.ramFrames = 1024
        for index in 0..<2 {
            var region = RegionPlan()
            region.address = UserAddress(0x7f00_0000_0000 + UInt64(index) << 24)
            region.size = 4 * pageSize
            plan.regions.append(region)
            var slot = SlotPlan()
            slot.id = [2, 5][index]
            slot.region = index
            slot.guestAddress = GuestAddress([0x1000, 0x10_0000][index])
            slot.size = region.size
            plan.slots.append(slot)
        }
        for (actor, actions) in phases {
            var task = TaskPlan()
            task.actor = actor
            task.steps = actions.map { StepPlan($0) }
            var phase = PhasePlan()
            phase.tasks = [task]
            plan.phases.append(phase)
        }
        return plan
    }

    private static let vmm = TaskPlan.Actor.background(.vmm)

    @Test func `a finding names slot, page, and who wrote it last`() throws {
        let plan = Self.plan([
            (.virtualCPU(0), [.guest(.write, at: GuestAddress(0x10_2000), count: 1, stride: 8, value: 1)]),
            (Self.vmm, [.precopy(.start)]),
            // Marked nowhere: the VMM forgets it.
            (.host, [.store(region: 1, offset: 0x2008, value: 2)]),
            (Self.vmm, [.precopy(.stop)]),
        ])
        let finding = try #require(try run(plan, .x86TDP).findings.first)
        #expect(finding.invariant == .log1)
        #expect(finding.place == SlotPlace(slot: 5, page: 2))
        #expect(finding.guest == 0x102)
        #expect(finding.reason == "the image has not what the VMM wrote last")
    }

    @Test func `pages that are given back behind KVM's back are written too`() throws {
        let plan = Self.plan([
            (.virtualCPU(0), [.guest(.write, at: GuestAddress(0x1000), count: 1, stride: 8, value: 1)]),
            (Self.vmm, [.snapshot(.full)]),
            (.host, [.madviseDontNeed(region: 0, offset: 0, length: 4096)]),
            (Self.vmm, [.snapshot(.difference)]),
        ])
        #expect(try run(plan, .riscvSv39x4).findings.map(\.place) == [SlotPlace(slot: 2, page: 0)])
    }

    @Test func `calls out of order give errors`() throws {
        let plan = Self.plan([
            (
                Self.vmm,
                [
                    .precopy(.round), .precopy(.stop), .restore, .snapshot(.difference), .snapshot(.full),
                    .precopy(.start),
                    .precopy(.start), .snapshot(.full), .restore, .precopy(.stop), .restore,
                ]
            )
        ])
        let outcomes = try run(plan, .x86TDP).steps.map(\.outcome)
        #expect(
            outcomes == [
                .error(.EINVAL), .error(.EINVAL), .error(.EINVAL), .error(.EINVAL), .value(8), .value(8),
                .error(.EBUSY),
                .error(.EBUSY), .error(.EBUSY), .value(0), .error(.EINVAL),
            ])
    }

    @Test func `a device reaches only what is pinned`() throws {
        let store = Action.deviceStore(region: 0, offset: 0x1008, value: 7)
        let plan = Self.plan([
            (Self.vmm, [.snapshot(.full)]), (.background(.device), [store]),
            (.host, [.pin(region: 0, offset: 0x1000, write: true)]), (.background(.device), [store]),
            (.host, [.load(region: 0, offset: 0x1008), .unpin(region: 0, offset: 0x1000)]),
            (.background(.device), [store]), (Self.vmm, [.snapshot(.difference)]),
        ])
        let outcome = try run(plan, .x86TDP)
        #expect(
            outcome.steps.map(\.outcome) == [
                .value(8), .error(.EFAULT), .done, .done, .value(7), .done, .error(.EFAULT), .value(1),
            ])
        #expect(outcome.findings.isEmpty)
    }
}
