/// A recording of a real kernel, wherever it comes from, as text: the one way in for everything that reads recordings.
///
/// | file | how it becomes text |
/// |---|---|
/// | ftrace text, `trace-cmd report` text, `perf script` text | as it is |
/// | any of them packed with xz | by the program `xz` |
/// | trace-cmd's `trace.dat`, versions 6 and 7 | by the program `trace-cmd` (``TraceData``) |
/// | the same packed with xz | first unpacked on disk, since trace-cmd has to move about in it |
///
/// What a file is its first bytes tell, never its name. The text is streamed; memory does not grow with its size. Which
/// of the texts it is each line tells for itself, see ``RecordingLine``.
public struct RecordingSource: Sendable {
    /// As it was given.
    public let path: String
    private let programs: RecordingPrograms

    public init(path: String) { self.init(path: path, programs: RecordingPrograms()) }

    /// With other names for the programs, for tests of what happens where they are missing or fail.
    init(path: String, programs: RecordingPrograms) {
        self.path = path
        self.programs = programs
    }

    /// Whether the file can be opened and its first bytes are those of a recording. What is packed is not looked into,
    /// and a pipe is left alone: its bytes come only once.
    public func check() throws(AuditInputError) {
        guard !RecordingFile.isPipe(path) else { return }
        var file = try RecordingFile(path: path)
        defer { file.close() }
        let head = try file.head()
        if !RecordingForm.isXZ(head) { _ = try RecordingForm(head, path: path) }
    }

    /// Hands over the text in portions that may end anywhere, and tells where it came from.
    ///
    /// What has been handed over before an error is what could be read of a damaged file.
    public func forEachPart(
        _ body: (UnsafeRawBufferPointer) -> Void
    ) async throws(AuditInputError) -> RecordingOrigin {
        var file = try RecordingFile(path: path)
        do throws(AuditInputError) {
            let origin = try await read(&file, body)
            file.close()
            return origin
        } catch {
            file.close()
            throw error
        }
    }

    /// Hands over the text line by line. See ``LineSplitter`` for how long a line and its bytes live.
    public func forEachLine(_ body: (LineSplitter.Line) -> Void) async throws(AuditInputError) -> RecordingOrigin {
        var splitter = LineSplitter()
        let origin = try await forEachPart { splitter.feed($0, body) }
        splitter.finish(body)
        return origin
    }

    private func read(
        _ file: inout RecordingFile, _ body: (UnsafeRawBufferPointer) -> Void
    ) async throws(AuditInputError) -> RecordingOrigin {
        let head = try file.head()
        if RecordingForm.isXZ(head) {
            file.close()
            return try await readPacked(body)
        }
        switch try RecordingForm(head, path: path) {
        case .text:
            head.withUnsafeBytes(body)
            try file.forEachPart { part throws(AuditInputError) in body(part) }
            return RecordingOrigin()
        case .traceData(let version):
            let data = TraceData(path: path, version: version, programs: programs)
            if file.isSeekable { return try await data.convert(file.descriptor, body) }
            var copy = try TemporaryFile(for: path, in: programs.folder)
            defer { copy.close() }
            try copy.append(head)
            try file.forEachPart { part throws(AuditInputError) in try copy.append(part) }
            return try await data.convert(copy.descriptor, body)
        }
    }

    private func readPacked(
        _ body: (UnsafeRawBufferPointer) -> Void
    ) async throws(AuditInputError) -> RecordingOrigin {
        var intake = UnpackedIntake(path: path, folder: programs.folder)
        defer { intake.close() }
        try await unpack(path: path, with: programs.unpacker) { intake.take($0, body) }
        var origin = RecordingOrigin()
        if let (version, descriptor) = try intake.finish(body) {
            let data = TraceData(path: path, version: version, programs: programs)
            origin = try await data.convert(descriptor, body)
        }
        origin.isPacked = true
        return origin
    }
}

/// What a recording's text was made from.
public struct RecordingOrigin: Sendable, Equatable {
    public var isPacked = false
    /// The version of the trace-cmd file that was converted.
    public var traceDataVersion: String?
    /// What trace-cmd complained of though it went on.
    public var complaints: [String] = []
}

/// The programs that turn files into text, found in `PATH` if they are names, and where files may be put for them.
struct RecordingPrograms: Sendable {
    var unpacker = "xz"
    var converter = "trace-cmd"
    var folder = TemporaryFile.folder
}

/// What the first bytes of a file, unpacked, say that it is.
enum RecordingForm: Equatable {
    case text
    case traceData(version: String)

    /// Bytes that are looked at before a file is taken for a recording.
    static let headLength = 4096

    static func isXZ(_ head: [UInt8]) -> Bool { head.starts(with: [0xfd, 0x37, 0x7a, 0x58, 0x5a, 0x00]) }

    /// Refuses what is certainly no recording: perf's binary files, other packers, and files of NUL bytes.
    init(_ head: [UInt8], path: String) throws(AuditInputError) {
        if head.starts(with: TraceData.magic) {
            self = .traceData(version: try TraceData.version(head, path: path))
            return
        }
        if let refusal = Self.refusal(head, path: path) { throw refusal }
        self = .text
    }

    private static func refusal(_ head: [UInt8], path: String) -> AuditInputError? {
        if head.starts(with: Array("PERFILE".utf8)) {
            return AuditInputError(
                kind: .binaryRecording, path: path, problem: "it is a binary perf recording, not text",
                advice: "turn it into text first: perf script -F comm,pid,tid,cpu,time,event,trace -i FILE > text")
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
            return AuditInputError(
                kind: .binaryRecording, path: path, problem: "it is binary, not text",
                advice: "give ftrace text, as tracefs shows it in the file trace, or a trace.dat of trace-cmd")
        }
        return nil
    }
}
