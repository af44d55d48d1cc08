/// Why a benchmark gives no times.
public enum BenchmarkError: Error, Sendable {
    /// The machine has no room for this.
    case noMemory(String)
    /// An operation did not do what it should; its time would mean nothing.
    case wrongResult(String)

    static func left(_ operation: Operation, _ found: Int, insteadOf expected: Int) -> BenchmarkError {
        .wrongResult("\(operation.rawValue) left \(found) where \(expected) was right")
    }
}
