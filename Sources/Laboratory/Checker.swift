import Explorer
import Machine

/// How far a check goes.
public struct CheckLimits: Sendable {
    /// Most runs of each search.
    public var runs = 100_000
    /// Most preemptions of the bounded searches that come first.
    public var preemptions = 2
    /// Whether only the bounded searches are made.
    public var onlyBounded = false
    /// Points after which a run is cut.
    public var depth = 20_000
    /// Random runs past the bounds, and their seed.
    public var randomRuns = 5_000
    public var seed: UInt64 = 1
    public init() {}
}

/// What a check did and found.
public struct CheckReport {
    /// One search: what it was, and how far it came.
    public struct Stage: Sendable {
        public enum Kind: Sendable, Equatable {
            case everyOrder
            case preemptions(Int)
            case random
            /// One run, asked for.
            case schedule
        }
        public var kind: Kind
        public var coverage: Explorer.Coverage
        public init(kind: Kind, coverage: Explorer.Coverage) {
            self.kind = kind
            self.coverage = coverage
        }
    }

    public var stages: [Stage] = []
    public init() {}
    /// The run that shows the finding, with the fewest preemptions that were found to show one.
    public var finding: Explorer.Run?
    /// Whether fewer preemptions can't show it: every search with fewer was complete.
    public var isFewest = false

    public var isComplete: Bool { finding == nil && stages.contains { $0.coverage.isComplete } }
    /// The largest bound on preemptions within which everything was run.
    public var completeBound: Int? {
        var largest: Int?
        for stage in stages {
            if case .preemptions(let bound) = stage.kind, stage.coverage.isCompleteWithinBound { largest = bound }
        }
        return largest
    }
    public var runs: Int { stages.reduce(0) { $0 + $1.coverage.runs } }
    public var points: UInt64 { stages.reduce(0) { $0 + $1.coverage.points } }
    public var bytes: Int { stages.map(\.coverage.bytes).max() ?? 0 }
}

/// Runs a subject in every relevant order, within limits, and looks for the simplest run that goes wrong.
public struct Checker {
    public let explorer: Explorer
    public var limits: CheckLimits

    public init(_ explorer: Explorer, limits: CheckLimits = CheckLimits()) {
        self.explorer = explorer
        self.limits = limits
        explorer.depthLimit = limits.depth
    }

    /// First by bounds on preemptions from 0 upwards, so that what is found is found with the fewest; then every order, if
    /// that many can be run; where they can't, at random.
    public func check() -> CheckReport {
        var report = CheckReport()
        var fewerKnown = true
        for bound in 0...limits.preemptions {
            var strategy = Strategy()
            strategy.preemptionBound = bound
            if let found = search(strategy, .preemptions(bound), &report) {
                report.finding = shorten(found)
                report.isFewest = fewerKnown && found.preemptions == bound
                return report
            }
            if report.stages.last?.coverage.isComplete == true { return report }
            if report.stages.last?.coverage.isCompleteWithinBound != true { fewerKnown = false }
        }
        if limits.onlyBounded { return report }
        if let found = search(Strategy(), .everyOrder, &report) {
            report.finding = shorten(found)
            report.isFewest = fewerKnown && report.finding?.preemptions == limits.preemptions + 1
            return report
        }
        return report.isComplete ? report : walk(report)
    }

    private func search(
        _ strategy: Strategy, _ kind: CheckReport.Stage.Kind, _ report: inout CheckReport
    ) -> Explorer.Run? {
        var found: Explorer.Run?
        let coverage = explorer.search(strategy, runLimit: limits.runs) { run in
            found = run
            return false
        }
        report.stages.append(CheckReport.Stage(kind: kind, coverage: coverage))
        return found
    }

    private func walk(_ report: CheckReport) -> CheckReport {
        var report = report
        guard limits.randomRuns > 0 else { return report }
        var found: Explorer.Run?
        let runs = max(report.runs, 1)
        let length = Int(report.points) / runs
        let coverage = explorer.walk(
            runs: limits.randomRuns, changes: limits.preemptions + 1, points: max(length, 10), seed: limits.seed
        ) { run in
            found = run
            return false
        }
        report.stages.append(CheckReport.Stage(kind: .random, coverage: coverage))
        report.finding = found.map(shorten)
        return report
    }

    /// A run that goes wrong in fewer stretches: each stretch in turn is left out, or joined to its neighbour, as long as
    /// something still goes wrong with no more preemptions. Then the end that the default order gives anyway is cut off.
    private func shorten(_ run: Explorer.Run) -> Explorer.Run {
        var best = run
        var tries = 0
        var improved = true
        while improved, tries < 2_000 {
            improved = false
            let stretches = best.schedule.stretches
            for i in stretches.indices where tries < 2_000 {
                tries += 1
                var fewer: [UInt8] = []
                for (j, stretch) in stretches.enumerated() where j != i {
                    fewer.append(contentsOf: repeatElement(stretch.task, count: stretch.points))
                }
                let other = explorer.replay(Schedule(fewer))
                guard !other.isClean, other.misfit == nil, other.preemptions <= best.preemptions,
                    other.schedule.stretches.count < stretches.count
                else { continue }
                best = other
                improved = true
                break
            }
        }
        return trim(best)
    }

    private func trim(_ run: Explorer.Run) -> Explorer.Run {
        var best = run
        var choices = run.schedule.choices
        while let last = Schedule(choices).stretches.last {
            choices.removeLast(last.points)
            let other = explorer.replay(Schedule(choices))
            guard other.schedule == run.schedule else { break }
            best.asked = Schedule(choices)
        }
        return best
    }
}
