import ArgumentParser
import WalkFuzz

struct Walks: ParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "Walk random page tables: does the processor's walk stay where it belongs?",
        discussion: """
            Guest page tables are hostile input: any bytes, loops, tables outside of memory or inside of a device. Walks of \
            all modes, in one dimension and behind EPT or NPT, must end after as many loads as the architecture has levels, \
            and never read what does not exist.
            """)

    @Option(name: .customLong("random"), help: "How many walks of the processor.")
    var count = 100_000
    @Option(
        name: .customLong("guests"),
        help: "How many walks of KVM's own, of guests under shadow paging and of guest hypervisors, instead.")
    var guestCount: Int?
    @Option(help: "Seed of the tables; the same walks for the same seed.")
    var seed: UInt64 = 1

    func validate() throws {
        guard count > 0 else { throw ValidationError("--random must be at least 1") }
        guard guestCount ?? 1 > 0 else { throw ValidationError("--guests must be at least 1") }
    }

    func run() throws {
        if let guestCount { return try runGuests(guestCount) }
        guard let report = walkRandomTables(count: count, seed: seed) else {
            throw Failure(.impossibleHere, "error: no room for the memory of the walks")
        }
        var text = """
            \(report.walks) walks, seed \(report.seed): \(report.translated) translated, \(report.pageFaults) page faults, \
            \(report.stageTwoFaults) second-stage faults, \(report.misconfigurations) misconfigurations, \
            \(report.outside) left memory, \(report.nonCanonical) not canonical, \(report.fullLogs) full logs
            the longest read \(report.mostLoads) entries, of two stages \(report.mostLoadsOfTwoStages)

            """
        for failure in report.failures { text += "WRONG: \(failure)\n" }
        output(text)
        if !report.failures.isEmpty { throw Failure(.findings) }
    }

    private func runGuests(_ count: Int) throws {
        guard let report = runHostileGuests(count: count, seed: seed) else {
            throw Failure(.impossibleHere, "error: no room for the memory of the guests")
        }
        var text = """
            \(report.walks) walks of KVM's, seed \(report.seed): \(report.reached) reached memory, \(report.mmio) none, \
            \(report.pageFaults) page faults, \(report.nestedExits) told to a guest hypervisor

            """
        for failure in report.failures { text += "WRONG: \(failure)\n" }
        output(text)
        if !report.failures.isEmpty { throw Failure(.findings) }
    }
}
