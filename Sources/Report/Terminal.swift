// Report: what a run found, for people and for programs. It reads results and changes nothing.

/// How text is dressed: colours on a terminal, none in a pipe or with `NO_COLOR`.
public struct Terminal: Sendable {
    public var color: Bool
    public var width: Int
    public init(color: Bool, width: Int = 100) {
        self.color = color
        self.width = width
    }

    func bold(_ text: String) -> String { dressed(text, "1") }
    func dim(_ text: String) -> String { dressed(text, "2") }
    func good(_ text: String) -> String { dressed(text, "32") }
    func bad(_ text: String) -> String { dressed(text, "1;31") }
    func warn(_ text: String) -> String { dressed(text, "33") }
    func name(_ text: String) -> String { dressed(text, "36") }

    private func dressed(_ text: String, _ code: String) -> String {
        color ? "\u{1b}[\(code)m\(text)\u{1b}[0m" : text
    }
}

extension String {
    /// Padded with blanks on the right to `width` characters.
    func padded(_ width: Int) -> String { count >= width ? self : self + String(repeating: " ", count: width - count) }
    /// Padded on the left.
    func right(_ width: Int) -> String { count >= width ? self : String(repeating: " ", count: width - count) + self }
    init(name: [UInt8]) { self.init(decoding: name, as: UTF8.self) }
}

func hex(_ value: UInt64) -> String { String(value, radix: 16) }
func address(_ value: UInt64) -> String { "0x" + hex(value) }

/// `1 fault`, `2 faults`.
func counted(_ count: Int, _ noun: String, _ plural: String? = nil) -> String {
    "\(count) \(count == 1 ? noun : plural ?? noun + "s")"
}

/// Rows of cells, each column as wide as its widest cell. A leading `>` in `alignment` sets a column to the right.
struct Table {
    var rows: [[String]] = []
    var alignment: [Character] = []
    mutating func add(_ row: [String]) { rows.append(row) }

    func lines(indent: Int) -> [String] {
        let columns = rows.map(\.count).max() ?? 0
        let widths = (0..<columns).map { column in rows.map { column < $0.count ? $0[column].count : 0 }.max() ?? 0 }
        return rows.map { row in
            var line = String(repeating: " ", count: indent)
            for (column, cell) in row.enumerated() {
                let right = column < alignment.count && alignment[column] == ">"
                line += right ? cell.right(widths[column]) : cell.padded(widths[column])
                if column + 1 < row.count { line += "  " }
            }
            while line.last == " " { line.removeLast() }
            return line
        }
    }
}
