import Audit
import Explorer
import Foundation
import Laboratory
import Machine
import Scenario
import Testing

/// Each defect of the museum is found where it is said to show, with the fewest preemptions that are said.
@Suite(.serialized) struct Museum {
    struct Place: Sendable, CustomTestStringConvertible {
        let exhibit: Exhibit
        let index: Int
        var testDescription: String { "\(exhibit.name) in \(exhibit.scenarios[index])" }
    }

    static let places = Exhibit.all.flatMap { exhibit in
        exhibit.scenarios.indices.map { Place(exhibit: exhibit, index: $0) }
    }

    @Test func `thirty-six defects, each in a scenario of its own and in another`() {
        #expect(Exhibit.all.count >= 36)
        for exhibit in Exhibit.all {
            #expect(exhibit.scenarios.count == 2 && Set(exhibit.scenarios).count == 2, "\(exhibit.name)")
        }
        #expect(Set(Exhibit.all.map(\.name)).count == Exhibit.all.count)
        #expect(Set(Exhibit.all.map(\.defect)).count == Exhibit.all.count)
    }

    @Test(arguments: places) func `a defect is found, and with no fewer preemptions`(place: Place) throws {
        let exhibit = place.exhibit
        let file = try shippedScenario(exhibit.scenarios[place.index])
        let plan = file.plan
        let subject = try #require(
            WorldSubject(plan, policy: exhibit.policy ?? .precise, architecture: exhibit.architecture))
        if let known = file.known(exhibit.policy ?? .precise, on: exhibit.architecture ?? plan.architecture) {
            subject.known.rules = known.invariants
            subject.known.unexpectedSteps = known.unmetExpectation
        }
        // Without the defect this very search finds nothing.
        var baseline = Strategy()
        baseline.preemptionBound = 0
        let clean = Explorer(subject)
        _ = clean.search(baseline) { run in
            Issue.record("found without the defect: \(run.schedule)")
            return false
        }
        let explorer = Explorer(subject, defects: 1 << UInt64(exhibit.defect.rawValue))
        var limits = CheckLimits()
        limits.onlyBounded = true
        let report = Checker(explorer, limits: limits).check()
        let run = try #require(report.finding)
        #expect(run.preemptions == exhibit.fewest[place.index])
        #expect(report.isFewest)
        // What is printed makes the same again.
        let again = explorer.replay(run.asked ?? run.schedule)
        #expect(!again.isClean && again.schedule == run.schedule && again.misfit == nil)
        let story = Story(run, subject, explorer)
        #expect(!story.findings.isEmpty || !story.unexpected.isEmpty || !story.stuck.isEmpty)
        // Whoever uses the log wrongly is told by the image, and KVM's rules hold.
        if exhibit.reference.contains("LOG-1") {
            #expect(story.findings.allSatisfy { $0.invariant == .log1 && $0.place != nil } && !story.findings.isEmpty)
        }
    }
}

/// A file of `Scenarios/`.
func shippedScenario(_ name: String) throws -> ScenarioFile {
    let root = URL(filePath: #filePath).deletingLastPathComponent().deletingLastPathComponent()
        .deletingLastPathComponent()
    return try loadScenario(path: root.appending(path: "Scenarios/\(name).yaml").path)
}
