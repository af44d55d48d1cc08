import Audit
import Frames
import Testing

@testable import HostMemory
@testable import Machine
@testable import Scenario

/// What a scenario says of huge pages that are set aside.
@Suite struct HugePagesOfAScenario {
    private func sketch(_ host: String, _ region: String) -> Sketch {
        Sketch(host: host, regions: "    - {name: ram, \(region)}")
    }

    @Test func `the plan has the pools, the kind and the pages' size`() throws {
        let text = """
            name: sketch
            host:
              memory: 3 GiB
              hugetlb_2m: 3
              hugetlb_1g: 1
              regions:
                - {name: small, kind: anonymous, size: 4 KiB}
                - {name: shared, kind: hugetlb, size: 4 MiB}
                - {name: own, kind: hugetlb_private, page_size: 1 GiB, size: 1 GiB}
            vm: {slots: []}
            phases:
              - host: [{free_hugepages: 2 MiB, expect: 3}, {resv_hugepages: 1 GiB, expect: 1}, {munmap: small}]
            """
        let plan = try loadScenario(text: text, file: "test.yaml").plan
        #expect(plan.hugePages2M == 3 && plan.hugePages1G == 1)
        #expect(plan.regions.map(\.kind) == [.anonymous, .hugeShared, .hugePrivate])
        #expect(plan.regions[1].pageLevel == .page2M && plan.regions[2].pageLevel == .page1G)
        #expect(plan.regions[2].address.value % PageLevel.page1G.bytes == 0)
        #expect(
            plan.phases[0].tasks[0].steps.prefix(2).map(\.action) == [
                .countHugePages(.page2M, reserved: false), .countHugePages(.page1G, reserved: true),
            ])
    }
    @Test func `pages of another size`() {
        expectOne(
            sketch("  hugetlb_2m: 1", "kind: hugetlb, page_size: 4 MiB, size: 4 MiB"), at: "4 MiB",
            after: "page_size: ", "there are no huge pages of 4 MiB", hint: "2 MiB or 1 GiB")
        expectOne(
            Sketch(phases: "  - host:\n      - free_hugepages: 64 KiB"), at: "64 KiB", after: "free_hugepages: ",
            "there are no huge pages of 64 KiB")
    }
    @Test func `a part of a huge page`() {
        expectOne(
            sketch("  hugetlb_2m: 2", "kind: hugetlb, size: 3 MiB"), at: "3 MiB", after: "size: ",
            "`ram` is not made of whole huge pages", hint: "size and address are multiples of 2 MiB")
        expectOne(
            sketch("  hugetlb_2m: 2", "kind: hugetlb, size: 2 MiB, address: 0x7f0000001000"), at: "0x7f0000001000",
            "`ram` is not made of whole huge pages")
    }
    @Test func `more than the pool has`() {
        expectOne(
            sketch("  hugetlb_2m: 1", "kind: hugetlb, size: 4 MiB"), at: "4 MiB", after: "size: ",
            "`ram` doesn't fit the host's huge pages", hint: "1 are left for it; raise `host: {hugetlb_2m: ...}`")
        expectOne(
            sketch("", "kind: hugetlb_private, size: 2 MiB"), at: "2 MiB", after: "size: ",
            "`ram` doesn't fit the host's huge pages")
    }
    @Test func `more than memory has`() {
        expectOne(
            sketch("  hugetlb_2m: 8", "kind: anonymous, size: 64 KiB"), at: "8", after: "hugetlb_2m: ",
            "the host can't set 16 MiB aside for huge pages")
        expectOne(
            sketch("  memory: 1 GiB\n  hugetlb_1g: 1", "kind: anonymous, size: 64 KiB"), at: "1",
            after: "hugetlb_1g: ", "the host can't set 1 GiB aside for huge pages")
    }
    @Test func `memory that is set aside is not there for others`() {
        expectOne(
            sketch("  hugetlb_2m: 6", "kind: anonymous, size: 6 MiB"), at: "6 MiB", after: "size: ",
            "`ram` doesn't fit the host's memory")
    }
    @Test func `a page size where there is none`() {
        expectOne(
            sketch("", "kind: anonymous, page_size: 2 MiB, size: 2 MiB"), at: "page_size",
            "`page_size` on `anonymous`")
    }

    /// The run of `hugetlb` up to the end of its second phase.
    private func world(_ body: (World) throws -> Void) throws -> RunOutcome {
        let plan = try load(shipped: "hugetlb").plan
        let arena = try #require(MappedArena(size: World.arenaSize(for: plan)))
        let world = try World(plan, policy: .precise, arena: arena.base, arenaIsZero: true)
        for phase in 0..<2 {
            world.runTask(phase, 0)
            world.endPhase(phase)
        }
        try body(world)
        defer { withExtendedLifetime(arena) {} }
        return world.finish()
    }

    @Test func `I-28: the pools are whole at the end, whatever was in use`() throws {
        #expect(try world { _ in }.findings.isEmpty)
    }
    @Test func `I-28: a page that is not back in its pool is a finding`() throws {
        let outcome = try world { world in
            // A reference that nobody drops.
            let frame = try #require(world.addressSpace.translate(world.plan.regions[0].address)?.frame)
            #expect(world.host.memory.tryGet(world.host.memory.page(frame)))
        }
        #expect(outcome.findings.map(\.invariant) == [.i28])
    }
    @Test func `a huge page that breaks is lost, and no leak`() throws {
        let outcome = try world { world in
            try world.performInBackground(.breakMemory(region: 0, offset: 0x3000))
            #expect(try world.countHugePages(.page2M, reserved: false) == 1)
        }
        #expect(outcome.findings.isEmpty, "\(outcome.findings)")
    }
}

/// Steps that make drivers fail, and signals.
@Suite struct FailuresOfAScenario {
    private func actions(_ steps: String) throws -> [Action] {
        let sketch = Sketch(
            host: "  device_memory: 64 KiB", regions: "    - {name: ram, kind: device_bar, size: 64 KiB}",
            phases: "  - host: [\(steps)]")
        let plan = try loadScenario(text: sketch.text, file: "test.yaml").plan
        return plan.phases[0].tasks[0].steps.map(\.action)
    }

    @Test func `every answer of a driver has its word`() throws {
        let words = ["sigbus", "oom", "hwpoison", "retry", "nopage"]
        let found = try actions(words.map { "{fail_fault: ram, answer: \($0), times: 2}" }.joined(separator: ", "))
        #expect(found == DriverAnswer.allCases.map { .failFault(region: 0, answer: $0, count: 2) })
        #expect(
            try actions("{fail_fault: ram, answer: oom}") == [.failFault(region: 0, answer: .outOfMemory, count: 1)])
    }
    @Test func `a driver's fault where there is no driver`() {
        expectOne(
            Sketch(phases: "  - host:\n      - {fail_fault: ram, answer: oom}"), at: "ram", after: "fail_fault: ",
            "`fail_fault` is not for `ram`, which is `anonymous`")
    }
    @Test func `signals`() throws {
        #expect(
            try actions("{signal: plain}, {signal: fatal}, {signal: handled}, signal")
                == [.signal(.plain), .signal(.fatal), .signal(.handled), .signal(.plain)])
        expectOne(
            Sketch(phases: "  - host:\n      - signal: SIGUSR1"), at: "SIGUSR1", "`signal` can't be `SIGUSR1`")
    }
}
