import Interface
import IoctlScript
import LinuxKVM
import Testing

/// The model and this machine's kernel give the same answers to the same calls.
@Suite(.needsKVM) struct BothSides {
    /// The child first: it has the memory that this process has then.
    private func differences(_ name: String) throws -> [Comparison.Line] {
        let script = try Script.named(name)
        let real = try RealRun().answers(of: script)
        var model = try #require(ModelExecutor())
        defer { model.finish() }
        return Comparison(script, ("model", script.run(on: &model)), ("kvm", real)).differences
    }

    @Test(arguments: [
        "addresses", "dirty-log", "documentation", "driver-mappings", "emulator", "host-memory", "kinds", "limits",
        "processes", "regions",
        "ring-bitmap", "rings",
    ])
    func `no answer differs`(script: String) throws {
        for line in try differences(script) { Issue.record("\(script):\(line.line.number): \(line.answers)") }
    }

    /// Features of the host and limits; what is not listed is the same on every host that this project knows.
    private static let ofTheHost: Set<UInt64> = [
        9, 66, 118, 128, 233, 234, 235, 236,  // nr_vcpus, max_vcpus, multi_address_space, ..., pre_fault_memory
        54,  // enable_cap: of vCPUs, which have capabilities that are not about memory
    ]

    @Test func `capabilities differ only where they tell of the host`() throws {
        for line in try differences("capabilities") {
            guard case .checkExtension(_, let capability) = line.line.step, Self.ofTheHost.contains(capability) else {
                Issue.record("\(line.line.number): \(line.answers)")
                continue
            }
        }
    }
}
