import Foundation
import Testing

/// `faultline conform`: random scripts on the model and on this machine's KVM.
@Suite struct ConformCommand {
    private static let hasKVM = access("/dev/kvm", R_OK | W_OK) == 0

    @Test(.enabled(if: hasKVM, "/dev/kvm can't be opened"))
    func `a short campaign ends without a difference, is kept, and goes on`() throws {
        try withFolder { folder in
            let file = folder + "/campaign.json"
            let first = try Command.run("conform", "--steps", "2000", "--seed", "21", "--resume", file)
            #expect(first.status == 0, "\(first.output)\(first.errors)")
            #expect(first.output.contains("scripts, seed 21, Linux ") && !first.output.contains("\u{1b}"))
            #expect(first.output.contains("guest write") && first.output.contains("read from it: user_memory 1"))
            let second = try Command.run("conform", "--steps", "20000", "--resume", file, "--json")
            #expect(second.status == 0, "\(second.output)\(second.errors)")
            #expect(second.output.contains("\"seed\" : 21") && second.output.contains("\"clean\" : true"))
            // What was done before counts: there is nothing left to do.
            let third = try Command.run("conform", "--steps", "20000", "--resume", file, "--json")
            #expect(third.output == second.output)
            let other = try Command.run("conform", "--resume", file, "--seed", "22")
            #expect(other.status == 2 && other.errors.contains("has seed 21; leave --seed out"))
        }
    }

    @Test func `a machine without the device can't be compared with`() throws {
        let result = try Command.run("conform", "--device", "/nowhere/kvm", "--steps", "100")
        #expect(result.status == 3 && result.output.isEmpty)
        #expect(result.errors.contains("/nowhere/kvm can't be opened: ENOENT"))
    }

    @Test(arguments: [
        ["--steps=0"], ["--seconds=0"], ["--jobs=0"], ["--deadline=0"], ["--seed=-1"], ["--explanations=/nowhere"],
        ["--resume=/nowhere/file"],
    ])
    func `bad input is refused before anything runs`(arguments: [String]) throws {
        let result = try Command.run(["conform"] + arguments)
        #expect(result.status == 2 && result.output.isEmpty && !result.errors.isEmpty)
    }

    @Test func `files that are no campaign and no rules are refused`() throws {
        try withFolder { folder in
            let file = folder + "/file"
            try Data("- name: a\n  more: 1\n".utf8).write(to: URL(fileURLWithPath: file))
            let campaign = try Command.run("conform", "--resume", file)
            #expect(campaign.status == 2 && campaign.errors.contains("holds no campaign"))
            let rules = try Command.run("conform", "--explanations", file)
            #expect(rules.status == 2 && rules.errors.contains("unknown key `more`"))
        }
    }

    private func withFolder(_ body: (String) throws -> Void) throws {
        let folder = FileManager.default.temporaryDirectory.appendingPathComponent(UUID().uuidString)
        try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
        defer { try? FileManager.default.removeItem(at: folder) }
        try body(folder.path)
    }
}
