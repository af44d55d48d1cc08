import Foundation
import Testing

/// `faultline conform host`: the model's host beside this machine's kernel.
@Suite struct ConformHostCommand {
    @Test func `a few calls end without a difference, or say why this machine can't be compared with`() throws {
        let result = try Command.run("conform", "host", "--steps", "600", "--seed", "3", "--histogram")
        if result.status == 3 {
            #expect(result.errors.hasPrefix("error: ") && result.output.isEmpty)
            return
        }
        #expect(result.status == 0, "\(result.output)")
        #expect(result.output.contains("ok: 600 calls in 10 sequences, seed 3, Linux "))
        #expect(result.output.contains("madvise MADV_COLD") && result.output.contains("fork: 0"))
        #expect(!result.output.contains("\u{1b}"))
    }

    @Test(arguments: ["--steps=0", "--steps=many", "--seed=-1", "here"])
    func `bad input is refused before anything runs`(argument: String) throws {
        let result = try Command.run("conform", "host", argument)
        #expect(result.status == 2 && result.output.isEmpty && !result.errors.isEmpty)
    }
}
