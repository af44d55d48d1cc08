import Interface
import IoctlScript
import LinuxKVM
import Replay

extension TracedRun {
    /// A random script of which the model tells another thing than the kernel.
    public struct Found: Sendable {
        /// A run with this seed begins with the script.
        public var seed: UInt64
        /// With as few lines as could be found.
        public var script: Script
        public var comparison: TracedScript
    }

    /// Compares random scripts of this many steps in all, the first with this seed. Nil: no difference.
    /// - Parameter progress: hears of the steps and comparisons so far, after each script.
    public func compareRandom(
        seed: UInt64, steps: Int, _ progress: (_ steps: Int, _ compared: Int) -> Bool
    ) throws -> Found? {
        var profile = features.profile
        profile.isTraced = true
        var (next, done, compared) = (seed, 0, 0)
        while done < steps {
            var source = RandomScripts(seed: next, profile)
            let script = source.script()
            let comparison = try compare(script, name: "seed \(next)")
            done += script.lines.count
            compared += comparison.report.compared
            if !comparison.report.isFaithful { return try shrink(script, seed: next, comparison) }
            if !progress(done, compared) { break }
            next &+= 1
        }
        return nil
    }

    private func shrink(_ script: Script, seed: UInt64, _ first: TracedScript) throws -> Found {
        var failure: (any Error)?
        let shrunk = script.shrunk { candidate in
            do { return try !compare(candidate, name: "").report.isFaithful } catch {
                failure = error
                return false
            }
        }
        if let failure { throw failure }
        let last = try compare(shrunk, name: "seed \(seed), shrunk")
        return Found(
            seed: seed, script: shrunk.renumbered, comparison: last.report.isFaithful ? first : last)
    }
}
