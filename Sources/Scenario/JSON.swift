/// A JSON value, written with its keys in the order given: the output is the same byte for byte every time.
indirect enum JSON {
    case object([(String, JSON)])
    case array([JSON])
    case string(String)
    case number(UInt64)
    case bool(Bool)

    /// Indented by two spaces; short lists and objects of plain values stand in one line.
    func text(indent: Int = 0) -> String {
        if let line = oneLine, line.utf8.count <= 100 { return line }
        let inner = String(repeating: " ", count: indent + 2)
        let outer = String(repeating: " ", count: indent)
        switch self {
        case .object(let members):
            let lines = members.map { "\(inner)\(JSON.quoted($0.0)): \($0.1.text(indent: indent + 2))" }
            return "{\n\(lines.joined(separator: ",\n"))\n\(outer)}"
        case .array(let elements):
            let lines = elements.map { inner + $0.text(indent: indent + 2) }
            return "[\n\(lines.joined(separator: ",\n"))\n\(outer)]"
        default: return oneLine ?? ""
        }
    }

    private var oneLine: String? {
        switch self {
        case .string(let text): return JSON.quoted(text)
        case .number(let value): return String(value)
        case .bool(let value): return value ? "true" : "false"
        case .array(let elements):
            let parts = elements.map(\.oneLine)
            return parts.contains { $0 == nil } ? nil : "[\(parts.map { $0 ?? "" }.joined(separator: ", "))]"
        case .object(let members):
            guard members.count <= 3 else { return nil }
            let parts = members.map { name, value in value.oneLine.map { "\(JSON.quoted(name)): \($0)" } }
            return parts.contains { $0 == nil } ? nil : "{\(parts.map { $0 ?? "" }.joined(separator: ", "))}"
        }
    }

    static func quoted(_ text: String) -> String {
        var quoted = "\""
        for scalar in text.unicodeScalars {
            switch scalar {
            case "\"": quoted += "\\\""
            case "\\": quoted += "\\\\"
            case "\n": quoted += "\\n"
            default:
                if scalar.value < 0x20 {
                    let digits = String(scalar.value, radix: 16)
                    quoted += "\\u" + String(repeating: "0", count: 4 - digits.count) + digits
                } else {
                    quoted.unicodeScalars.append(scalar)
                }
            }
        }
        return quoted + "\""
    }
}
