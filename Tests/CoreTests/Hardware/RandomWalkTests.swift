import Testing
import WalkFuzz

@Suite struct X86_HostileTables {
    /// Ten million are run by hand: `walkRandomTables(count: 10_000_000, seed:)`.
    @Test(arguments: [1, 2, 3, UInt64.random(in: 0 ... .max)])
    func `random tables never escape`(seed: UInt64) throws {
        let report = try #require(walkRandomTables(count: 10_000, seed: seed), "no memory")
        #expect(report.failures.isEmpty, "seed \(seed): \(report.failures)")
        #expect(report.walks == 10_000)
        // Enough of each kind that the walks are of any worth.
        let kinds = [
            report.translated, report.pageFaults, report.nonCanonical, report.outside, report.stageTwoFaults,
            report.misconfigurations,
        ]
        #expect(kinds.allSatisfy { $0 > 100 }, "seed \(seed): \(report)")
        #expect(report.mostLoads == 5 && report.mostLoadsOfTwoStages <= 35, "seed \(seed): \(report)")
        print("random walks, seed \(seed): \(report)")
    }

    @Test func `the same seed gives the same walks`() {
        #expect(walkRandomTables(count: 2000, seed: 7) == walkRandomTables(count: 2000, seed: 7))
    }

    /// Ten million are run by hand: `faultline walks --guests 10000000`.
    @Test(arguments: [1, UInt64.random(in: 0 ... .max)])
    func `random guests get nothing but their own memory`(seed: UInt64) throws {
        let report = try #require(runHostileGuests(count: 12_288, seed: seed), "no memory")
        #expect(report.failures.isEmpty, "seed \(seed): \(report.failures)")
        let kinds = [report.reached, report.mmio, report.pageFaults, report.nestedExits]
        #expect(kinds.allSatisfy { $0 > 50 }, "seed \(seed): \(report)")
        print("random guests, seed \(seed): \(report)")
    }

    @Test func `the same seed gives the same guests`() {
        #expect(runHostileGuests(count: 5000, seed: 7) == runHostileGuests(count: 5000, seed: 7))
    }
}
