import Subprocess

/// Runs `xz -dc` and hands over what it prints.
func unpack(
    path: String, with unpacker: String, _ body: (UnsafeRawBufferPointer) -> Void
) async throws(AuditInputError) {
    do {
        let result = try await run(
            .name(unpacker), arguments: ["-dc", "--", path], input: .none, output: .sequence,
            error: .string(limit: 4096)
        ) { execution in
            for try await buffer in execution.standardOutput { buffer.withUnsafeBytes(body) }
        }
        guard result.terminationStatus.isSuccess else {
            throw AuditInputError(
                kind: .xzFailed, path: path,
                problem: "xz could not unpack it (\(message(result.standardError, of: path)))",
                advice: "the file is damaged or truncated; record or copy it again")
        }
    } catch let error as AuditInputError {
        throw error
    } catch let error as SubprocessError where error.code == .executableNotFound {
        throw AuditInputError(
            kind: .xzMissing, path: path, problem: "it is packed with xz, and the program xz is not installed",
            advice: "install xz, or unpack the file elsewhere and give that")
    } catch {
        throw AuditInputError(
            kind: .xzFailed, path: path, problem: "xz could not be run (\(error))", advice: "unpack the file by hand")
    }
}

/// The last line that xz wrote, without its own prefix.
private func message(_ text: String?, of path: String) -> String {
    let line = (text ?? "").split(separator: "\n").last.map(String.init) ?? "no message"
    for prefix in ["xz: \(path): ", "xz: "] where line.hasPrefix(prefix) { return String(line.dropFirst(prefix.count)) }
    return line
}

/// Unpacked bytes on their way: once enough of them are there to tell what they are, text goes on to whoever wants it,
/// and a trace-cmd file to disk. What can't be used is dropped, and the reason kept for the end.
struct UnpackedIntake {
    private enum State {
        case undecided
        case text
        case traceData(version: String, TemporaryFile)
        case refused(AuditInputError)
    }

    private let path: String
    /// Where a trace-cmd file is put.
    private let folder: String
    private var head: [UInt8] = []
    private var state = State.undecided

    init(path: String, folder: String) {
        self.path = path
        self.folder = folder
    }

    mutating func take(_ bytes: UnsafeRawBufferPointer, _ body: (UnsafeRawBufferPointer) -> Void) {
        switch state {
        case .undecided:
            head.append(contentsOf: bytes)
            if head.count >= RecordingForm.headLength { decide(body) }
        case .text: body(bytes)
        case .traceData(_, let copy): append(bytes, to: copy)
        case .refused: break
        }
    }

    private mutating func decide(_ body: (UnsafeRawBufferPointer) -> Void) {
        do throws(AuditInputError) {
            switch try RecordingForm(head, path: path) {
            case .text:
                state = .text
                head.withUnsafeBytes(body)
            case .traceData(let version):
                let copy = try TemporaryFile(for: path, in: folder)
                state = .traceData(version: version, copy)
                head.withUnsafeBytes { append($0, to: copy) }
            }
        } catch {
            state = .refused(error)
        }
        head = []
    }

    private mutating func append(_ bytes: UnsafeRawBufferPointer, to copy: TemporaryFile) {
        do throws(AuditInputError) {
            try copy.append(bytes)
        } catch {
            close()
            state = .refused(error)
        }
    }

    /// Everything has come. Gives the trace-cmd file, if it is one: its version and the descriptor of the copy, which
    /// is open until ``close()``.
    mutating func finish(
        _ body: (UnsafeRawBufferPointer) -> Void
    ) throws(AuditInputError) -> (version: String, descriptor: Int32)? {
        if case .undecided = state { decide(body) }
        switch state {
        case .undecided, .text: return nil
        case .traceData(let version, let copy): return (version, copy.descriptor)
        case .refused(let error): throw error
        }
    }

    mutating func close() {
        if case .traceData(_, var copy) = state {
            copy.close()
            state = .text
        }
    }
}
