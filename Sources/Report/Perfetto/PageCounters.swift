/// Counters of leaves by size, below one process: a track for each size that occurs.
struct PageCounters {
    private let title: String
    private let unit: String
    private let parent: PerfettoTrace.Track
    private var tracks = [PerfettoTrace.Track?](repeating: nil, count: 6)
    private(set) var counts = [Int](repeating: 0, count: 6)

    init(_ title: String, unit: String, of parent: PerfettoTrace.Track) {
        self.title = title
        self.unit = unit
        self.parent = parent
    }

    mutating func add(_ count: Int, level: Int, at time: UInt64, to trace: inout PerfettoTrace) {
        guard counts.indices.contains(level), count != 0 else { return }
        counts[level] += count
        let track: PerfettoTrace.Track
        if let known = tracks[level] {
            track = known
        } else {
            track = trace.counter("\(title) \(Self.size(level))", unit: unit, of: parent)
            tracks[level] = track
        }
        trace.set(track, to: counts[level], at: time)
    }

    /// What a leaf of `level` maps.
    static func size(_ level: Int) -> String {
        switch level {
        case 1: "4K"
        case 2: "2M"
        case 3: "1G"
        case 4: "512G"
        default: "level \(level)"
        }
    }
}
