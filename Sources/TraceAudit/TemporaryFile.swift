import Glibc

/// A file without a name, below `TMPDIR` or `/tmp`: it is gone when it is closed, whatever becomes of the process.
struct TemporaryFile {
    private let path: String
    private(set) var descriptor: Int32

    /// The folder where such files are made.
    static var folder: String {
        guard let folder = getenv("TMPDIR"), folder.pointee != 0 else { return "/tmp" }
        return String(cString: folder)
    }

    /// Errors name the recording at `path`.
    init(for path: String, in folder: String) throws(AuditInputError) {
        self.path = path
        var name = Array("\(folder)/faultline-XXXXXX".utf8CString)
        descriptor = mkstemp(&name)
        guard descriptor >= 0 else { throw Self.noRoom(path, "no file can be made in \(folder)") }
        unlink(name)
        _ = fcntl(descriptor, F_SETFD, FD_CLOEXEC)
    }

    func append(_ bytes: UnsafeRawBufferPointer) throws(AuditInputError) {
        guard writes(bytes) else { throw Self.noRoom(path, "it can't be unpacked there") }
    }

    func append(_ bytes: [UInt8]) throws(AuditInputError) {
        guard bytes.withUnsafeBytes(writes) else { throw Self.noRoom(path, "it can't be unpacked there") }
    }

    private func writes(_ bytes: UnsafeRawBufferPointer) -> Bool {
        var rest = bytes
        while !rest.isEmpty {
            let count = write(descriptor, rest.baseAddress, rest.count)
            if count >= 0 {
                rest = UnsafeRawBufferPointer(rebasing: rest[count...])
            } else if errno != EINTR {
                return false
            }
        }
        return true
    }

    /// The last lines of what was written: at most 8, of the last 4 KiB.
    func lastLines() -> [String] {
        let size = lseek(descriptor, 0, SEEK_END)
        guard size > 0 else { return [] }
        var bytes = [UInt8](repeating: 0, count: 4096)
        let count = pread(descriptor, &bytes, bytes.count, max(0, size - off_t(bytes.count)))
        let text = String(decoding: bytes[..<max(0, count)], as: UTF8.self)
        let lines = text.split(whereSeparator: \.isNewline).map { line in
            String(line.drop { $0 == " " || $0 == "\t" })
        }
        return lines.filter { !$0.isEmpty }.suffix(8)
    }

    mutating func close() {
        if descriptor >= 0 { _ = Glibc.close(descriptor) }
        descriptor = -1
    }

    private static func noRoom(_ path: String, _ what: String) -> AuditInputError {
        AuditInputError(
            kind: .noRoom, path: path,
            problem: "it has to be copied for trace-cmd, and \(what) (\(String(cString: strerror(errno))))",
            advice: "set TMPDIR to a folder with room, or unpack the file by hand")
    }
}
