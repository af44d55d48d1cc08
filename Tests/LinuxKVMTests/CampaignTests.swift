import Audit
import Explanations
import Interface
import IoctlScript
import LinuxKVM
import Testing
import TextInput

@testable import Conformance

/// Random scripts on both sides: no difference, and one that is planted is found.
@Suite(.needsKVM) struct Campaigns {
    private func campaign(
        _ rules: [AnswerRule] = [], jobs: Int = 1, _ change: (inout KernelFeatures) -> Void = { _ in }
    ) throws -> Campaign {
        var options = Campaign.Options()
        options.rules = try AnswerRule.known() + rules
        options.jobs = jobs
        return try Campaign(options, change)
    }

    private func run(_ campaign: Campaign, seed: UInt64, steps: Int) async throws -> (Tally, Campaign.Found?) {
        var tally = Tally(seed: seed, kernel: campaign.kernel.release)
        let end = try await campaign.run(&tally) { $0.steps >= steps }
        return (tally, end?.found)
    }

    @Test func `no answer differs, and most steps touch what a slot shows`() async throws {
        let campaign = try campaign(jobs: 2)
        let (tally, found) = try await run(campaign, seed: 77, steps: 20_000)
        #expect(found == nil, "\(found.map { $0.text + $0.script.source } ?? "")")
        #expect(tally.steps >= 20_000 && tally.touching * 2 >= tally.steps)
        #expect(tally.compared + tally.notCompared == tally.steps)
        #expect(tally.answers.values.flatMap(\.values).reduce(0, +) == tally.steps)
        #expect(CampaignReport(campaign, tally, found).isClean)
    }

    @Test func `what the model is told wrong is found, and shrunk`() async throws {
        let campaign = try campaign { $0.slotAddressBits = 33 }
        let (tally, found) = try await run(campaign, seed: 3, steps: 200_000)
        let difference = try #require(found)
        #expect(difference.isRepeatable && difference.text.contains("model: -1 EINVAL"))
        // A VM, its slot's memory, the slot.
        #expect(difference.script.lines.count <= 3, "\(difference.script.source)")
        let report = CampaignReport(campaign, tally, found)
        #expect(!report.isClean && report.text.contains("the fewest lines that show one:"))
        // The seed that is told begins with that script.
        let (again, same) = try await run(campaign, seed: difference.seed, steps: 1)
        #expect(again.scripts == 1 && same?.text == difference.text)
    }

    @Test func `what was found is in front of whoever goes on`() async throws {
        let campaign = try campaign { $0.slotAddressBits = 33 }
        var tally = Tally(seed: 3, kernel: campaign.kernel.release)
        let first = try #require(try await campaign.run(&tally) { $0.steps >= 200_000 })
        #expect(tally.steps > first.before.steps)
        tally = first.before
        let second = try #require(try await campaign.run(&tally) { $0.steps >= 200_000 })
        #expect(second.found == first.found)
    }

    @Test func `what is explained is counted, and too much of it is a failure`() async throws {
        let rule = """
            - name: no such width
              kernel_rule: planted
              line: "region*"
              model: "-1 EINVAL"
              kvm: "0"
              must_not_match:
                - {line: "guest read", model: "-1 EINVAL", kvm: "0"}
            """
        let campaign = try campaign(try AnswerRule.list(rule, file: "f")) { $0.slotAddressBits = 13 }
        let (tally, found) = try await run(campaign, seed: 5, steps: 2_000)
        #expect(found == nil)
        #expect(try #require(tally.explained["no such width"]) > 5)
        // What comes after an explained difference is not compared.
        #expect(tally.notCompared > tally.steps / 2)
        let report = CampaignReport(campaign, tally, found)
        #expect(!report.isClean && report.text.contains("too much is explained"))
    }

    @Test func `a campaign that was stopped goes on as if it had not been`() async throws {
        let campaign = try campaign()
        let (whole, _) = try await run(campaign, seed: 9, steps: 12_000)
        var tally = Tally(seed: 9, kernel: campaign.kernel.release)
        var stops = 0
        while tally.steps < 12_000 {
            stops += 1
            let limit = tally.steps + 1
            let end = try await campaign.run(&tally) { $0.steps >= min(limit, 12_000) }
            #expect(end == nil)
        }
        tally.duration = whole.duration
        #expect(stops > 1 && tally == whole)
    }

