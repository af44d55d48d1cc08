import Frames

/// Moves tables with 8-byte entries to where memory is elsewhere: the entries that name memory change.
struct Relocation {
    /// Of the root: 3 for the four pointers of PAE.
    let levels: UInt8
    private let offset: UInt64
    private var entries: [Int] = []

    private static let field: UInt64 = 0x000f_ffff_ffff_f000

    /// `memory` begins at 0, and will at `offset`.
    init(_ memory: inout [UInt64], root: HostFrame, levels: UInt8, by offset: UInt64) {
        self.levels = levels
        self.offset = offset
        move(&memory, root, level: levels)
    }

    private mutating func move(_ memory: inout [UInt64], _ table: HostFrame, level: UInt8) {
        for i in 0..<(level == 3 && levels == 3 ? 4 : 512) {
            let place = Int(table.number) * 512 + i
            let entry = memory[place]
            // What has a reserved bit leads nowhere.
            guard entry & 1 != 0, Int((entry & Self.field) >> 12) < memory.count / 512, !entries.contains(place) else {
                continue
            }
            let isLeaf = level == 1 || entry & 0x80 != 0
            memory[place] = entry + offset
            entries.append(place)
            if !isLeaf { move(&memory, HostFrame((entry & Self.field) >> 12), level: level - 1) }
        }
    }

    func moveBack(_ memory: inout [UInt64]) {
        for place in entries { memory[place] -= offset }
    }
}
