/// How many of a device's next transfers are to come back with an I/O error. Guarded by the device's lock.
struct TransferFailures {
    private var reads = 0
    private var writes = 0

    mutating func add(reads: Int, writes: Int) {
        self.reads += reads
        self.writes += writes
    }

    /// Whether this one is; it is used up then.
    mutating func takeRead() -> Bool { Self.take(&reads) }
    mutating func takeWrite() -> Bool { Self.take(&writes) }

    private static func take(_ count: inout Int) -> Bool {
        guard count > 0 else { return false }
        count -= 1
        return true
    }
}
