import Glibc

/// An open file, read in large parts.
struct RecordingFile {
    private let path: String
    private(set) var descriptor: Int32

    init(path: String) throws(AuditInputError) {
        self.path = path
        descriptor = open(path, O_RDONLY | O_CLOEXEC)
        guard descriptor >= 0 else {
            if errno == ENOENT {
                throw AuditInputError(
                    kind: .notFound, path: path, problem: "there is no such file",
                    advice: "give the path of a recording")
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

    static func isPipe(_ path: String) -> Bool {
        var status = stat()
        return stat(path, &status) == 0 && status.st_mode & S_IFMT == S_IFIFO
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
        let buffer = UnsafeMutableRawBufferPointer.allocate(byteCount: RecordingForm.headLength, alignment: 16)
        defer { buffer.deallocate() }
        var filled = 0
        while filled < RecordingForm.headLength {
            let count = try read(into: UnsafeMutableRawBufferPointer(rebasing: buffer[filled...]))
            if count == 0 { break }
            filled += count
        }
        return Array(buffer[..<filled])
    }

    /// Whether another program can move about in it: a regular file.
    var isSeekable: Bool { lseek(descriptor, 0, SEEK_CUR) >= 0 }

    func forEachPart(
        _ body: (UnsafeRawBufferPointer) throws(AuditInputError) -> Void
    ) throws(AuditInputError) {
        let buffer = UnsafeMutableRawBufferPointer.allocate(byteCount: 1 << 20, alignment: 4096)
        defer { buffer.deallocate() }
        while true {
            let count = try read(into: buffer)
            if count == 0 { return }
            try body(UnsafeRawBufferPointer(rebasing: buffer[..<count]))
        }
    }
}
