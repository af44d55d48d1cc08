// A suite for each patch of the series whose behaviour is generic, named after it. What the patch changed is checked twice:
// as it is, and with the patch taken back, when the same body must fail. Patches that changed nothing to be seen are
// checked once; those that took something away, by programs that must not compile (`TypeRuleTests`).

import CSchedule
import Synchrony
import Testing

/// Runs `body`, and then once more as it was before patch `number`: that must fail, or the test does.
func checkPatch(_ number: UInt32, _ body: () throws -> Void) throws {
    let patch = try #require(SeriesPatch(rawValue: number), "patch \(number) can't be taken back")
    try body()
    withKnownIssue("as it was before patch \(number)") { try withUndone(patch, body) }
}

/// Runs `body` with one patch taken back.
private func withUndone(_ patch: SeriesPatch, _ body: () throws -> Void) throws {
    var task = fl_task()
    task.point = { _, _, _ in }
    task.note = { _, _, _ in }
    if patch.rawValue < 64 {
        task.undone.0 = 1 << UInt64(patch.rawValue)
    } else {
        task.undone.1 = 1 << UInt64(patch.rawValue - 64)
    }
    try withUnsafeMutablePointer(to: &task) { pointer in
        let outer = fl_current()
        fl_attach(pointer)
        defer { fl_attach(outer) }
        try body()
    }
}

/// Counts the points of one kind that an operation passes at one object.
final class PointCounter {
    private struct Task {
        /// First, so that the pointer to it is the pointer to the whole.
        var base: fl_task
        var owner: Unmanaged<PointCounter>
    }

    private let kind: SchedulingPoint
    private let object: UInt64
    private(set) var count = 0

    init(_ kind: SchedulingPoint, _ object: UInt64) {
        self.kind = kind
        self.object = object
    }

    func run<R>(_ body: () throws -> R) rethrows -> R {
        let outer = fl_current()
        var base = fl_task()
        base.undone = outer?.pointee.undone ?? (0, 0)
        base.point = { task, operation, object in
            guard let task else { return }
            let whole = UnsafeMutableRawPointer(task).assumingMemoryBound(to: Task.self)
            whole.pointee.owner.takeUnretainedValue().pass(operation, object)
        }
        base.note = { _, _, _ in }
        var task = Task(base: base, owner: Unmanaged.passUnretained(self))
        return try withUnsafeMutablePointer(to: &task) { pointer in
            fl_attach(UnsafeMutableRawPointer(pointer).assumingMemoryBound(to: fl_task.self))
            defer { fl_attach(outer) }
            return try body()
        }
    }

    private func pass(_ operation: UInt32, _ object: UInt64) {
        if operation == kind.rawValue, object == self.object { count += 1 }
    }
}
