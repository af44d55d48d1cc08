import Explorer
import Foundation
import Laboratory
import Machine
import Scenario
import Testing

/// Each defect of the museum is found where it is said to show, with the fewest preemptions that are said.
@Suite struct Museum {
    struct Place: Sendable, CustomTestStringConvertible {
        let exhibit: Exhibit
        let index: Int
        var testDescription: String { "\(exhibit.name) in \(exhibit.scenarios[index])" }
    }

    static let places = Exhibit.all.flatMap { exhibit in
        exhibit.scenarios.indices.map { Place(exhibit: exhibit, index: $0) }
    }

    @Test func `ten defects, each in a scenario of its own and in another`() {
        #expect(Exhibit.all.count >= 10)
        for exhibit in Exhibit.all {
            #expect(exhibit.scenarios.count == 2 && Set(exhibit.scenarios).count == 2, "\(exhibit.name)")
        }
        #expect(Set(Exhibit.all.map(\.name)).count == Exhibit.all.count)
        #expect(Set(Exhibit.all.map(\.defect)).count == Exhibit.all.count)
    }

    @Test(arguments: places) func `a defect is found, and with no fewer preemptions`(place: Place) throws {
        let exhibit = place.exhibit
        let plan = try shippedPlan(exhibit.scenarios[place.index])
        let subject = try #require(
            WorldSubject(plan, policy: exhibit.policy ?? .precise, architecture: exhibit.architecture))
        let explorer = Explorer(subject, defects: 1 << UInt64(exhibit.defect.rawValue))
        let report = Checker(explorer).check()
        let run = try #require(report.finding)
        #expect(run.preemptions == exhibit.fewest[place.index])
        #expect(report.isFewest)
        // What is printed makes the same again.
        let again = explorer.replay(run.asked ?? run.schedule)
        #expect(!again.isClean && again.schedule == run.schedule && again.misfit == nil)
        let story = Story(run, subject, explorer)
        #expect(!story.findings.isEmpty || !story.unexpected.isEmpty || !story.stuck.isEmpty)
    }
}

/// A plan of `Scenarios/`.
func shippedPlan(_ name: String) throws -> Plan {
    let root = URL(filePath: #filePath).deletingLastPathComponent().deletingLastPathComponent()
        .deletingLastPathComponent()
    return try loadScenario(path: root.appending(path: "Scenarios/\(name).yaml").path).plan
}
