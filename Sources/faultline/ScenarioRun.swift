import ArgumentParser
import Conformance
import Foundation
import LinuxKVM
import Machine
import Report
import Scenario

extension PolicyName: ExpressibleByArgument {
    public init?(argument: String) {
        guard let policy = Self.allCases.first(where: { $0.name == argument }) else { return nil }
        self = policy
    }
    public static var allValueStrings: [String] { allCases.map(\.name) }
}

extension Architecture: ExpressibleByArgument {
    public init?(argument: String) {
        guard let architecture = Self.allCases.first(where: { $0.name == argument }) else { return nil }
        self = architecture
    }
    public static var allValueStrings: [String] { allCases.map(\.name) }
}

/// Loads a scenario or ends the command with status 2 and the errors.
func load(_ path: String) throws(Failure) -> ScenarioFile {
    do throws(ScenarioErrors) {
        return try loadScenario(path: path)
    } catch {
        throw Failure(.unusable, error.description)
    }
}

/// Runs a scenario's plan in a world of its own.
func execute(
    _ file: ScenarioFile, policy: PolicyName, architecture: Architecture?
) throws(Failure) -> RunOutcome {
    let size = World.arenaSize(for: file.plan)
    guard let arena = MappedArena(size: size) else {
        throw Failure(.impossibleHere, "error: this machine has no room for an arena of \(size) bytes")
    }
    do throws(PlanError) {
        let world = try World(
            file.plan, policy: policy, architecture: architecture, arena: arena.base, arenaIsZero: true)
        let outcome = world.run()
        withExtendedLifetime(arena) {}
        return outcome
    } catch {
        switch error {
        case .region(let index, let errno):
            throw Failure(
                .unusable,
                "error: region \(String(decoding: file.plan.regions[index].name, as: UTF8.self)) can't be"
                    + " mapped: \(errno)")
        case .slot(let index, let errno):
            throw Failure(.unusable, "error: slot \(file.plan.slots[index].id) can't be created: \(errno)")
        case .hugePages(let level):
            throw Failure(
                .unusable,
                "error: the host's memory has not so many free pages of \(level.bytes >> 20) MiB to set aside")
        case .privateMemory:
            throw Failure(.unusable, "error: the architecture has no VMs with private memory")
        case .guestTables:
            throw Failure(.unusable, "error: guests have page tables of their own on x86-shadow only")
        case .dirtyRings(let errno):
            throw Failure(.unusable, "error: the vCPUs' dirty rings can't be made: \(errno)")
        }
    }
}

/// Plays a scenario on this machine's kernel, or ends the command with status 3.
func play(_ plan: Plan, _ kernel: DeviceOptions, comparing: Bool) throws(Failure) -> PlayedScenario {
    var options = kernel.applied(to: RealRun.Options())
    options.hugePages = plan.transparentHugePages
    let run: RealRun
    do throws(RealRun.Unavailable) { run = try RealRun(options) } catch {
        throw Failure(.impossibleHere, "error: \(error.reason)")
    }
    do throws(PlayError) { return try PlayedScenario(plan, on: run, comparing: comparing) } catch {
        throw Failure(error, String(decoding: plan.name, as: UTF8.self))
    }
}

extension Failure {
    /// Why what has this name was not played.
    init(_ error: PlayError, _ name: String) {
        switch error {
        case .unplayable(let why):
            self.init(.impossibleHere, "error: \(name) can't be played on a kernel: \(why)")
        case .unavailable(let unavailable): self.init(.impossibleHere, "error: \(unavailable.reason)")
        }
    }
}

