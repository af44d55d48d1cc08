/// What is known about one entry. Lines are one-based and saturate at 2^32 - 2.
struct KnownEntry {
    enum State: UInt8 { case never, present, lost, unknown }
    /// A time that has not come yet: the zap may still be going on.
    static let open = UInt32.max

    var entry: UInt64 = 0
    /// Host frame of the table page that holds the entry, truncated; 0 where no event named it.
    var table: UInt32 = 0
    /// Line of the last write.
    var setAt: UInt32 = 0
    /// For `lost`: the line by which the entry was gone for certain.
    var lostAt: UInt32 = 0
    /// Line at which a writable entry was replaced by a read-only one, 0 if never.
    var writableLostAt: UInt32 = 0
    var state: State = .never
    /// `entry` is exactly what the last TDP change left.
    var chained = false
}

/// The entries of one machine by address space, level and guest frame, 64 to a group.
///
/// Several tables can map one guest frame (shadow paging, invalid TDP roots): the last write stands, and rules that
/// compare two writes look at the table too. A zap is applied to the groups at once; zaps whose extent the recording
/// does not show make everything older unknown, in constant time.
final class EntryHistory {
    static let groupSize = 64
    private var groups: [UInt64: UnsafeMutablePointer<KnownEntry>] = [:]
    private var lastKey = UInt64.max
    private var lastGroup: UnsafeMutablePointer<KnownEntry>?
    /// Present entries older than this line may be gone.
    private(set) var unknownBefore: UInt32 = 0
    /// Bounds memory over all machines; nil group when it is used up.
    private let budget: EntryBudget
    private(set) var isIncomplete = false

    init(budget: EntryBudget) { self.budget = budget }

    deinit { removeAll() }

    func removeAll() {
        for group in groups.values { group.deallocate() }
        budget.release(groups.count)
        groups = [:]
        lastKey = .max
        lastGroup = nil
    }

    private static func key(_ space: Int, _ level: Int, _ frame: UInt64) -> UInt64 {
        let index = frame >> UInt64(9 * (level - 1)) / 64
        return UInt64(space & 0xf) << 60 | UInt64(level & 7) << 56 | (index & (1 << 56 - 1))
    }

    private static func offset(_ level: Int, _ frame: UInt64) -> Int { Int(frame >> UInt64(9 * (level - 1)) & 63) }

    private func group(_ key: UInt64) -> UnsafeMutablePointer<KnownEntry>? {
        if key == lastKey { return lastGroup }
        let found = groups[key]
        if found != nil {
            lastKey = key
            lastGroup = found
        }
        return found
    }

    /// The entry as known now; a present one that an unlocated zap may have hit is `unknown`.
    func entry(space: Int, level: Int, frame: UInt64) -> KnownEntry {
        guard let group = group(Self.key(space, level, frame)) else { return KnownEntry() }
        var known = group[Self.offset(level, frame)]
        if known.state == .present, known.setAt < unknownBefore { known.state = .unknown }
        return known
    }

    /// Changes the entry in place, creating its group; does nothing once the memory limit is reached.
    func update(space: Int, level: Int, frame: UInt64, _ change: (inout KnownEntry) -> Void) {
        let key = Self.key(space, level, frame)
        if let group = group(key) {
            change(&group[Self.offset(level, frame)])
            return
        }
        guard budget.take() else {
            isIncomplete = true
            return
        }
        let group = UnsafeMutablePointer<KnownEntry>.allocate(capacity: Self.groupSize)
        group.initialize(repeating: KnownEntry(), count: Self.groupSize)
        groups[key] = group
        lastKey = key
        lastGroup = group
        change(&group[Self.offset(level, frame)])
    }

    /// Records that a leaf was written.
    func recordLeaf(_ entry: DecodedEntry, space: Int, frame: UInt64, table: UInt32, line: UInt32, chained: Bool) {
        let unknownBefore = self.unknownBefore
        update(space: space, level: entry.level, frame: frame) { known in
            let wasPresent = known.state == .present && known.setAt >= unknownBefore
            let wasWritable = known.entry & 2 != 0 && known.state != .never
            if !entry.canWrite, wasWritable {
                known.writableLostAt = known.state == .lost ? known.lostAt : line
                if known.writableLostAt == KnownEntry.open || !wasPresent && known.state != .lost {
                    known.writableLostAt = line
                }
            } else if entry.canWrite {
                known.writableLostAt = 0
            }
            known.entry = entry.raw
            known.table = table
            known.setAt = line
            known.lostAt = 0
            known.state = .present
            known.chained = chained
        }
    }

    /// Everything written before `line` may be gone: a zap of unknown extent.
    func makeUnknown(before line: UInt32) { unknownBefore = max(unknownBefore, line) }

    /// Visits every known entry that covers a frame of `frames`, at every level, in no particular order.
    func forEach(in frames: ClosedRange<UInt64>, levels: ClosedRange<Int> = 1...3, _ change: (inout KnownEntry) -> Void)
    {
        for level in levels {
            let shift = UInt64(9 * (level - 1))
            let first = frames.lowerBound >> shift
            let last = frames.upperBound >> shift
            if last / 64 - first / 64 > UInt64(groups.count) {
                visitAll(level: level, first: first, last: last, change)
            } else {
                for number in (first / 64)...(last / 64) {
                    for space in 0...1 {
                        let key = UInt64(space) << 60 | UInt64(level) << 56 | number
                        guard let group = groups[key] else { continue }
                        visit(group, number: number, first: first, last: last, change)
                    }
                }
            }
        }
    }

    private func visitAll(level: Int, first: UInt64, last: UInt64, _ change: (inout KnownEntry) -> Void) {
        for (key, group) in groups where key >> 56 & 7 == UInt64(level) {
            let number = key & (1 << 56 - 1)
            guard number >= first / 64, number <= last / 64 else { continue }
            visit(group, number: number, first: first, last: last, change)
        }
    }

    private func visit(
        _ group: UnsafeMutablePointer<KnownEntry>, number: UInt64, first: UInt64, last: UInt64,
        _ change: (inout KnownEntry) -> Void
    ) {
        let base = number * 64
        let low = Int(max(first, base) - base)
        let high = Int(min(last, base + 63) - base)
        for offset in low...high where group[offset].state != .never { change(&group[offset]) }
    }
}

/// How many groups of entries may still be remembered; shared by all machines of one recording.
final class EntryBudget {
    private var left = TraceAuditLimits.entryGroups

    func take() -> Bool {
        guard left > 0 else { return false }
        left -= 1
        return true
    }

    func release(_ count: Int) { left += count }
}
