import Frames
import GuestMemory
import Hardware
import SeededRandom

/// A guest's own tables in one paging mode, as words from `Emulator.window` on: 2 MiB of tables, then 512 pages that can be
/// accessed. Every table is full, so that every address says something.
///
/// One path is always good: that of the linear addresses below 4 MiB (2 MiB with 8-byte entries), whose pages have the
/// instructions.
struct GuestTables {
    let mode: PagingMode
    private(set) var words: [UInt64]

    static let base = Emulator.window
    /// Where the pages begin.
    static let pages = base + 0x20_0000
    static let bytes: UInt64 = 0x40_0000
    static let code: UInt64 = 0x6000
    static let userCode: UInt64 = 0x5000
    /// P W U A D.
    static let all: UInt64 = 0x67
    static let large: UInt64 = 0x80

    /// Not the page itself but 32 bytes in it, which is enough for the pointers of PAE paging.
    var root: UInt64 { mode == .pae ? Self.base + 0x7e0 : Self.base }
    var top: Int { Int(mode.topLevel) }
    var isNarrow: Bool { mode == .bits32 }
    /// Entries of a table of `level`.
    func entries(_ level: Int) -> Int { isNarrow ? 1024 : mode == .pae && level == 3 ? 4 : 512 }
    /// Tables of each level below the root that random entries lead to.
    static let tablesOfLevel = 4

    init(_ mode: PagingMode) {
        self.mode = mode
        words = Array(repeating: 0, count: Int(Self.bytes / 8))
        for page in 0..<512 {
            words[Int((Self.pages - Self.base) / 8) + page * 512 + 511] = UInt64(page) << 8 | Emulator.halt
        }
        for page in 510...511 {
            for (offset, word) in Emulator.code {
                words[Int((Self.pages - Self.base) / 8) + page * 512 + Int(offset / 8)] = word
            }
        }
        for level in stride(from: top, to: 1, by: -1) {
            set(codeTable(level), level, 0, link(level, codeTable(level - 1)))
        }
        set(codeTable(1), 1, Int(Self.userCode >> 12), Self.pages + 510 << 12 | Self.all)
        set(codeTable(1), 1, Int(Self.code >> 12), Self.pages + 511 << 12 | 0x63)
    }

    /// The table on the way to the instructions; of the top level it is the root.
    func codeTable(_ level: Int) -> UInt64 { level == top ? root : Self.base + UInt64(level) << 12 }
    func table(_ level: Int, _ number: Int) -> UInt64 {
        Self.base + UInt64(16 + level * Self.tablesOfLevel + number) << 12
    }
    func page(_ number: Int) -> UInt64 { Self.pages + UInt64(number) << 12 }

    /// What is loaded from one of the pages: a halt, and its number.
    static func content(_ frame: GuestFrame) -> UInt64 { (frame.number &- pages >> 12) << 8 | Emulator.halt }

    /// A good entry of `level` that leads to a table.
    func link(_ level: Int, _ table: UInt64) -> UInt64 { table | (mode == .pae && level == 3 ? 1 : 0x27) }

    mutating func set(_ table: UInt64, _ level: Int, _ index: Int, _ entry: UInt64) {
        let place = table - Self.base + UInt64(index) * (isNarrow ? 4 : 8)
        guard isNarrow else {
            words[Int(place / 8)] = entry
            return
        }
        let shift = (place & 4) * 8
        words[Int(place / 8)] = words[Int(place / 8)] & ~(0xffff_ffff << shift) | (entry & 0xffff_ffff) << shift
    }

    /// The linear address with these indices, from level 1 up, which is canonical; within the page, where accesses go.
    func address(_ indices: [Int]) -> UInt64 {
        var address = Emulator.target
        for (i, index) in indices.enumerated() { address |= UInt64(index) << (12 + UInt64(i) * (isNarrow ? 10 : 9)) }
        guard mode.isLong else { return address }
        let unused = 64 - 12 - 9 * Int64(top)
        return UInt64(bitPattern: Int64(bitPattern: address << UInt64(unused)) >> unused)
    }

