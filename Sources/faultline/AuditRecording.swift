import ArgumentParser
import Report
import TraceAudit

struct Audit: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "Check a recording of a real KVM against the invariants.",
        discussion: """
            Reads ftrace text, what `trace-cmd report` or `perf script` prints, and trace-cmd's trace.dat (through the \
            program trace-cmd); any of them packed with xz.
            """)

    @Argument(help: "ftrace text, perf script text, or a trace.dat; .xz is unpacked.")
    var recording: String
    @Flag(help: "Print the report as JSON.")
    var json = false
    @Flag(name: .shortAndLong, help: "Show every finding and every event that was counted.")
    var verbose = false
    @Option(help: "Write the recording to FILE as a Perfetto trace, for ui.perfetto.dev.")
    var perfetto: String?

    func run() async throws {
        let report = try await audit()
        let terminal = Terminal.standardOutput
        output(
            json
                ? report.jsonString() : report.render(width: terminal.width, color: terminal.color, verbose: verbose))
        if !report.findings.isEmpty { throw Failure(.findings) }
    }

    private func audit() async throws -> AuditReport {
        let source = RecordingSource(path: recording)
        do {
            guard let perfetto else { return try await auditRecording(path: recording) }
            // A recording that can't be read leaves the file as it is.
            try source.check()
            let file = try OutputFile(path: perfetto, notOver: recording)
            let report = try await RecordingTimeline.audit(source, to: file.write)
            try file.close()
            return report
        } catch let error as AuditInputError {
            throw Failure(.unusable, error.description)
        }
    }
}
