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

    @Test(.enabled(if: hasKVM && getuid() == 0, "recording needs root and /dev/kvm"))
    func `a scenario is traced, its recording is kept, and can be audited`() throws {
        try withFolder { folder in
            let file = folder + "/recording"
            let traced = try Command.run("conform", "--trace", "Scenarios/zero-page.yaml", "--keep", file)
            // A kernel that translates in two stages says so.
            guard traced.status != 3 else { return }
            #expect(traced.status == 0, "\(traced.output)\(traced.errors)")
            #expect(traced.output.hasPrefix("zero-page  recorded on Linux ") && !traced.output.contains("\u{1b}"))
            #expect(traced.output.hasSuffix(" comparisons, 0 differ\n"))
            let audited = try Command.run("audit", file)
            #expect(audited.status == 0, "\(audited.output)\(audited.errors)")
            let refused = try Command.run("conform", "--trace", "Scenarios/swap.yaml")
            #expect(refused.status == 3 && refused.output.contains("swap can't be traced: a swap device"))
            let unwritable = try Command.run(
                "conform", "--trace", "Scenarios/zero-page.yaml", "--keep", "/nowhere/file")
            #expect(unwritable.status == 2 && unwritable.errors.contains("/nowhere/file can't be written"))
        }
    }

    @Test(.enabled(if: hasKVM, "/dev/kvm can't be opened"))
    func `a campaign of another kernel is not gone on with`() throws {
        try withFolder { folder in
            let file = folder + "/campaign.json"
            let first = try Command.run("conform", "--steps", "500", "--resume", file)
            #expect(first.status == 0, "\(first.output)\(first.errors)")
            var text = try String(contentsOfFile: file, encoding: .utf8)
            let kernel = try #require(text.split(separator: "\n").first { $0.contains("\"kernel\"") })
            text = text.replacing(kernel, with: "  \"kernel\" : \"5.4.0\",")
            try Data(text.utf8).write(to: URL(fileURLWithPath: file))
            let other = try Command.run("conform", "--steps", "1000", "--resume", file)
            #expect(other.status == 3 && other.errors.contains("the campaign was begun on Linux 5.4.0, and this is "))
        }
    }

    @Test(arguments: [
        ["--steps=0"], ["--seconds=0"], ["--jobs=0"], ["--deadline=0"], ["--seed=-1"], ["--explanations=/nowhere"],
        ["--resume=/nowhere/file"], ["--keep=/tmp/f"], ["--trace", "--json"], ["--trace", "--claims"],
        ["--trace", "--jobs=2"], ["--trace", "--keep=/tmp/f"], ["--trace", "/nowhere.yaml"],
        ["--trace", "/nowhere.ioctl"], ["--json", "Scenarios/swap.yaml"],
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
