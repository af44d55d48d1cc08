import Explorer
import SeededRandom
import Synchrony
import Testing

/// The reduction leaves out only orders that show nothing new: every end state and every way of getting stuck that plain
/// enumeration finds, it finds, without a bound and under each.
@Suite(.serialized) struct ReductionIsSound {
    /// How the runs of one search ended.
    private struct Outcomes: Equatable {
        var ends: Set<[UInt64]> = []
        var stuck: Set<String> = []
        var runs = 0
        var complete = false
        static func == (a: Self, b: Self) -> Bool { a.ends == b.ends && a.stuck == b.stuck }
    }

    private func outcomes(_ program: GeneratedProgram, _ strategy: Strategy, limit: Int = .max) -> Outcomes {
        let explorer = Explorer(program)
        var outcomes = Outcomes()
        let coverage = explorer.search(
            strategy, runLimit: limit, each: { outcomes.ends.insert(program.endState) },
            found: { run in
                outcomes.stuck.insert("\(run.ending)")
                return true
            })
        outcomes.runs = coverage.runs
        outcomes.complete = coverage.isCompleteWithinBound
        return outcomes
    }

    @Test func `end states and findings equal those of plain enumeration`() {
        let seed: UInt64 = 20_261_121
        var maker = ProgramMaker(random: SplitMix(seed: seed))
        var (programs, plainRuns, reducedRuns) = (0, 0, 0)
        while programs < 1200 {
            let program = maker.program()
            let plain = outcomes(program, .enumeration, limit: 600)
            guard plain.complete else { continue }
            programs += 1
            let reduced = outcomes(program, Strategy())
            plainRuns += plain.runs
            reducedRuns += reduced.runs
            #expect(reduced == plain, "program \(programs) of seed \(seed): \(program.tasks)")
            var withoutSleep = Strategy()
            withoutSleep.usesSleepSets = false
            #expect(outcomes(program, withoutSleep) == plain, "program \(programs) of seed \(seed): \(program.tasks)")
        }
        print("\(programs) programs: \(plainRuns) runs by enumeration, \(reducedRuns) by reduction")
        #expect(reducedRuns * 4 < plainRuns)
    }

    @Test(arguments: 0...3)
    func `under a bound on preemptions nothing within the bound is lost`(bound: Int) {
        let seed: UInt64 = 77_000 + UInt64(bound)
        var maker = ProgramMaker(random: SplitMix(seed: seed))
        var programs = 0
        while programs < 300 {
            let program = maker.program()
            var plain = Strategy.enumeration
            plain.preemptionBound = bound
            var reduced = Strategy()
            reduced.preemptionBound = bound
            let expected = outcomes(program, plain, limit: 600)
            guard expected.complete else { continue }
            programs += 1
            #expect(outcomes(program, reduced) == expected, "program \(programs) of seed \(seed): \(program.tasks)")
        }
    }
}
