// Scenario: the language in which a guest-memory situation is written down, and what reading it can go wrong.
//
// A scenario is a short YAML file: the host's memory, the VM and its slots, guest programs, host events, what is
// expected. Reading it goes in stages, each of which ends if something was wrong: bytes to text (`SourceText`), text to
// YAML within bounds (`PlainYAML`, `Element`), YAML to typed fields as the vocabulary says (`Vocabulary`,
// `ShapeReader`), fields to a plan whose parts fit each other (`HostBuilder`, `GuestLayout`, `PhaseBuilder`).
//
// It guarantees that a plan is whole or there is none, that each complaint has its place in the file, and that no input
// makes it trap. It never runs anything: that is `Machine`'s.

import Audit
import Machine
import TextInput

public typealias ScenarioError = InputError
public typealias ScenarioErrors = InputErrors

/// A scenario's file, read and checked.
public struct ScenarioFile: Sendable, Equatable {
    public var plan: Plan
    /// The comment at the top of the file.
    public var story: String
    /// What the older policies break.
    public var known: [KnownDeviation]
    /// The architectures whose guest addresses reach as far as the scenario does, and that have what its VM needs. `plan`
    /// runs on all of them.
    public var architectures: [Architecture]

    /// What is known to break under `policy` on `architecture`; nil for nothing.
    public func known(_ policy: PolicyName, on architecture: Architecture) -> KnownDeviation? {
        known.first { $0.policy == policy && $0.architectures.contains(architecture) }
    }
}

/// What a policy other than `precise` breaks in a scenario. `compare` looks for exactly this.
public struct KnownDeviation: Sendable, Equatable {
    public var policy: PolicyName
    /// No two deviations of a policy share an architecture.
    public var architectures: ArchitectureSet
    public var invariants: [Invariant]
    /// At least one of the scenario's expectations isn't met.
    public var unmetExpectation: Bool
}

/// Reads a scenario from a file.
public func loadScenario(path: String) throws(ScenarioErrors) -> ScenarioFile {
    try loadScenario(bytes: try readBytes(of: .scenario, file: path), file: path)
}

/// Reads a scenario from text; `file` is what messages call it.
public func loadScenario(text: String, file: String) throws(ScenarioErrors) -> ScenarioFile {
    try loadScenario(bytes: Array(text.utf8), file: file)
}

/// Reads a scenario from a file's bytes; `file` is what messages call it.
public func loadScenario(bytes: [UInt8], file: String) throws(ScenarioErrors) -> ScenarioFile {
    let source = try SourceText(.scenario, file: file, bytes: bytes)
    let complaints = Complaints(file: file, lines: source.lines)
    let root = try ElementReader.read(source, complaints)
    let fields = ShapeReader(complaints: complaints).fields(root, as: .scenario)
    try complaints.throwIfAny()
    return try ScenarioBuilder(complaints: complaints, story: source.story).build(fields)
}

/// The second stage: what the fields mean together.
struct ScenarioBuilder {
    let complaints: Complaints
    let story: String

    func build(_ fields: Fields) throws(ScenarioErrors) -> ScenarioFile {
        var plan = Plan()
        plan.name = Array((fields.text("name") ?? "").utf8)
        let word = fields.words("architecture").first
        plan.architecture = Architecture.allCases.first { Vocabulary.word($0) == word } ?? .x86TDP
        if let host = fields.fields("host") { HostBuilder(complaints: complaints).build(host, into: &plan) }
        try complaints.throwIfAny()

        var layout = GuestLayout(complaints, plan.architecture)
        if let vm = fields.fields("vm") { buildVM(vm, &layout, &plan) }
        try complaints.throwIfAny()

        let end = buildPhases(fields, layout, &plan)
        plan.expectations = statistics(fields)
        let known = known(fields)
        checkTables(fields, plan)
        try complaints.throwIfAny()
        let architectures = Architecture.allCases.filter {
            end <= 1 << $0.guestAddressBits && plan.fits($0)
        }
        return ScenarioFile(plan: plan, story: story, known: known, architectures: architectures)
    }

