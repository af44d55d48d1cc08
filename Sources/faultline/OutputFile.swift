import Foundation

/// A file that a command writes piece by piece, opened before the work begins: a path that can't be written ends the
/// command with status 2 before anything has been run. So does one that is the command's own input.
final class OutputFile {
    private let path: String
    private var descriptor: Int32
    /// Why a write failed; what comes after it is not written.
    private var failure: String?

    init(path: String, notOver input: String) throws(Failure) {
        self.path = path
        if Self.isSame(path, input) { throw Self.unwritable(path, "it is what is read") }
        descriptor = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0o666)
        guard descriptor >= 0 else { throw Self.unwritable(path, String(cString: strerror(errno))) }
    }

    deinit { if descriptor >= 0 { _ = Foundation.close(descriptor) } }

    func write(_ bytes: [UInt8]) {
        guard failure == nil else { return }
        var rest = bytes[...]
        while !rest.isEmpty {
            let count = rest.withUnsafeBytes { Foundation.write(descriptor, $0.baseAddress, $0.count) }
            if count >= 0 {
                rest = rest.dropFirst(count)
            } else if errno != EINTR {
                failure = String(cString: strerror(errno))
                return
            }
        }
    }

    /// Everything has been written: says so, or why not.
    func close() throws(Failure) {
        let status = Foundation.close(descriptor)
        descriptor = -1
        if status != 0, failure == nil { failure = String(cString: strerror(errno)) }
        if let failure { throw Self.unwritable(path, failure) }
    }

    private static func isSame(_ one: String, _ other: String) -> Bool {
        var (left, right) = (stat(), stat())
        guard stat(one, &left) == 0, stat(other, &right) == 0 else { return false }
        return left.st_dev == right.st_dev && left.st_ino == right.st_ino
    }

    private static func unwritable(_ path: String, _ reason: String) -> Failure {
        Failure(.unusable, "error: \(path) can't be written: \(reason)")
    }
}
