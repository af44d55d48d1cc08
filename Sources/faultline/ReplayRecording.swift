import ArgumentParser
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
    @Option(help: "Differences shown for each step.")
    var show = 5

    func run() async throws {
        let report: ReplayReport
        do throws(ReplayFailure) {
            report = try await replayRecording(path: recording)
        } catch {
            switch error {
            case .input(let error): throw Failure(.unusable, "error: \(error)")
            case .model(let error): throw Failure(.unusable, "error: \(error)")
            }
        }
        output(ReplayText.render(report, show: show))
        if report.differences > 0 || !report.findings.isEmpty { throw Failure(.findings) }
    }
}