    private func buildVM(_ vm: Fields, _ layout: inout GuestLayout, _ plan: inout Plan) {
        plan.virtualCPUs = Int(vm.number("vcpus") ?? 1)
        plan.allowUnsafeMappings = vm.flag("allow_unsafe_mappings")
        setFeatures(vm, &plan)
        layout.hasPrivateMemory = plan.hasPrivateMemory
        for fields in vm.list("slots") {
            guard let slot = layout.slot(fields, plan.regions, checked: true) else { continue }
            layout.place(slot, at: fields.position(of: "slot"))
            plan.slots.append(slot)
        }
        placeTables(vm, &plan)
    }

    private func setFeatures(_ vm: Fields, _ plan: inout Plan) {
        plan.asyncFaults = vm.flag("async_faults")
        plan.hasPrivateMemory = vm.words("type").first == "sw_protected"
        if !plan.fits(plan.architecture) {
            complaints.add(
                vm.position(of: "type"), "`sw_protected` on \(Vocabulary.word(plan.architecture))",
                "only x86 has such VMs: say `architecture: x86-tdp`")
        }
        guard let bytes = vm.number("dirty_ring") else { return }
        plan.dirtyRingBytes = bytes
        if bytes & (bytes &- 1) != 0 || !(4096...1 << 20).contains(bytes) {
            complaints.add(
                vm.position(of: "dirty_ring"), "a dirty ring can't have \(Quantity.shown(bytes))",
                "a power of two, at least 4 KiB, at most 1 MiB; leave it out for none")
        }
    }

    /// One past the highest guest address used.
    private func buildPhases(_ fields: Fields, _ layout: GuestLayout, _ plan: inout Plan) -> UInt64 {
        var builder = PhaseBuilder(complaints, plan, layout)
        let phases = fields.list("phases")
        if phases.isEmpty {
            complaints.add(
                fields.position(of: "phases"), "no phases", "a scenario in which nothing happens shows nothing")
        }
        for (index, phase) in phases.enumerated() {
            plan.phases.append(builder.phase(phase, number: index + 1))
        }
        return builder.layout.end
    }

    private func statistics(_ fields: Fields) -> [StatisticExpectation] {
        guard let counters = fields.fields("expect")?.fields("statistics") else { return [] }
        var expectations: [StatisticExpectation] = []
        for field in counters.fields {
            guard case .counter(let readings) = field.reading,
                let name = StatisticName.allCases.first(where: { "\($0)" == field.key.name })
            else { continue }
            for reading in readings {
                var expectation = StatisticExpectation(name, reading.value)
                expectation.architectures = reading.architectures
                expectations.append(expectation)
            }
        }
        return expectations
    }

    /// `guess on riscv-sv39x4` goes before `guess on riscv`, and that before `guess`.
    private func known(_ fields: Fields) -> [KnownDeviation] {
        guard let known = fields.fields("known") else { return [] }
        var deviations: [KnownDeviation] = []
        for policy in PolicyName.allCases {
            var left = ArchitectureSet.all
            let words = Vocabulary.architectureWords.map { "\(policy) on \($0)" } + ["\(policy)"]
            for word in words {
                guard case .rules(let invariants, let unmet)? = known[word]?.reading else { continue }
                let said = word.split(separator: " ").dropFirst(2).first.flatMap {
                    Vocabulary.architectureSet(String($0))
                }
                let set = left.intersection(said ?? .all)
                left.subtract(set)
                guard !set.isEmpty, !invariants.isEmpty || unmet else { continue }
                deviations.append(
                    KnownDeviation(
                        policy: policy, architectures: set, invariants: invariants, unmetExpectation: unmet))
            }
        }
        return deviations
    }
}
