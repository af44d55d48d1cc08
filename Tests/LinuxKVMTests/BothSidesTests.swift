import Conformance
import Interface
import IoctlScript
import LinuxKVM
import Testing

/// The model and this machine's kernel give the same answers to the same calls.
@Suite(.needsKVM) struct BothSides {
    /// The child first: it has the memory that this process has then.
    private func differences(_ name: String) throws -> [Comparison.Line] {
        let script = try Script.named(name)
        let run = try RealRun()
        let features = try KernelDescription(run).features
        let real = try run.answers(of: script)
        var model = try #require(ModelExecutor(features: features))
        defer { model.finish() }
        return Comparison(script, ("model", script.run(on: &model, beside: real)), ("kvm", real)).differences
    }

    @Test(arguments: [
        "addresses", "capabilities", "dirty-log", "documentation", "driver-mappings", "emulator", "host-memory",
        "kinds", "limits", "no-argument", "prefault", "processes", "regions", "ring-bitmap", "rings", "traced",
        "vmsplice",
    ])
    func `no answer differs`(script: String) throws {
        for line in try differences(script) { Issue.record("\(script):\(line.line.number): \(line.answers)") }
    }
}
