import Glibc
import Subprocess

/// trace-cmd's binary file, `trace.dat`, read through the program `trace-cmd`: `trace-cmd report -N -t`.
///
/// - `-N`, no plugins: the plugin for KVM prints its own bodies, and leaves the guest frame out of some. Without it
///   bodies are the kernel's, but for the shadow-page events, whose format trace-cmd can't evaluate: there it prints the
///   raw fields, which ``TableEvent`` reads.
/// - `-t`, whole timestamps: nanoseconds.
/// - The five flag characters of ftrace text are not printed. They tell whether an interrupt wrote the event, and no
///   event that is understood is written by one.
///
/// Tried with trace-cmd 3.1.6, of Debian 12. It ends with status 0 and prints nothing when a file is truncated, and may
/// crash when it is damaged; both are errors here. Spec: ecosystem 7.2.
struct TraceData {
    static let magic: [UInt8] = [0x17, 0x08, 0x44] + Array("tracing".utf8)
    /// The versions that trace-cmd of today reads and writes.
    static let versions = ["6", "7"]

    let path: String
    let version: String
    let programs: RecordingPrograms

    /// The version, which stands behind the magic as text that a NUL ends.
    static func version(_ head: [UInt8], path: String) throws(AuditInputError) -> String {
        let rest = head.dropFirst(magic.count)
        guard let end = rest.prefix(16).firstIndex(of: 0), end > rest.startIndex else {
            throw AuditInputError(
                kind: .traceCommandFailed, path: path,
                problem: "it begins like a trace-cmd recording and has no version",
                advice: "the file is damaged or truncated; record or copy it again")
        }
        let version = String(decoding: rest[..<end], as: UTF8.self)
        guard versions.contains(version) else {
            throw AuditInputError(
                kind: .otherVersion, path: path,
                problem: "it is a trace-cmd recording of version \(version); versions 6 and 7 can be read",
                advice: "turn it into text with the trace-cmd that wrote it: trace-cmd report -N -t -i FILE > text")
        }
        return version
    }

    /// Runs `trace-cmd report` on an open file, which it reads from the beginning, and hands over what it prints.
    func convert(
        _ descriptor: Int32, _ body: (UnsafeRawBufferPointer) -> Void
    ) async throws(AuditInputError) -> RecordingOrigin {
        var complaints = try TemporaryFile(for: path, in: programs.folder)
        defer { complaints.close() }
        var printed = false
        let status: TerminationStatus
        do {
            // The file is trace-cmd's standard input, so that it needs no name: it may have been deleted already.
            let result = try await run(
                programs.converter.contains("/") ? .path(.init(programs.converter)) : .name(programs.converter),
                arguments: ["report", "-N", "-t", "-i", "/dev/stdin"],
                input: .fileDescriptor(.init(rawValue: descriptor), closeAfterSpawningProcess: false),
                output: .sequence,
                error: .fileDescriptor(.init(rawValue: complaints.descriptor), closeAfterSpawningProcess: false)
            ) { execution in
                for try await buffer in execution.standardOutput {
                    printed = printed || buffer.count > 0
                    buffer.withUnsafeBytes(body)
                }
            }
            status = result.terminationStatus
        } catch let error as SubprocessError where error.code == .executableNotFound {
            throw missing
        } catch {
            throw failure("could not be run (\(error))", "turn the file into text by hand: trace-cmd report -N -t")
        }
        let lines = complaints.lastLines().map { $0.replacing("/dev/stdin", with: path) }
        try judge(status, printed: printed, lines)
        return RecordingOrigin(traceDataVersion: version, complaints: lines)
    }

    private func judge(_ status: TerminationStatus, printed: Bool, _ complaints: [String]) throws(AuditInputError) {
        let again = "the file is damaged or truncated; record or copy it again"
        let reason = complaints.last.map { " (\($0))" } ?? ""
        switch status {
        case .exited(0):
            // Of a recording without events it prints the number of processors.
            if !printed { throw failure("read nothing from it\(reason)", again) }
        case .exited: throw failure("could not read it\(reason)", again)
        case .signaled(let signal): throw failure("crashed on it (signal \(signal))\(reason)", again)
        }
    }

    private var missing: AuditInputError {
        AuditInputError(
            kind: .traceCommandMissing, path: path,
            problem: "it is a trace-cmd recording (version \(version)), and the program trace-cmd is not installed",
            advice: "install trace-cmd, or turn the file into text elsewhere: trace-cmd report -N -t -i FILE > text")
    }

    private func failure(_ what: String, _ advice: String) -> AuditInputError {
        AuditInputError(
            kind: .traceCommandFailed, path: path,
            problem: "it is a trace-cmd recording (version \(version)), and trace-cmd report \(what)", advice: advice)
    }
}
