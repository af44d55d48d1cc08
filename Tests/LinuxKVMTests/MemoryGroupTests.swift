import Glibc
import IoctlScript
import Testing

@testable import Conformance
@testable import LinuxKVM

/// A cgroup whose limit the kernel's own requests for memory meet with an errno: of version 1, and for root.
private enum MemoryGroup {
    static let path = "/sys/fs/cgroup/memory"
    static let isThere = access(path + "/memory.oom_control", W_OK) == 0
}

/// ENOMEM of a slot's call, from the kernel itself. Spec: generic 4.4, rows 21 and 22.
@Suite(.needsKVM, .enabled(if: MemoryGroup.isThere, "no cgroup of version 1 limits memory here"), .serialized)
struct G4_KernelWithoutMemory {
    @Test func `a slot for whose tables there is no memory is ENOMEM, and nothing ends`() throws {
        var options = RealRun.Options()
        options.memoryGroup = MemoryGroup.path
        options.groupMemory = 64 << 20
        options.slotPages = 1 << 20
        let run = try RealRun(options)
        #expect(run.refusedPages == 8 << 20)
        try #require(
            try KernelDescription(run).features.slotPages == 8 << 20, "slots need no tables of their size here")
        let answers = try run.answers(
            of: try Script(
                "host name=r kind=anonymous size=64k", "vm", "region slot=0 gpa=0 size=0x7fffffff000 hva=r",
                "region slot=0 flags=log_dirty gpa=0 size=0x7fffffff000 hva=r",
                "region slot=0 gpa=0 size=16G hva=r", "region slot=0 gpa=0 size=64k hva=r"))
        #expect(answers[2] == Answer(.failed(ENOMEM)) && answers[3] == answers[2])
        #expect(answers[4].isNotHere && answers[5] == .done)
    }

    @Test func `random scripts meet it, and the model says the same`() async throws {
        var options = Campaign.Options()
        options.real.memoryGroup = MemoryGroup.path
        options.rules = try AnswerRule.known()
        let campaign = try Campaign(options)
        var tally = Tally(seed: 3, kernel: campaign.kernel.release)
        let end = try await campaign.run(&tally) { $0.steps >= 20_000 }
        #expect(end == nil, "\(end?.found.text ?? "")")
        if campaign.kernel.features.slotPages < .max {
            #expect((tally.answers["region"]?["ENOMEM"] ?? 0) + (tally.answers["region2"]?["ENOMEM"] ?? 0) > 0)
        }
    }

    @Test func `without a cgroup nobody asks for more than there is`() throws {
        let run = try RealRun()
        #expect(run.refusedPages == nil)
        #expect(try KernelDescription(run).features.slotPages == .max)
    }
}
