import Audit
import Frames
import HostMemory
import Testing

@testable import Machine
@testable import Report
@testable import Scenario

/// A driver that breaks its contract in the middle of a run: the run goes on, and its report names the driver.
@Suite struct D1_ReportsNameTheDriver {
    /// A guest draws into a buffer; then the driver gives a block back that the guest has mapped.
    private func outcome() throws -> RunOutcome {
        let plan = try load(shipped: "virtio-gpu-blob").plan
        let arena = try #require(MappedArena(size: World.arenaSize(for: plan)))
        let world = try World(plan, policy: .precise, arena: arena.base, arenaIsZero: true)
        world.runTask(0, 0)
        guard case .graphics(let buffer) = world.regions[1].behind else { throw Errno.EINVAL }
        buffer.pool.giveBlock(try #require(buffer.frame(of: 4)), order: 2, from: buffer)
        world.endPhase(0)
        return world.finish()
    }

    @Test func `the run goes on, and nothing is held at its end`() throws {
        let outcome = try outcome()
        #expect(outcome.findings.map(\.invariant).first == .d1)
        #expect(outcome.findings.filter { $0.invariant == .d1 }.allSatisfy { $0.driver == "graphics buffer" })
        #expect(outcome.holdings.isEmpty)
        #expect(outcome.steps.count == 2 && outcome.unexpected.isEmpty)
    }

    @Test func `the text names it`() throws {
        let text = RunText.render(
            try outcome(), story: "", terminal: Terminal(color: false), verbose: false)
        #expect(
            text.contains("  D-1   driver graphics buffer: gives back a frame that is still mapped, pfn "), "\(text)")
        #expect(text.contains("\nnot ok: "))
    }

    @Test func `the JSON names it`() throws {
        let json = RunJSON(try outcome())
        let entry = try #require(json.findings.first)
        #expect(entry.rule == "D-1" && entry.driver == "graphics buffer")
        #expect(entry.reason == "gives back a frame that is still mapped" && entry.pfn != nil)
        #expect(json.text().contains("\"driver\" : \"graphics buffer\""))
    }

    @Test func `two drivers' findings are told apart`() {
        let findings = ["one", "two", "one"].map { (name: StaticString) in
            Finding(.d1, "maps a frame that is not its own", driver: StaticReason(name))
        }
        #expect(
            FindingGroup.all(findings).map(\.text) == [
                "driver one: maps a frame that is not its own, and 1 more",
                "driver two: maps a frame that is not its own",
            ])
    }

    @Test func `a scenario may name the rule`() {
        #expect(Invariant.d1.code == "D-1" && Invariant.allCases.contains(.d1))
    }
}