struct Run: ParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "Run a scenario in the order written and show every reference on the ledger.",
        discussion: """
            With --on kvm or --diff the scenario is played on this machine's KVM, if it can be: with memory, calls and \
            accesses that a process has at will. There is no ledger then, and each step is judged as on x86. Exit status 3: \
            it can't be played, or /dev/kvm can't be used.
            """)

    @Argument(help: "A scenario, a YAML file.")
    var scenario: String
    @Option(help: "The policy for page references: \(PolicyName.allValueStrings.joined(separator: ", ")).")
    var policy: PolicyName = .precise
    @Option(
        help: "The MMU, instead of the scenario's: \(Architecture.allValueStrings.joined(separator: ", ")).")
    var architecture: Architecture?
    @Option(help: "Who plays it: the model, or this machine's KVM.")
    var on = Ioctl.Side.model
    @Flag(help: "Play it on this machine's KVM and the same calls on the model, and show where answers differ.")
    var diff = false
    @OptionGroup var kernel: DeviceOptions
    @Flag(help: "Print the report as JSON.")
    var json = false
    @Flag(name: .shortAndLong, help: "Show every event.")
    var verbose = false
    @Option(help: "Write the run to FILE in the kernel's ftrace text format.")
    var trace: String?
    @Option(help: "Write the run to FILE as a Perfetto trace, for ui.perfetto.dev.")
    var perfetto: String?

    func validate() throws {
        guard diff || on == .kvm else { return }
        if policy != .precise || architecture != nil || trace != nil || perfetto != nil || verbose {
            throw ValidationError("a kernel takes no --policy, --architecture, --trace, --perfetto or --verbose.")
        }
    }

    func run() throws {
        let file = try load(scenario)
        if diff || on == .kvm {
            let played = try play(file.plan, kernel, comparing: diff)
            output(json ? played.json : played.text)
            if !played.isClean { throw Failure(.findings) }
            return
        }
        if let architecture, !file.architectures.contains(architecture) {
            throw Failure(
                .unusable,
                "error: \(scenario) is not meant for \(architecture.name); it runs on"
                    + " \(file.architectures.map(\.name).joined(separator: ", "))")
        }
        let timeline = try perfetto.map { path throws(Failure) in try OutputFile(path: path, notOver: scenario) }
        let outcome = try execute(file, policy: policy, architecture: architecture)
        if let timeline {
            RunTimeline.write(outcome, to: timeline.write)
            try timeline.close()
        }
        if let trace {
            do {
                try FtraceText.render(outcome).write(toFile: trace, atomically: true, encoding: .utf8)
            } catch {
                throw Failure(.unusable, "error: \(trace) can't be written: \(error.localizedDescription)")
            }
        }
        output(
            json
                ? RunJSON(outcome).text()
                : RunText.render(outcome, story: file.story, terminal: .standardOutput, verbose: verbose))
        if !outcome.isClean { throw Failure(.findings) }
    }
}

struct Compare: ParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "Run a scenario under every policy and MMU and show what each breaks.",
        discussion: "Exits 0 when the table equals the scenario's `known:` entries.")

    @Argument(help: "A scenario, a YAML file.")
    var scenario: String
    @Flag(help: "Print the table as JSON.")
    var json = false

    func run() throws {
        let file = try load(scenario)
        var comparison = Comparison(scenario: String(decoding: file.plan.name, as: UTF8.self))
        for architecture in file.architectures {
            for policy in PolicyName.allCases {
                let outcome = try execute(file, policy: policy, architecture: architecture)
                comparison.add(outcome, known: file.known(policy, on: architecture)?.codes ?? [])
            }
        }
        output(json ? comparison.json() : comparison.render(.standardOutput))
        if !comparison.isAsKnown { throw Failure(.findings) }
    }
}

extension KnownDeviation {
    /// Rule codes and `expect`, as a comparison writes them.
    var codes: [String] { invariants.map(\.code) + (unmetExpectation ? ["expect"] : []) }
}

struct Schema: ParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "Print the JSON Schema of scenarios, for editors; or their reference page.")

    @Flag(help: "Print the reference page (Markdown) instead.")
    var reference = false

    func run() { output(reference ? referencePage() : jsonSchema()) }
}

struct PlanBytes: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "plan", abstract: "Write a scenario's plan as bytes, for machines without YAML.")

    @Argument(help: "A scenario, a YAML file.")
    var scenario: String
    @Argument(help: "The file to write.")
    var file: String

    func run() throws {
        let bytes = try load(scenario).plan.encoded()
        do {
            try Data(bytes).write(to: URL(fileURLWithPath: file))
        } catch {
            throw Failure(.unusable, "error: \(file) can't be written: \(error.localizedDescription)")
        }
    }
}

struct Digest: ParsableCommand {
    static let configuration = CommandConfiguration(
        abstract:
            "Run a scenario under every policy on every MMU and print a line for each: how it ended, and a hash of"
            + " its events.")

    @Argument(help: "A scenario, a YAML file.")
    var scenario: String

    func run() throws {
        let file = try load(scenario)
        var bytes: [UInt8] = []
        for architecture in Architecture.allCases where file.plan.fits(architecture) {
            for policy in PolicyName.allCases {
                bytes += try execute(file, policy: policy, architecture: architecture).digest() + [10]
            }
        }
        output(String(decoding: bytes, as: UTF8.self))
    }
}
