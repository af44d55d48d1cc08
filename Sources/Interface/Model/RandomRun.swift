import Audit
import IoctlScript

/// Runs random scripts on the model and checks its rules: during each script, and that nothing is left at its end.
public struct RandomRun {
    public let seed: UInt64
    private let storage: ModelStorage
    public private(set) var steps = 0
    public private(set) var scripts = 0

    public init(seed: UInt64, storage: ModelStorage) {
        self.seed = seed
        self.storage = storage
    }

    /// A script that breaks rules, with as few steps as could be found.
    public struct Found: Sendable {
        /// Of the script alone: `--random 1 --seed` makes it again.
        public var seed: UInt64
        public var findings: [Finding]
        public var script: Script
    }

    /// Runs scripts of seeds from `seed` on until they have had `count` steps; nil if none broke a rule.
    public mutating func run(steps count: Int, progress: (Int) -> Void) -> Found? {
        while steps < count {
            let seed = seed &+ UInt64(scripts)
            var source = RandomScripts(seed: seed)
            let script = source.script()
            scripts += 1
            steps += script.lines.count
            if !findings(of: script).isEmpty {
                let shrunk = script.shrunk { !findings(of: $0).isEmpty }
                return Found(seed: seed, findings: findings(of: shrunk), script: shrunk)
            }
            if scripts % 64 == 0 { progress(steps) }
        }
        return nil
    }

    /// Steps between two looks at the rules.
    private static let interval = 16

    /// What a script breaks on a fresh model.
    func findings(of script: Script) -> [Finding] {
        let executor = ModelExecutor(storage)
        for (index, line) in script.lines.enumerated() {
            _ = executor.perform(line.step, process: line.process)
            if index % Self.interval == Self.interval - 1 { executor.check() }
        }
        executor.check()
        executor.finish()
        return executor.findings
    }
}
