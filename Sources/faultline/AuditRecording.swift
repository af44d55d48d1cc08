import ArgumentParser
import Report
import TraceAudit

struct Audit: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "Check a recording of a real KVM (ftrace text, also .xz) against the invariants.")

    @Argument(help: "ftrace text: the `trace` file of tracefs, or what `trace-cmd report` prints; .xz is unpacked.")
    var recording: String
    @Flag(help: "Print the report as JSON.")
    var json = false
    @Flag(name: .shortAndLong, help: "Show every finding and every event that was counted.")
    var verbose = false

    func run() async throws {
        let report: AuditReport
        do throws(AuditInputError) {
            report = try await auditRecording(path: recording)
        } catch {
            throw Failure(.unusable, error.description)
        }
        let terminal = Terminal.standardOutput
        output(
            json
                ? report.jsonString() : report.render(width: terminal.width, color: terminal.color, verbose: verbose))
        if !report.findings.isEmpty { throw Failure(.findings) }
    }
}
