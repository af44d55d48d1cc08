import IoctlScript
import Testing

@testable import Interface

@Suite struct RandomIoctlScripts {
    @Test(arguments: 1...60 as ClosedRange<UInt64>)
    func `a script printed and read again is the same`(seed: UInt64) throws {
        var scripts = RandomScripts(seed: seed)
        let script = scripts.script()
        #expect(try Script(text: script.source, file: "script").lines == script.lines)
    }

    @Test func `the same seed makes the same script`() {
        var (a, b) = (RandomScripts(seed: 5), RandomScripts(seed: 5))
        #expect(a.script() == b.script())
    }

    @Test func `half of the steps use memory`() {
        var (uses, all) = (0, 0)
        for seed in 1...50 as ClosedRange<UInt64> {
            var scripts = RandomScripts(seed: seed)
            for line in scripts.script().lines {
                all += 1
                switch line.step {
                case .guest, .load, .store, .map, .unmap, .protect, .advise, .remap, .truncate, .punchHost: uses += 1
                default: break
                }
            }
        }
        #expect(uses * 2 >= all, "\(uses) of \(all)")
    }

    @Test func `portable scripts have no memory that only the model has`() {
        for seed in 1...50 as ClosedRange<UInt64> {
            var profile = RandomScripts.Profile()
            profile.portableOnly = true
            var scripts = RandomScripts(seed: seed, profile)
            for line in scripts.script().lines {
                guard case .host(_, let kind, _, _) = line.step else { continue }
                #expect(kind.isPortable)
            }
        }
    }

    /// The seed of a failure is printed with its script.
    @Test func `100,000 random steps break no rule and leave nothing`() throws {
        var run = RandomRun(seed: 1, storage: try #require(ModelStorage()))
        let found = run.run(steps: 100_000) { _ in }
        #expect(found == nil, "seed \(found?.seed ?? 0): \(found?.findings ?? [])\n\(found?.script.source ?? "")")
    }

    @Test func `a script that fails is shrunk to the lines that matter`() throws {
        var scripts = RandomScripts(seed: 3)
        let script = scripts.script()
        func fails(_ script: Script) -> Bool {
            script.lines.contains { line in
                guard case .setRegion = line.step else { return false }
                return true
            }
        }
        let shrunk = script.shrunk(fails)
        #expect(fails(shrunk))
        #expect(shrunk.lines.count <= 3)
        #expect(try Script(text: shrunk.source, file: "script").lines == shrunk.lines)
    }
}