    /// CR4.PSE, PAE and LA57, and EFER.LMA, as the mode wants them.
    func registers(
        noExecute: Bool = true, writeProtect: Bool = true, largePages: Bool = true, smep: Bool = false,
        smap: Bool = false
    ) -> PagingRegisters {
        var cr4: UInt64 = largePages ? PagingRegisters.largePagesBit : 0
        if !isNarrow { cr4 |= PagingRegisters.physicalAddressExtensionBit }
        if mode == .fiveLevel { cr4 |= PagingRegisters.fiveLevelsBit }
        if smep { cr4 |= PagingRegisters.supervisorExecutionPreventionBit }
        if smap { cr4 |= PagingRegisters.supervisorAccessPreventionBit }
        return PagingRegisters(
            cr0: PagingRegisters.pagingBit | (writeProtect ? PagingRegisters.writeProtectBit : 0), cr3: root, cr4: cr4,
            efer: (mode.isLong ? PagingRegisters.longModeBit : 0) | (noExecute ? PagingRegisters.noExecuteBit : 0))
    }
}

/// Tables whose entries have one bit other than a good entry has.
extension GuestTables {
    /// Where, of each level, good entries of tables and of large leaves are, and from where on their variants.
    private static let good = 3
    private static let variants = 8
    private static let largeVariants = 80

    /// Makes every variant of an entry on the way to one page, and gives the addresses that lead through each. Bits that
    /// choose another table or page are left as they are. `processor` says where the physical address ends.
    mutating func makeVariants(_ processor: PagingProcessor) -> [UInt64] {
        var addresses: [UInt64] = []
        for level in stride(from: top, to: 0, by: -1) where !(mode == .pae && level == 3) {
            let above = level == top ? root : table(level, 0)
            let entry = level == 1 ? page(1) | Self.all : link(level, table(level - 1, 0))
            set(above, level, Self.good, entry)
            for bit in 0..<(isNarrow ? 32 : 64) where !isAddress(bit, 12, processor) {
                set(above, level, Self.variants + bit, entry ^ 1 << UInt64(bit))
                addresses.append(path(level, Self.variants + bit))
            }
            guard let low = largeLeafBits(level, processor) else { continue }
            let leaf = (level == 3 ? 0 : isNarrow ? Self.base : Self.pages) | Self.all | Self.large
            // A table at 0 would be outside of the window.
            for bit in 0..<(isNarrow ? 32 : 64) where !isAddress(bit, low, processor) && (level < 3 || bit != 7) {
                set(above, level, Self.largeVariants + bit, leaf ^ 1 << UInt64(bit))
                addresses.append(path(level, Self.largeVariants + bit))
            }
        }
        if mode == .pae { for i in 1..<4 { set(root, 3, i, link(3, table(2, 0))) } }
        return addresses
    }

    /// The first bit of a large leaf of `level` that says where the page is; nil: there is none.
    private func largeLeafBits(_ level: Int, _ processor: PagingProcessor) -> Int? {
        switch level {
        case 2: isNarrow ? 22 : 21
        case 3: mode.isLong && processor.gigabytePages ? 30 : nil
        default: nil
        }
    }

    /// Bits from `low` on; of a page of 4 MiB 20:13 too, which are the address's 39:32. Of those, QEMU 7.2 reserves none
    /// whatever the width: by the manual all that are not below MAXPHYADDR (Intel SDM volume 3, "32-bit paging", the
    /// format of an entry that maps a 4-MByte page).
    private func isAddress(_ bit: Int, _ low: Int, _ processor: PagingProcessor) -> Bool {
        if isNarrow { return bit >= low || low == 22 && (13..<21).contains(bit) }
        return bit >= low && bit < processor.physicalAddressBits
    }