    @Test func `a rule of the model that breaks is found without a difference`() throws {
        let script = try Script("vm")
        let finding = Finding(.i28, "memory is left")
        let run = ScriptRun(script, model: [.done], kvm: [.done], ending: nil, [finding], [])
        #expect(try #require(run.text).hasPrefix("model: I-28 "))
        let hung = ScriptRun(script, model: [.done], kvm: [], ending: "2: vm: hung", [], [])
        #expect(hung.text == "kvm: 2: vm: hung\n")
    }
}

/// Files of rules.
@Suite struct AnswerRules {
    private static let good = """
        - name: a
          kernel_rule: b
          line: "guest * gpa=0x1000*"
          after: ["host *kind=file*"]
          model: "-1 EFAULT*"
          kvm: "0*"
          must_not_match:
            - {line: "guest read gpa=0x1000", model: "-1 EFAULT", kvm: "0"}
        """

    private func difference(
        _ line: String = "guest read gpa=0x1000 count=2", before: [String] = ["vm", "host name=r kind=file size=1"],
        model: String = "-1 EFAULT done=0", kvm: String = "0 exit=io"
    ) -> AnswerRule.Difference { .init(line: line, before: before, model: model, kvm: kvm) }

    @Test func `a rule matches the line, both answers and what came before`() throws {
        let rule = try #require(try AnswerRule.list(Self.good, file: "f").first)
        #expect(rule.matches(difference()))
        #expect(!rule.matches(difference("guest read gpa=0x2000")))
        #expect(!rule.matches(difference(before: ["vm"])))
        #expect(!rule.matches(difference(model: "0 exit=mmio")))
        #expect(!rule.matches(difference(kvm: "-1 EINTR")))
    }

    @Test(arguments: [
        ("  line: \"guest * gpa=0x1000*\"", "  line: \"\"", "`line` is missing"),
        ("  kernel_rule: b", "", "`kernel_rule` is missing"),
        ("  kvm: \"0*\"", "  kvm: \"0*\"\n  more: 1", "unknown key `more`"),
        ("  after: [\"host *kind=file*\"]", "", "which it must not"),
        (
            "    - {line: \"guest read gpa=0x1000\", model: \"-1 EFAULT\", kvm: \"0\"}", "    []",
            "`must_not_match` is missing"
        ),
    ])
    func `a wrong file is refused`(_ old: String, _ new: String, _ problem: String) {
        let text = Self.good.split(separator: "\n", omittingEmptySubsequences: false)
            .map { $0 == old ? new : String($0) }.joined(separator: "\n")
        let error = #expect(throws: ExplanationError.self) { try AnswerRule.list(text, file: "rules.yaml") }
        #expect(error?.description.hasPrefix("rules.yaml:") == true && error?.problem.contains(problem) == true)
    }

    @Test func `the rules of the program are read`() throws {
        #expect(try AnswerRule.known().map(\.name) == ["a PFN map that allows nothing"])
    }
}

/// Swap, which somebody may switch on or off at any time.
@Suite struct SteadySwap {
    @Test func `what ran while it changed runs again`() {
        var features = KernelFeatures()
        var answers = [false, true, true, false, false, false]
        var told: [Bool] = []
        func ask() -> Bool { answers.removeFirst() }
        features.withSteadySwap(asking: ask) { told.append($0.swaps) }
        #expect(told == [false, true, false] && answers.isEmpty && !features.swaps)
    }

    /// Of memory that may be written and not read only what is mapped can be read by a guest.
    @Test(arguments: [(false, "0 exit=io done=1 values=0x5"), (true, "-1 EFAULT done=0")])
    func `pages leave the model's memory where the host swaps`(swaps: Bool, answer: String) throws {
        var features = KernelFeatures()
        features.swaps = swaps
        let script = try Script(
            "host name=r kind=anonymous size=64k prot=w", "vm", "vcpu", "store host=r value=5",
            "madvise host=r length=4k advice=pageout", "region slot=0 gpa=0 size=64k hva=r", "guest read cpu=0 gpa=0")
        var executor = try #require(ModelExecutor(features: features))
        let answers = script.run(on: &executor)
        executor.finish()
        #expect(answers[6].description == answer && executor.findings.isEmpty)
    }
}

