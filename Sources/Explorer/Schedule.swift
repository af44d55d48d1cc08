/// Who goes on at each scheduling point of a run, from the first; after its end the default order holds: the running
/// task goes on while it can, then the first that can.
///
/// Its text is a list of stretches, `A12.B3.A1`: task A for twelve points, B for three, A for one. `-` is empty.
public struct Schedule: Sendable, Equatable, CustomStringConvertible {
    /// The task chosen at each point.
    public var choices: [UInt8]

    public init(_ choices: [UInt8] = []) { self.choices = choices }

    /// The longest schedule that is read, in points.
    public static let longest = 1_000_000

    /// Reads a schedule's text; nil and the character's position where it is none.
    public init(parsing text: String) throws(ScheduleError) {
        choices = []
        if text == "-" { return }
        var position = 0
        for stretch in text.split(separator: ".", omittingEmptySubsequences: false) {
            guard let first = stretch.utf8.first, first >= 65, first < 65 + UInt8(Subject.mostTasks) else {
                throw ScheduleError(position: position, reason: "a stretch begins with a task, A to P")
            }
            let digits = stretch.dropFirst()
            guard let count = Int(digits), count > 0, digits.utf8.allSatisfy({ $0 >= 48 && $0 <= 57 }) else {
                throw ScheduleError(position: position, reason: "after the task stands a number of points, 1 or more")
            }
            guard count <= Self.longest - choices.count else {
                throw ScheduleError(position: position, reason: "a schedule has at most \(Self.longest) points")
            }
            choices.append(contentsOf: repeatElement(first - 65, count: count))
            position += stretch.utf8.count + 1
        }
    }

    /// Stretches: task and number of points.
    public var stretches: [(task: UInt8, points: Int)] {
        var result: [(task: UInt8, points: Int)] = []
        for choice in choices {
            if let last = result.last, last.task == choice {
                result[result.count - 1].points += 1
            } else {
                result.append((choice, 1))
            }
        }
        return result
    }

    public var description: String {
        choices.isEmpty ? "-" : stretches.map { "\(Self.letter($0.task))\($0.points)" }.joined(separator: ".")
    }

    /// The letter of a task.
    public static func letter(_ task: UInt8) -> String { String(UnicodeScalar(65 + task)) }
}

/// Why a text is no schedule.
public struct ScheduleError: Error, Sendable, Equatable {
    /// Characters before the stretch that is wrong.
    public var position: Int
    public var reason: String
}
