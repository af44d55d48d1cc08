import ArgumentParser
import Explanations
import Foundation
import Replay
import Report

struct ReplayRecording: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "replay",
        abstract: "Would the model have done what the recorded kernel did?",
        discussion: """
            Takes what a recording's PROBE marks say was done (slots, guest accesses, host actions), does the same on the \
            model's shadow MMU, and compares what the two tell. Documentation/Faultline.docc/Replay.md says how.
            """)

    @Argument(help: "A recording in any form that audit reads.")
    var recording: String
    @Option(help: "A file of rules that explain differences.")
    var explanations: String?
    @Option(help: "Differences shown for each step.")
    var show = 5
    @Flag(help: "Print the report as JSON.")
    var json = false

    func validate() throws {
        guard show >= 0 else { throw ValidationError("--show must be 0 or more") }
    }

    func run() async throws {
        let rules = try readExplanations(explanations)
        var report: ReplayReport
        do throws(ReplayFailure) {
            report = try await replayRecording(path: recording)
        } catch {
            switch error {
            case .input(let error): throw Failure(.unusable, "error: \(error)")
            case .model(let error): throw Failure(.unusable, "error: \(error)")
            }
        }
        report.explain(rules)
        output(json ? ReplayText.json(report) : ReplayText.render(report, show: show))
        if !report.isFaithful { throw Failure(.findings) }
    }
}

/// The rules of a file that explains differences between a recording and the model; none without a file.
func readExplanations(_ path: String?) throws -> [Explanation] {
    guard let path else { return [] }
    let text: String
    do { text = try String(contentsOfFile: path, encoding: .utf8) } catch {
        throw Failure(.unusable, "error: \(path): it can't be read as text; name a file of explanations")
    }
    do throws(ExplanationError) { return try ExplanationFile(text: text, file: path).rules } catch {
        throw Failure(.unusable, "error: \(error)")
    }
}
