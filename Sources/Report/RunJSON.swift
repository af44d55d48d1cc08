import Audit
import Foundation
import Frames
import HostMemory
import JSONOutput
import Machine

/// The same report for programs: stable keys, sorted; numbers of frames and addresses as hexadecimal strings.
public struct RunJSON: Codable, Sendable, Equatable {
    public struct Step: Codable, Sendable, Equatable {
        public var phase: String
        public var actor: String
        public var action: String
        public var outcome: String
        public var expected: Bool
        public var faults: [String]
        public var line: Int
    }
    public struct FindingEntry: Codable, Sendable, Equatable {
        public var rule: String
        public var statement: String
        public var reason: String
        /// The driver that is to blame, if one is.
        public var driver: String?
        public var pfn: String?
        public var gfn: String?
        /// The page of a slot, where the finding names one.
        public var slot: UInt16?
        public var page: UInt64?
    }
    public struct Counter: Codable, Sendable, Equatable {
        public var name: String
        public var value: UInt64
    }
    public struct RegionEntry: Codable, Sendable, Equatable {
        public var name: String
        public var kind: String
        public var pages: Int
        public var hostMapped: Int
        public var guestMapped: Int
        public var guestWritable: Int
        public var accessed: [String: Int]
        public var dirty: [String: Int]
    }
    public var scenario: String
    public var architecture: String
    public var policy: String
    public var verdict: String
    public var steps: [Step]
    public var findings: [FindingEntry]
    public var held: [String]
    public var statistics: [String: UInt64]
    /// As `KVM_GET_STATS_FD` gives them: of the VM, and of each vCPU.
    public var vm: [Counter]
    public var vcpus: [[Counter]]
    public var regions: [RegionEntry]

    public init(_ outcome: RunOutcome) {
        let text = ActionText(plan: outcome.plan)
        scenario = String(name: outcome.plan.name)
        architecture = outcome.architecture.name
        policy = outcome.policy.name
        verdict = outcome.isClean ? "ok" : "not ok"
        steps = outcome.steps.map { result in
            let phase = outcome.plan.phases[result.phase]
            let task = phase.tasks[result.task]
            return Step(
                phase: String(name: phase.name), actor: task.actor.text,
                action: text.describe(task.steps[result.step].action),
                outcome: result.outcome.text, expected: result.expected,
                faults: FaultStory.all(in: outcome.events[result.events]).map {
                    "gfn \(hex($0.guest)): \($0.sentence)"
                },
                line: task.steps[result.step].line)
        }
        findings = outcome.findings.map { finding in
            FindingEntry(
                rule: finding.invariant.code, statement: finding.invariant.statement.description,
                reason: finding.reason.text.description, driver: finding.driver?.text.description,
                pfn: finding.frame == Event.none ? nil : address(finding.frame),
                gfn: finding.guest == Event.none ? nil : address(finding.guest),
                slot: finding.place?.slot, page: finding.place?.page)
        }
        held = outcome.holdings.map {
            "pfn \(hex($0.frame)) by \($0.holder): \($0.references) references, \($0.pins) pins"
        }
        statistics = Dictionary(uniqueKeysWithValues: outcome.statistics.map { ("\($0.statistic)", $0.value) })
        let counters = outcome.counters.map { $0.map { Counter(name: "\($0.name)", value: $0.value) } }
        vm = counters.first ?? []
        vcpus = Array(counters.dropFirst())
        regions = outcome.regions.map { state in
            let plan = outcome.plan.regions[state.region]
            func named(_ counts: [Int]) -> [String: Int] {
                Dictionary(uniqueKeysWithValues: Originator.allCases.map { ("\($0)", counts[Int($0.rawValue)]) })
            }
            return RegionEntry(
                name: String(name: plan.name), kind: "\(plan.kind)", pages: Int(plan.size >> pageShift),
                hostMapped: state.mapped, guestMapped: state.guestMapped, guestWritable: state.guestWritable,
                accessed: named(state.accessedBy), dirty: named(state.dirtyBy))
        }
    }

    /// The text, with a line break at the end.
    public func text() -> String { jsonText(self) }
}
