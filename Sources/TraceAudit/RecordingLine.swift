/// One event line, split into its prefix and the event's body.
///
/// | from | shape |
/// |---|---|
/// | ftrace | `<comm>-<tid> [(<pid>)] [cpu] <5 flag chars> <sec.fraction>: <event>: <body>` |
/// | trace-cmd report | `[<instance>: ]<comm>-<tid> [cpu] <sec.fraction>: <event>:<blanks><body>` |
/// | perf script | `<comm> [<pid>/]<tid> [cpu] <sec.fraction>: <system>:<event>: <body>` |
///
/// Each line tells for itself which it is. ftrace has the process column where `options/record-tgid` was set, perf where
/// both `pid` and `tid` were asked for. Spec: x86 10; perf-script(1), option `-F`.
struct RecordingLine {
    let command: ByteCursor
    let thread: UInt32
    /// Thread group, where the recording has that column and it is known.
    let process: UInt32?
    let hasProcessColumn: Bool
    let cpu: UInt32
    /// The event was written by an interrupt that happened to hit this thread.
    let inInterrupt: Bool
    /// Nanoseconds of the trace clock.
    let time: UInt64
    let event: ByteCursor
    let body: ByteCursor

    init?(_ line: ByteCursor) {
        guard let bracket = Self.processorColumn(of: line) else { return nil }
        var cursor = line
        cursor.advance(bracket - line.position + 1)
        guard let cpu = cursor.decimal(), cpu <= UInt64(UInt32.max), cursor.skip("]") else { return nil }
        guard let task = Self.task(in: ByteCursor(line.position, bracket)) else { return nil }

        cursor.skipSpaces()
        var flags = cursor.word()
        var time = Self.timestamp(flags)
        if time == nil {
            cursor.skipSpaces()
            time = Self.timestamp(cursor.word())
        } else {
            flags = ByteCursor(flags.end, flags.end)
        }
        guard let time else { return nil }
        cursor.skipSpaces()
        guard let name = Self.eventName(&cursor) else { return nil }

        command = task.command
        thread = task.thread
        process = task.process
        hasProcessColumn = task.hasProcessColumn
        self.cpu = UInt32(cpu)
        inInterrupt = Self.isInterrupt(flags)
        self.time = time
        event = name
        body = cursor
    }

    /// The first `[digits]` after a blank: a command name may hold brackets, but hardly this.
    private static func processorColumn(of line: ByteCursor) -> UnsafePointer<UInt8>? {
        var cursor = line
        var previous = UInt8(ascii: "x")
        while let byte = cursor.next {
            if byte == UInt8(ascii: "["), previous == UInt8(ascii: " ") {
                var probe = cursor
                probe.advance()
                if probe.decimal() != nil, probe.skip("]") { return cursor.position }
            }
            previous = byte
            cursor.advance()
        }
        return nil
    }

    private struct Task {
        var command: ByteCursor
        var thread: UInt32
        var process: UInt32?
        var hasProcessColumn: Bool
    }

