/// Why a recording could not be read: the file, what is wrong with it, and what would be right.
public struct AuditInputError: Error, Sendable, Equatable, CustomStringConvertible {
    public enum Kind: String, Sendable {
        case notFound, isDirectory, unreadable, binaryRecording, otherCompression, xzMissing, xzFailed
        /// A trace-cmd file of a version that is not read; the program that reads it is missing, or could not.
        case otherVersion, traceCommandMissing, traceCommandFailed
        /// A packed trace-cmd file has to be unpacked on disk first, and there was no room.
        case noRoom
    }
    public var kind: Kind
    public var path: String
    /// What is wrong.
    public var problem: String
    /// What to do instead.
    public var advice: String

    public var description: String { "\(path): \(problem); \(advice)" }
}
