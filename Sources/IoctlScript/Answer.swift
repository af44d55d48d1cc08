/// What came of one call.
public struct Answer: Sendable, Equatable {
    public enum Outcome: Sendable, Equatable {
        case returned(Int64)
        /// The call returned -1 with this errno.
        case failed(Int32)
        /// A load or store of the process itself ended in a signal.
        case signal(String)
        /// This executor can't do it; the reason.
        case notHere(String)
    }
    public var outcome: Outcome
    /// What came back besides, in the order in which it is printed.
    public var fields: [Field]

    public struct Field: Sendable, Equatable {
        public var name: String
        public var value: Value
        public init(_ name: String, _ value: Value) {
            self.name = name
            self.value = value
        }
    }

    public enum Value: Sendable, Equatable {
        case decimal(UInt64)
        case hex(UInt64)
        case word(String)
        /// In hexadecimal, runs of the same shortened.
        case list([UInt64])
        case entries([RingEntry])
    }

    public init(_ outcome: Outcome, _ fields: [Field] = []) {
        self.outcome = outcome
        self.fields = fields
    }
    public static var done: Answer { Answer(.returned(0)) }
}

/// An entry of a dirty ring.
public struct RingEntry: Sendable, Equatable {
    public var slot: UInt32
    public var offset: UInt64
    public init(slot: UInt32, offset: UInt64) {
        self.slot = slot
        self.offset = offset
    }
}

// MARK: Text

extension Answer: CustomStringConvertible {
    /// As it is printed, without the line's number.
    public var description: String {
        var words: [String]
        switch outcome {
        case .returned(let value): words = ["\(value)"]
        case .failed(let errno): words = ["-1", errnoName(errno)]
        case .signal(let name): words = ["signal \(name)"]
        case .notHere(let reason): words = ["not here: \(reason)"]
        }
        for field in fields { words.append("\(field.name)=\(field.value)") }
        return words.joined(separator: " ")
    }
}

extension Answer.Value: CustomStringConvertible {
    public var description: String {
        switch self {
        case .decimal(let value): "\(value)"
        case .hex(let value): hexText(value)
        case .word(let word): word
        case .list(let values): Self.shortened(values.map(hexText))
        case .entries(let entries): Self.ranges(entries)
        }
    }

    /// `0:1+0x3-0x9,0:1+0x2`: ascending neighbours of one slot, then another.
    static func ranges(_ entries: [RingEntry]) -> String {
        var parts: [String] = []
        var start = 0
        while start < entries.count {
            var end = start + 1
            while end < entries.count, entries[end].slot == entries[start].slot,
                entries[end].offset == entries[end - 1].offset &+ 1
            {
                end += 1
            }
            parts.append("\(entries[start])" + (end - start == 1 ? "" : "-\(hexText(entries[end - 1].offset))"))
            start = end
        }
        return parts.isEmpty ? "none" : parts.joined(separator: ",")
    }

    /// `0x0*3,0x1`: a run of three, then another.
    static func shortened(_ values: [String]) -> String {
        guard !values.isEmpty else { return "none" }
        var parts: [String] = []
        var start = 0
        while start < values.count {
            var end = start + 1
            while end < values.count, values[end] == values[start] { end += 1 }
            parts.append(end - start == 1 ? values[start] : "\(values[start])*\(end - start)")
            start = end
        }
        return parts.joined(separator: ",")
    }
}

extension RingEntry: CustomStringConvertible {
    public var description: String { "\(slot >> 16):\(slot & 0xffff)+\(hexText(offset))" }
}

func hexText(_ value: UInt64) -> String { "0x" + String(value, radix: 16) }

/// Linux's names; `errno N` for a number that has none here.
public func errnoName(_ number: Int32) -> String {
    errnoNames.first { $0.number == number }?.name ?? "errno_\(number)"
}

private let errnoNames: [(number: Int32, name: String)] = [
    (1, "EPERM"), (2, "ENOENT"), (3, "ESRCH"), (4, "EINTR"), (5, "EIO"), (6, "ENXIO"), (7, "E2BIG"), (9, "EBADF"),
    (11, "EAGAIN"),
    (12, "ENOMEM"), (13, "EACCES"), (14, "EFAULT"), (16, "EBUSY"), (17, "EEXIST"), (19, "ENODEV"), (22, "EINVAL"),
    (24, "EMFILE"), (25, "ENOTTY"), (27, "EFBIG"), (28, "ENOSPC"), (38, "ENOSYS"), (75, "EOVERFLOW"),
    (95, "EOPNOTSUPP"),
    (121, "EREMOTEIO"), (133, "EHWPOISON"),
]

// MARK: A whole run

extension Script {
    /// `12: 0`, one line for each call.
    public func text(of answers: [Answer]) -> String {
        var text = ""
        for (line, answer) in zip(lines, answers) { text += "\(line.number): \(answer)\n" }
        return text
    }

    /// The same as JSON: an array with an object for each call.
    public func json(of answers: [Answer]) -> String {
        let objects = zip(lines, answers).map { line, answer in
            "  {" + (["\"line\": \(line.number)"] + answer.json).joined(separator: ", ") + "}"
        }
        return objects.isEmpty ? "[]\n" : "[\n" + objects.joined(separator: ",\n") + "\n]\n"
    }
}

extension Answer {
    /// Keys with their values, with commas between them.
    var jsonPairs: String { json.joined(separator: ", ") }

    fileprivate var json: [String] {
        var pairs: [String]
        switch outcome {
        case .returned(let value): pairs = ["\"result\": \(value)"]
        case .failed(let errno): pairs = ["\"result\": -1", "\"errno\": \(quoted(errnoName(errno)))"]
        case .signal(let name): pairs = ["\"signal\": \(quoted(name))"]
        case .notHere(let reason): pairs = ["\"not_here\": \(quoted(reason))"]
        }
        for field in fields { pairs.append("\(quoted(field.name)): \(field.value.json)") }
        return pairs
    }
}

extension Answer.Value {
    /// Numbers that may need more than 53 bits are strings, as they are printed.
    fileprivate var json: String {
        switch self {
        case .decimal(let value): "\(value)"
        case .hex, .word: quoted(description)
        case .list(let values): "[" + values.map { quoted(hexText($0)) }.joined(separator: ", ") + "]"
        case .entries(let entries):
            "["
                + entries.map { "{\"slot\": \($0.slot), \"offset\": \(quoted(hexText($0.offset)))}" }
                .joined(separator: ", ") + "]"
        }
    }
}

/// Names and reasons are ASCII words of this program's own.
private func quoted(_ text: String) -> String { "\"\(text)\"" }