/// What the kernel's own threads do to pages while a script runs.
@Suite struct Disturbances {
    @Test func `moved and taken pages count, and nothing else`() {
        let text = "nr_free_pages 5\npgscan_kswapd 1\npgscan_kswapd_x 9\npgmigrate_success 20\npgmigrate_fail 300\n"
        #expect(disturbances(text.split(separator: "\n")) == 321)
        #expect(disturbances([]) == 0)
        // Two that there are on every kernel.
        let names = lines(ofFile: "/proc/vmstat").map { $0.prefix { $0 != " " } }
        #expect(names.contains("pgscan_kswapd") && names.contains("pgscan_direct"))
    }

    @Test(.needsKVM) func `what was gone in a second run is told`() throws {
        let campaign = try Campaign()
        var (tally, other) = (Tally(seed: 1, kernel: "k"), Tally(seed: 1, kernel: "k"))
        #expect(!CampaignReport(campaign, tally, nil).text.contains("ran again"))
        other.disturbed = 2
        tally.add(other)
        tally.add(other)
        #expect(
            CampaignReport(campaign, tally, nil).text.contains("\n4 scripts ran again, and then without a difference"))
    }
}

/// What counts as memory that a slot shows.
@Suite struct ShownMemories {
    private let slot = Region(
        slot: 1, guestAddress: 0x1000, size: 0x2000, userAddress: HostPlace(.region(0), 0x4000))

    @Test func `changes to pages of a slot, from its making to its end`() {
        var shown = ShownMemory()
        let store = Step.store(HostPlace(.region(0), 0x5ff8), Repetition(), value: 1)
        #expect(!shown.isTouched(by: store))
        shown.note(.setRegion(vm: 0, slot, version: 1), Answer(.failed(22)))
        #expect(!shown.isTouched(by: store))
        shown.note(.setRegion(vm: 0, slot, version: 1), .done)
        #expect(shown.isTouched(by: store))
        #expect(!shown.isTouched(by: .store(HostPlace(.region(0), 0x6000), Repetition(), value: 1)))
        #expect(!shown.isTouched(by: .unmap(HostPlace(.region(0)), length: 0x4000)))
        #expect(shown.isTouched(by: .unmap(HostPlace(.region(0)), length: 0x4001)))
        #expect(!shown.isTouched(by: .unmap(HostPlace(.region(1), 0x4000), length: 0x1000)))
        #expect(shown.isTouched(by: .load(HostPlace(.region(0)), Repetition(count: 5))))
        #expect(shown.isTouched(by: .guest(CPU(vm: 0, cpu: 0), GuestAccess(.read, 0))))
        #expect(!shown.isTouched(by: .createVM(vm: 0, type: 0)))
        var gone = slot
        gone.size = 0
        shown.note(.setRegion(vm: 0, gone, version: 1), .done)
        #expect(!shown.isTouched(by: store))
    }
}

/// What is said of KVM since 6.13.
@Suite struct Claims {
    @Test(.needsKVM) func `each holds, on the model and on this machine's kernel`() throws {
        var options = RealRun.Options()
        options.hugePages = true
        let table = try ClaimTable(try Claim.known(), on: try RealRun(options))
        #expect(table.isClean, "\(table.text)")
        #expect(table.rows.count == 9 && table.rows.allSatisfy { $0.claim.source != "nobody" })
    }

    @Test(.needsKVM) func `what does not hold is told with both answers`() throws {
        let claims = try Claim.list(
            "## it is 5\n# source: me\n# before 6.13: it is 6\nvm\nstats names=no # => 0 no=5\n", file: "f")
        let table = try ClaimTable(claims, on: try RealRun())
        #expect(!table.isClean && table.rows[0].model == table.rows[0].kernel)
        #expect(table.rows[0].model == [.init(line: "stats vm=vm names=no", claimed: "0 no=5", answer: "0 no=none")])
        #expect(table.text.contains("NO     NO        it is 5\n") && table.hasSeries)
        #expect(!table.text.contains("it is 6"))
    }

    @Test func `a claim's script is read, and its errors have a place`() throws {
        let claims = try Claim.list(
            "intro\n## one\n# source: a\nvm # => 0\n## two\n# source: b\nvm\nvcpu # => -1 *\n", file: "f")
        #expect(claims.map(\.text) == ["one", "two"] && claims.map(\.source) == ["a", "b"])
        #expect(claims[0].expected == [0: "0"] && claims[1].expected == [1: "-1 *"])
        #expect(claims[1].failures([.done]).map(\.answer) == ["none"])
        #expect(claims[1].failures([.done, Answer(.failed(17))]).isEmpty)
        #expect(throws: InputErrors.self) { try Claim.list("## bad\nvn\n", file: "f") }
    }
}
