// A suite for each patch of the series whose behaviour is generic, named after it. What the patch changed is checked twice:
// as it is, and with the patch taken back, when the same body must fail. Patches that changed nothing to be seen are
// checked once; those that took something away, by programs that must not compile (`TypeRuleTests`).

import Synchrony
import Testing

/// Runs `body`, and then once more as it was before patch `number`: that must fail, or the test does.
func checkPatch(_ number: UInt32, _ body: () throws -> Void) throws {
    let patch = try #require(SeriesPatch(rawValue: number), "patch \(number) can't be taken back")
    try body()
    withKnownIssue("as it was before patch \(number)") { _ = try TestTask(undone: patch).run(body) }
}

/// Counts the points of one kind that an operation passes at one object.
final class PointCounter {
    private let kind: SchedulingPoint
    private let object: UInt64
    private(set) var count = 0

    init(_ kind: SchedulingPoint, _ object: UInt64) {
        self.kind = kind
        self.object = object
    }

    func run<R>(_ body: () throws -> R) rethrows -> R {
        let task = TestTask { [self] operation, object in
            if operation == kind.rawValue, object == self.object { count += 1 }
        }
        return try task.run(body).result
    }
}
