import Glibc
import Subprocess

/// Why a recording could not be audited: the file, what is wrong with it, and what would be right.
public struct AuditInputError: Error, Sendable, Equatable, CustomStringConvertible {
    public enum Kind: String, Sendable {
        case notFound, isDirectory, unreadable, binaryRecording, otherCompression, xzMissing, xzFailed
    }
    public var kind: Kind
    public var path: String
    /// What is wrong.
    public var problem: String
    /// What to do instead.
    public var advice: String

    public var description: String { "\(path): \(problem); \(advice)" }
}

/// Audits the recording at `path`: ftrace text, plain or `.xz` (through the `xz` program).
///
/// The file is streamed; memory does not grow with its size. `progress` is called with the bytes of text read so far,
/// about once for every 16 MiB.
public func auditRecording(
    path: String, progress: (UInt64) -> Void = { _ in }
) async throws(AuditInputError) -> AuditReport {
    try await auditRecording(path: path, unpacker: "xz", progress: progress)
}

/// The same with the name of the program that unpacks, for a test of what happens where it is missing.
func auditRecording(
    path: String, unpacker: String, progress: (UInt64) -> Void = { _ in }
) async throws(AuditInputError) -> AuditReport {
    let auditor = TraceAuditor()
    var file = try RecordingFile(path: path)
    var meter = ProgressMeter()
    do throws(AuditInputError) {
        let head = try file.head()
        if RecordingFile.isXZ(head) {
            file.close()
            try await unpack(path: path, with: unpacker, into: auditor, meter: &meter, progress: progress)
        } else {
            if let refusal = RecordingFile.refusal(head, path: path) { throw refusal }
            auditor.feed(head)
            meter.add(head.count, progress)
            try file.forEachPart { part in
                auditor.feed(part)
                meter.add(part.count, progress)
            }
        }
    } catch {
        file.close()
        throw error
    }
    file.close()
    return auditor.finish(file: path)
}

private struct ProgressMeter {
    private var total: UInt64 = 0
    private var next: UInt64 = 1 << 24

    mutating func add(_ count: Int, _ progress: (UInt64) -> Void) {
        total += UInt64(count)
        if total >= next {
            progress(total)
            next = total + 1 << 24
        }
    }
}

/// Bytes that are looked at before a file is taken for a recording.
private let headLength = 4096

/// Runs `xz -dc` and feeds its output. The first bytes of the text decide whether it is a recording at all.
private func unpack(
    path: String, with unpacker: String, into auditor: TraceAuditor, meter: inout ProgressMeter,
    progress: (UInt64) -> Void
) async throws(AuditInputError) {
    var head: [UInt8] = []
    var accepted = false
    var refusal: AuditInputError?
    do {
        let result = try await run(
            .name(unpacker), arguments: ["-dc", "--", path], input: .none, output: .sequence,
            error: .string(limit: 4096)
        ) { execution in
            for try await buffer in execution.standardOutput {
                if refusal != nil { continue }
                if accepted {
                    buffer.withUnsafeBytes { auditor.feed($0) }
                } else {
                    buffer.withUnsafeBytes { head.append(contentsOf: $0) }
                    guard head.count >= headLength else { continue }
                    refusal = RecordingFile.refusal(head, path: path)
                    if refusal != nil { continue }
                    accepted = true
                    auditor.feed(head)
                }
                meter.add(buffer.count, progress)
            }
        }
        if let refusal { throw refusal }
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
            advice: "install xz, or unpack the file elsewhere and audit the text")
    } catch {
        throw AuditInputError(
            kind: .xzFailed, path: path, problem: "xz could not be run (\(error))", advice: "unpack the file by hand")
    }
    if !accepted {
        if let refusal = RecordingFile.refusal(head, path: path) { throw refusal }
        auditor.feed(head)
    }
}

/// The last line that xz wrote, without its own prefix.
private func message(_ text: String?, of path: String) -> String {
    let line = (text ?? "").split(separator: "\n").last.map(String.init) ?? "no message"
    for prefix in ["xz: \(path): ", "xz: "] where line.hasPrefix(prefix) { return String(line.dropFirst(prefix.count)) }
    return line
}