    /// The address that takes `index` at `level`, and the good entries above and below. Within a large page it ends in
    /// the second half of the tables' 4 MiB.
    private func path(_ level: Int, _ index: Int) -> UInt64 {
        var indices = Array(repeating: Self.good, count: top)
        indices[level - 1] = index
        if isNarrow, level == 2, index >= Self.largeVariants { indices[0] = 512 + 9 }
        if level == 3, index >= Self.largeVariants { indices[1] = Int(Self.pages >> 21) }
        return address(indices)
    }
}

/// Tables of random entries.
extension GuestTables {
    /// Fills all tables. Most entries are present and permit something; some have a bit that may be reserved.
    mutating func fill(_ random: inout SplitMix, _ processor: PagingProcessor) {
        for level in stride(from: top, to: 0, by: -1) {
            for number in 0..<(level == top ? 1 : Self.tablesOfLevel) {
                let place = level == top ? root : table(level, number)
                for i in 0..<entries(level) where level < top || i > 0 {
                    set(place, level, i, entry(level, &random, processor))
                }
            }
        }
        // One pointer that is not there, whatever else it says.
        if mode == .pae { set(root, 3, 1, random.next() & ~1) }
    }

    private func entry(_ level: Int, _ random: inout SplitMix, _ processor: PagingProcessor) -> UInt64 {
        func one(in n: Int) -> Bool { Int.random(in: 0..<n, using: &random) == 0 }
        let next =
            level == 1
            ? page(.random(in: 0..<510, using: &random)) : table(level - 1, .random(in: 0..<4, using: &random))
        // Reserved bits refuse the load of a pointer of PAE; a walk meets none.
        if mode == .pae, level == 3 { return next | 1 }
        // What says nothing: write-through, no cache, PAT or size of what is no leaf, G, 11:9.
        var entry = random.next() & 0xf78 | (one(in: 16) ? 0 : 1) | (one(in: 5) ? 0 : 2) | (one(in: 5) ? 0 : 4)
        let isLarge = level == 2 && one(in: 3) || level == 3 && mode.isLong && one(in: 3)
        if level > 1 && !isLarge { return entry & ~Self.large | next | high(&random, processor) }
        if level == 1 { return entry | (one(in: 2) ? Self.large : 0) | next | high(&random, processor) }
        entry |= Self.large | (one(in: 2) ? 1 << 12 : 0)
        if one(in: 16) {
            entry |= 1 << UInt64.random(in: isNarrow ? 21...21 : 13...(level == 2 ? 20 : 29), using: &random)
        }
        return entry | (level == 3 ? 0 : isNarrow ? Self.base : Self.pages) | high(&random, processor)
    }

    /// XD, what is ignored, and seldom what is reserved.
    private func high(_ random: inout SplitMix, _ processor: PagingProcessor) -> UInt64 {
        guard !isNarrow else { return 0 }
        var bits: UInt64 = Int.random(in: 0..<5, using: &random) == 0 ? 1 << 63 : 0
        if mode.isLong { bits |= random.next() & 0x7ff << 52 }
        if Int.random(in: 0..<24, using: &random) == 0 {
            bits |= 1 << UInt64.random(in: UInt64(processor.physicalAddressBits)..<63, using: &random)
        }
        return bits
    }

    /// An address that the tables say something about; a page of 1 GiB is met where the accessible pages are.
    func randomAddress(_ random: inout SplitMix) -> UInt64 {
        var indices = (1...top).map { Int.random(in: 0..<entries($0), using: &random) }
        if isNarrow, Bool.random(using: &random) { indices[0] |= 512 }
        if mode.isLong, Bool.random(using: &random) { indices[1] = Int(Self.pages >> 21) }
        if top > 3 || isNarrow, indices[top - 1] == 0 { indices[top - 1] = 1 }
        return address(indices)
    }
}
