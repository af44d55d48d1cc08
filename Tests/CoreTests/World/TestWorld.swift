import Audit
import Frames
import GuestMemory
import HostMemory
import Machine
import Testing

@testable import Machine

/// A world with an arena of its own, for tests.
final class TestWorld {
    // In this order they go: a world that was not finished still clears its tables, which lie in the arena.
    let world: World
    let arena: MappedArena

    /// One region named `memory` of `kind`, `pages` long, behind slot 0 at guest address 0; `change` adjusts the plan.
    init(
        _ kind: RegionKind = .anonymous, pages: UInt64 = 8, policy: PolicyName = .precise,
        architecture: Architecture = .x86TDP, _ change: (inout Plan) -> Void = { _ in }
    ) throws {
        var plan = Plan()
        plan.ramFrames = 4096
        plan.deviceFrames = 256
        var region = RegionPlan()
        region.name = Array("memory".utf8)
        region.kind = kind
        region.address = Self.user
        region.size = pages * pageSize
        region.order = 2
        plan.regions = [region]
        var slot = SlotPlan()
        slot.size = region.size
        plan.slots = [slot]
        change(&plan)
        arena = try #require(MappedArena(size: World.arenaSize(for: plan)))
        world = try World(plan, policy: policy, architecture: architecture, arena: arena.base, arenaIsZero: true)
    }

    static let user = UserAddress(0x7f00_0000_0000)
    var vm: VirtualMachine { world.vm }
    var journal: Journal { world.journal }
    var cpu: GuestCPU { world.cpus[0] }

    func guest(_ kind: AccessKind, page: UInt64, _ value: UInt64 = 0) -> AccessResult {
        cpu.access(kind, GuestAddress(page * pageSize), value: value)
    }

    /// The host frame behind page `page` of the region, by the process's own entry.
    func frame(_ page: UInt64) -> HostFrame? { world.addressSpace.translate(Self.user + page * pageSize)?.frame }

    func state(_ page: UInt64) -> PageState? { frame(page).flatMap { world.host.memory.inspect($0) } }

    func leaf(_ page: UInt64) -> StageTwoLeaf? {
        var found: StageTwoLeaf?
        vm.mmu.forEachLeaf { leaf in
            let frames = leaf.guestFrame..<GuestFrame(leaf.guestFrame.number + leaf.level.frames)
            if frames.contains(GuestFrame(page)) { found = leaf }
        }
        return found
    }

    /// The rules broken so far and at rest now, each once.
    func brokenRules() -> Set<Invariant> {
        world.checks.run(journal)
        return Set(journal.findings.map(\.invariant))
    }
}
