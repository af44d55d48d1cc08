/// Lines that tell of events that were lost, and lines that belong to the event before.
enum LossNotice {
    /// How many events the line says were lost; nil if it says nothing of the kind.
    ///
    /// ftrace: `CPU:1 [LOST 5 EVENTS]`. trace-cmd: `CPU:1 [5 EVENTS DROPPED]`, behind the name of an instance if there
    /// is one. `perf script --show-lost-events`: `<comm> <tid> [cpu] <time>: PERF_RECORD_LOST lost 5`.
    static func count(_ line: ByteCursor) -> UInt64? { ring(line.withoutInstance) ?? perf(line) }

    private static func ring(_ line: ByteCursor) -> UInt64? {
        var cursor = line
        guard cursor.starts(with: "CPU:"), let notice = cursor.upTo("["), notice.count < 16 else { return nil }
        if cursor.skip("LOST ") { return cursor.decimal() ?? 1 }
        guard let count = cursor.decimal(), cursor.skip(" EVENTS DROPPED") else { return nil }
        return count
    }

    private static func perf(_ line: ByteCursor) -> UInt64? {
        var cursor = line
        guard cursor.upTo(": PERF_RECORD_LOST") != nil else { return nil }
        _ = cursor.word()
        return cursor.decimal(after: " lost ")
    }
}

extension ByteCursor {
    /// A line of the call chain that `perf record -g` keeps with an event: a tab, and an address.
    var isCallChain: Bool {
        var cursor = self
        guard cursor.skip("\t") else { return false }
        cursor.skipSpaces()
        return cursor.hexadecimal() != nil
    }
}