/// An open file, read in large parts.
private struct RecordingFile {
    private let path: String
    private var descriptor: Int32

    init(path: String) throws(AuditInputError) {
        self.path = path
        descriptor = open(path, O_RDONLY | O_CLOEXEC)
        guard descriptor >= 0 else {
            if errno == ENOENT {
                throw AuditInputError(
                    kind: .notFound, path: path, problem: "there is no such file",
                    advice: "give the path of an ftrace text recording")
            }
            throw Self.unreadable(path)
        }
        var status = stat()
        guard fstat(descriptor, &status) == 0 else {
            let error = Self.unreadable(path)
            close()
            throw error
        }
        if status.st_mode & S_IFMT == S_IFDIR {
            close()
            throw AuditInputError(
                kind: .isDirectory, path: path, problem: "it is a directory",
                advice: "give the path of one recording in it")
        }
    }

    private static func unreadable(_ path: String) -> AuditInputError {
        AuditInputError(
            kind: .unreadable, path: path, problem: "it cannot be read (\(String(cString: strerror(errno))))",
            advice: "check its permissions")
    }

    mutating func close() {
        if descriptor >= 0 { _ = Glibc.close(descriptor) }
        descriptor = -1
    }

    private func read(into buffer: UnsafeMutableRawBufferPointer) throws(AuditInputError) -> Int {
        while true {
            let count = Glibc.read(descriptor, buffer.baseAddress, buffer.count)
            if count >= 0 { return count }
            if errno != EINTR { throw Self.unreadable(path) }
        }
    }

    /// The first bytes, fewer only if the file is shorter.
    func head() throws(AuditInputError) -> [UInt8] {
        let buffer = UnsafeMutableRawBufferPointer.allocate(byteCount: headLength, alignment: 16)
        defer { buffer.deallocate() }
        var filled = 0
        while filled < headLength {
            let count = try read(into: UnsafeMutableRawBufferPointer(rebasing: buffer[filled...]))
            if count == 0 { break }
            filled += count
        }
        return Array(buffer[..<filled])
    }

    func forEachPart(_ body: (UnsafeRawBufferPointer) -> Void) throws(AuditInputError) {
        let buffer = UnsafeMutableRawBufferPointer.allocate(byteCount: 1 << 20, alignment: 4096)
        defer { buffer.deallocate() }
        while true {
            let count = try read(into: buffer)
            if count == 0 { return }
            body(UnsafeRawBufferPointer(rebasing: buffer[..<count]))
        }
    }

    static func isXZ(_ head: [UInt8]) -> Bool { head.starts(with: [0xfd, 0x37, 0x7a, 0x58, 0x5a, 0x00]) }

    /// Refuses what is certainly no text: other programs' binary recordings, other packers, and files of NUL bytes.
    static func refusal(_ head: [UInt8], path: String) -> AuditInputError? {
        func binary(_ what: String, _ advice: String) -> AuditInputError {
            AuditInputError(kind: .binaryRecording, path: path, problem: what, advice: advice)
        }
        if head.starts(with: [0x17, 0x08, 0x44] + Array("tracing".utf8)) {
            return binary(
                "it is a binary trace-cmd recording, not text", "turn it into text first: trace-cmd report FILE > text")
        }
        if head.starts(with: Array("PERFILE".utf8)) {
            return binary(
                "it is a binary perf recording, not text", "turn it into text first: perf script -i FILE > text")
        }
        let packers: [([UInt8], String)] = [
            ([0x1f, 0x8b], "gzip"), ([0x28, 0xb5, 0x2f, 0xfd], "zstd"), (Array("BZh".utf8), "bzip2"),
        ]
        for (magic, name) in packers where head.starts(with: magic) {
            return AuditInputError(
                kind: .otherCompression, path: path, problem: "it is packed with \(name)",
                advice: "unpack it, or pack it with xz")
        }
        if head.count(where: { $0 == 0 }) > head.count / 8 {
            return binary("it is binary, not text", "give ftrace text, as tracefs shows it in the file trace")
        }
        return nil
    }
}