    /// Reads `comm-pid` and the optional `(tgid)` from the right: a command name may hold blanks and minus signs.
    private static func task(in column: ByteCursor) -> Task? {
        var end = column.end
        let start = column.position
        func trim() { while end > start, (end - 1).pointee == UInt8(ascii: " ") { end -= 1 } }
        trim()
        var process: UInt32?
        var hasProcessColumn = false
        if end > start, (end - 1).pointee == UInt8(ascii: ")") {
            hasProcessColumn = true
            var open = end - 1
            while open > start, open.pointee != UInt8(ascii: "(") { open -= 1 }
            var inside = ByteCursor(open + 1, end - 1)
            inside.skipSpaces()
            if let value = inside.decimal(), value <= UInt64(UInt32.max) { process = UInt32(value) }
            end = open
            trim()
        }
        var digits = end
        while digits > start, (digits - 1).pointee &- UInt8(ascii: "0") < 10 { digits -= 1 }
        var number = ByteCursor(digits, end)
        guard let thread = number.decimal(), thread <= UInt64(UInt32.max), digits > start else { return nil }
        var separator = digits - 1
        if separator.pointee == UInt8(ascii: "/"), !hasProcessColumn {
            var first = separator
            while first > start, (first - 1).pointee &- UInt8(ascii: "0") < 10 { first -= 1 }
            var number = ByteCursor(first, separator)
            guard let value = number.decimal(), value <= UInt64(UInt32.max), first > start else { return nil }
            process = UInt32(value)
            hasProcessColumn = true
            separator = first - 1
        }
        guard separator.pointee == UInt8(ascii: "-") || separator.pointee == UInt8(ascii: " ") else { return nil }
        return Task(
            command: command(in: ByteCursor(start, separator)), thread: UInt32(thread), process: process,
            hasProcessColumn: hasProcessColumn)
    }

    /// Without the blanks around it, and without the name of the ftrace instance that trace-cmd puts before it.
    private static func command(in column: ByteCursor) -> ByteCursor {
        var end = column.end
        while end > column.position, (end - 1).pointee == UInt8(ascii: " ") { end -= 1 }
        var name = ByteCursor(column.position, end)
        name.skipSpaces()
        return name.withoutInstance
    }

    /// `sec.fraction:`, the fraction in micro- or nanoseconds.
    private static func timestamp(_ word: ByteCursor) -> UInt64? {
        var word = word
        guard let seconds = word.decimal(), seconds < 1 << 33, word.skip(".") else { return nil }
        let before = word.count
        guard let fraction = word.decimal(), before - word.count <= 9, word.skip(":"), word.isAtEnd else { return nil }
        var scaled = fraction
        for _ in (before - word.count - 1)..<9 { scaled *= 10 }
        return seconds * 1_000_000_000 + scaled
    }

    /// The name before `: `; of `system:name` the name.
    private static func eventName(_ cursor: inout ByteCursor) -> ByteCursor? {
        let word = cursor.word()
        guard word.count >= 2, (word.end - 1).pointee == UInt8(ascii: ":") else { return nil }
        var start = word.end - 1
        while start > word.position, (start - 1).pointee != UInt8(ascii: ":") { start -= 1 }
        let name = ByteCursor(start, word.end - 1)
        guard !name.isAtEnd, name.isIdentifier else { return nil }
        cursor.skipSpaces()
        return name
    }

    /// Third flag: `h`, `H`, `Z`, `z` hard interrupt or NMI, `s` soft interrupt.
    private static func isInterrupt(_ flags: ByteCursor) -> Bool {
        guard flags.count >= 3 else { return false }
        switch flags.position[2] {
        case UInt8(ascii: "h"), UInt8(ascii: "H"), UInt8(ascii: "s"), UInt8(ascii: "z"), UInt8(ascii: "Z"): return true
        default: return false
        }
    }
}

extension ByteCursor {
    /// What stands behind a first word that ends in a colon, if anything does.
    var withoutInstance: ByteCursor {
        var rest = self
        let first = rest.word()
        rest.skipSpaces()
        return first.count > 1 && (first.end - 1).pointee == UInt8(ascii: ":") && !rest.isAtEnd ? rest : self
    }

    /// Letters, digits, `_`, `.` and `-` only: what a tracepoint's name is made of.
    var isIdentifier: Bool {
        var cursor = self
        while let byte = cursor.next {
            switch byte {
            case UInt8(ascii: "a")...UInt8(ascii: "z"), UInt8(ascii: "A")...UInt8(ascii: "Z"),
                UInt8(ascii: "0")...UInt8(ascii: "9"), UInt8(ascii: "_"), UInt8(ascii: "-"), UInt8(ascii: "."):
                cursor.advance()
            default: return false
            }
        }
        return true
    }
}
