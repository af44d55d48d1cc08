// Conformance: the same random scripts on the model and on this machine's KVM, and where their answers differ.
//
// It guarantees that a script's two sides begin with nothing, that the model is told of the kernel only what the kernel
// itself says (`KernelFeatures`), and that every difference is either explained by a rule, which is counted, or found. After
// an explained difference the two are not in the same state, and the rest of that script is not compared.

import Audit
import Explanations
import Glibc
import Interface
import IoctlScript
import LinuxKVM

/// A run of random scripts on both sides, which can be stopped and gone on with.
public struct Campaign: Sendable {
    public struct Options: Sendable {
        public var real = RealRun.Options()
        public var rules: [AnswerRule] = []
        /// Pairs of a kernel's side and a model that work at the same time.
        public var jobs = 1
        public init() {
            // A slot has tables of its size, on both sides.
            real.slotPages = 1 << 20
            // In a cgroup the largest slots have none.
            real.groupMemory = 256 << 20
        }
    }

    /// What a script has shown.
    public struct Found: Sendable, Equatable {
        /// Of the script: a campaign with this seed begins with it.
        public var seed: UInt64
        /// With as few lines as could be found.
        public var script: Script
        /// Both answers to each line that differs, the rule that broke, or what the kernel did not return from.
        public var text: String
        /// Whether it came again when the script ran again.
        public var isRepeatable: Bool
    }

    public let options: Options
    public let kernel: KernelDescription
    private let pairs: [Pair]

    /// Starts the sides and asks the kernel what it has.
    public init(_ options: Options = Options()) throws(RealRun.Unavailable) {
        try self.init(options) { _ in }
    }

    /// - Parameter change: what the model is told wrong.
    init(_ options: Options, _ change: (inout KernelFeatures) -> Void) throws(RealRun.Unavailable) {
        self.options = options
        let first = try RealRun(options.real)
        kernel = try KernelDescription(first)
        var features = kernel.features
        change(&features)
        var pairs = [try Pair(first, features, options.rules)]
        for _ in 1..<max(1, options.jobs) {
            pairs.append(try Pair(try RealRun(options.real), features, options.rules))
        }
        self.pairs = pairs
    }

    /// Scripts of one pair in a round.
    private static let roundScripts: UInt64 = 32

    /// Runs scripts until `isOver` says so, which is asked between rounds, or one shows something. The tally is whole at
    /// each question: from any of them a campaign goes on as if it had not stopped. With what was found comes the tally from
    /// which a campaign comes to it again.
    public func run(
        _ tally: inout Tally, until isOver: (Tally) -> Bool
    ) async throws(RealRun.Unavailable) -> (found: Found, before: Tally)? {
        let clock = ContinuousClock()
        while !isOver(tally) {
            let start = clock.now
            var found: (script: UInt64, found: Found)?
            let before = tally
            let next = tally.scripts
            let base = tally.seed
            let rounds = await withTaskGroup(of: Round.self) { group in
                for (index, pair) in pairs.enumerated() {
                    let first = next + UInt64(index) * Self.roundScripts
                    group.addTask { await pair.round(first..<first + Self.roundScripts, of: base) }
                }
                var rounds: [Round] = []
                for await round in group { rounds.append(round) }
                return rounds
            }
            for round in rounds {
                if let unavailable = round.unavailable { throw unavailable }
                tally.add(round.tally)
                if let new = round.found, new.script < found?.script ?? .max { found = new }
            }
            tally.duration += (clock.now - start) / .seconds(1)
            if let found { return (found.found, before) }
        }
        return nil
    }
}

/// What one pair did of a round.
struct Round: Sendable {
    var tally: Tally
    var found: (script: UInt64, found: Campaign.Found)?
    var unavailable: RealRun.Unavailable?
}

/// Linux's release, as `uname -r` prints it.
public var kernelRelease: String {
    var names = utsname()
    guard uname(&names) == 0 else { return "unknown" }
    return withUnsafeBytes(of: names.release) { String(decoding: $0.prefix { $0 != 0 }, as: UTF8.self) }
}
