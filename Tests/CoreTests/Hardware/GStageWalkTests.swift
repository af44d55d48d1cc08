import Audit
import Frames
import Hardware
import HostMemory
import Testing

@Suite struct Arches_11_RISCVKnownAnswers {
    /// The tree of the specification's executed values: root at 0x80200000, Sv39x4, VMID 1.
    static let hgatp: UInt64 = 0x8000_1000_0008_0200
    let tables = RawTables(top: 0x8100_0000)
    let walker: GStageWalker
    static let leaf4K: UInt64 = 0x8020_5000 + 8 * 3
    static let leaf2M: UInt64 = 0x8020_4000 + 8 * 2

    init() {
        walker = GStageWalker(memory: tables.memory, hgatp: Self.hgatp, hardwareAD: true)
        tables[0x8020_0000 + 8 * 0x201] = 0x2008_1001
        tables[0x8020_4000 + 8 * 1] = 0x2008_1401
        tables[Self.leaf4K] = 0x2010_00df
        tables[Self.leaf2M] = 0x2018_00db
    }

    func trap(_ address: UInt64, _ access: AccessKind) throws -> GStageTrap {
        walker.trap(for: try #require(walker.walk(GuestAddress(address), access).violation))
    }

    @Test func `a 4 KiB leaf`() {
        for access in AccessKind.allCases {
            #expect(
                walker.walk(GuestAddress(0x80_4020_3018), access).translation
                    == Translation(
                        frame: HostFrame(0x80400), level: .page4K, readable: true, writable: true, executable: true,
                        dirty: true))
        }
    }

    @Test func `a read-only 2 MiB leaf takes loads and faults stores`() throws {
        let load = try #require(walker.walk(GuestAddress(0x80_4040_0018), .read).translation)
        #expect(load.frame == HostFrame(0x80600) && load.level == .page2M && !load.writable)
        let store = try trap(0x80_4040_0018, .write)
        #expect(store.cause == 23 && store.htval == 0x20_1010_0006)
        #expect(store.guestAddress == GuestAddress(0x80_4040_0018))
    }

    @Test func `a misaligned 2 MiB leaf faults`() throws {
        tables[0x8020_4000 + 8 * 3] = 0x80601 << 10 | 0xdb
        #expect(try trap(0x80_4060_0018, .read) == GStageTrap(cause: 21, htval: 0x20_1018_0006, stval: 0x80_4060_0018))
    }

    @Test func `U clear, and W without R, fault`() throws {
        tables[Self.leaf4K] = 0x2010_00cf
        #expect(try trap(0x80_4020_3018, .read).cause == 21)
        tables[Self.leaf4K] = 0x2010_00d5
        #expect(try trap(0x80_4020_3018, .read).cause == 21)
        #expect(try trap(0x80_4020_3018, .execute).cause == 20)
    }

    @Test func `an address wider than 41 bits faults, one of 41 bits does not for its width`() throws {
        let wide = try trap(0x200_0000_0000, .read)
        #expect(wide.cause == 21 && wide.htval == 0x80_0000_0000)
        #expect(walker.walk(GuestAddress(0x1ff_ffff_f000), .read).violation?.reason == .absent)
        tables[0x8020_0000 + 8 * 0x7ff] = 0x2000_00df  // a 1 GiB leaf at the last root entry
        #expect(walker.walk(GuestAddress(0x1ff_c000_1000), .read).translation?.frame == HostFrame(0x80001))
    }

    @Test func `hardware sets A at a read and A and D at a write`() throws {
        tables[Self.leaf4K] = 0x2010_009f
        #expect(walker.walk(GuestAddress(0x80_4020_3018), .read).translation?.dirty == true)
        #expect(tables[Self.leaf4K] == 0x2010_00df)
        tables[Self.leaf4K] = 0x2010_005f
        #expect(walker.walk(GuestAddress(0x80_4020_3018), .read).translation?.dirty == false)
        #expect(tables[Self.leaf4K] == 0x2010_005f)
        #expect(walker.walk(GuestAddress(0x80_4020_3018), .write).translation?.dirty == true)
        #expect(tables[Self.leaf4K] == 0x2010_00df)
    }

    @Test func `without Svadu a clear A, or D at a store, faults and the entry stays`() throws {
        let strict = GStageWalker(memory: tables.memory, hgatp: Self.hgatp, hardwareAD: false)
        tables[Self.leaf4K] = 0x2010_009f
        #expect(strict.walk(GuestAddress(0x80_4020_3018), .read).violation?.reason == .accessedDirty)
        tables[Self.leaf4K] = 0x2010_005f
        #expect(strict.walk(GuestAddress(0x80_4020_3018), .read).translation?.dirty == false)
        #expect(strict.walk(GuestAddress(0x80_4020_3018), .write).violation?.reason == .accessedDirty)
        #expect(tables[Self.leaf4K] == 0x2010_005f)
    }
}

@Suite struct Arches_2_1_GStageFormat {
    static let top: UInt64 = 0x100_0000

    /// A tree of `levels` for guest address 0: the root at 0x4000, then one table a page from 0x8000 on.
    struct Tree {
        let tables = RawTables()
        let levels: UInt8
        init(_ levels: UInt8) {
            self.levels = levels
            for level in 2...levels { tables[location(level)] = pointer(level) }
        }
        func location(_ level: UInt8) -> UInt64 { level == levels ? 0x4000 : 0x8000 + UInt64(levels - 1 - level) << 12 }
        func pointer(_ level: UInt8) -> UInt64 { (location(level - 1) >> 12) << 10 | 1 }
        func walker(hardwareAD: Bool = true, memoryTypes: Bool = false) -> GStageWalker {
            GStageWalker(
                memory: tables.memory, hgatp: UInt64(levels + 5) << 60 | 0x4, hardwareAD: hardwareAD,
                memoryTypes: memoryTypes, vcpu: 1)
        }
    }

    @Test(arguments: [3, 4, 5] as [UInt8])
    func `every pattern of the low bits does what the manual says, at every level`(levels: UInt8) {
        let tree = Tree(levels)
        for level in 1...levels {
            for low in 0..<(1024 as UInt64) {
                for hardwareAD in [false, true] {
                    for access in AccessKind.allCases {
                        check(tree, level, low, hardwareAD, access)
                    }
                }
            }
            tree.tables[tree.location(level)] = level == 1 ? 0 : tree.pointer(level)
        }
    }

    private func check(_ tree: Tree, _ level: UInt8, _ low: UInt64, _ hardwareAD: Bool, _ access: AccessKind) {
        let bit = (0..<8).map { low >> UInt64($0) & 1 == 1 }
        let (v, r, w, x, u, a, d) = (bit[0], bit[1], bit[2], bit[3], bit[4], bit[6], bit[7])
        let isTable = v && !r && !w && !x
        if level > 1 { tree.tables[tree.location(1)] = 0xdf }
        // A table's entry leads on to the next table; a leaf maps frame 0, aligned for every size.
        let address = isTable && level > 1 ? tree.pointer(level) & ~1 : 0
        let entry = address | low
        tree.tables[tree.location(level)] = entry

        let result = tree.walker(hardwareAD: hardwareAD).walk(GuestAddress(0), access)

        let permitted = access == .read ? r : access == .write ? w : x
        let flagsSet = a && (d || access != .write)
        let good: Bool =
            isTable
            ? level > 1 && !a && !d && !u
            : v && u && !(w && !r) && permitted && (flagsSet || hardwareAD)
        #expect((result.translation != nil) == good, "level \(level) low \(low) \(access)")
        #expect(result.misconfiguration == nil)
        let set: UInt64 = good && !isTable ? (1 << 6 | (access == .write ? 1 << 7 : 0)) : 0
        #expect(tree.tables[tree.location(level)] == entry | set, "level \(level) low \(low) \(access)")
    }

    @Test func `each bit from 10 up is address, memory type or reserved`() {
        let tree = Tree(3)
        for memoryTypes in [false, true] {
            let walker = tree.walker(memoryTypes: memoryTypes)
            for level in 1...3 as ClosedRange<UInt8> {
                for leaf in [false, true] where leaf || level > 1 {
                    for bit in UInt64(10)..<64 {
                        tree.tables[tree.location(1)] = 0xdf
                        tree.tables[tree.location(level)] = (leaf ? 0xdf : tree.pointer(level)) ^ 1 << bit
                        let result = walker.walk(GuestAddress(0), .read)
                        switch bit {
                        case 54...60, 63: #expect(result.violation?.reason == .reservedBits, "bit \(bit)")
                        case 61...62:
                            let understood = leaf && memoryTypes
                            #expect((result.translation != nil) == understood, "bit \(bit)")
                            #expect(understood || result.violation?.reason == .reservedBits, "bit \(bit)")
                        case 22...53: #expect(result.misconfiguration?.reason == .noMemory || leaf, "bit \(bit)")
                        default: break
                        }
                        if leaf, bit < 10 + 9 * (UInt64(level) - 1) {
                            #expect(result.violation?.reason == .misaligned, "bit \(bit) is inside the page")
                        }
                        tree.tables[tree.location(level)] = level == 1 ? 0xdf : tree.pointer(level)
                    }
                }
            }
        }
    }

    @Test func `memory type 3 is none`() {
        let tree = Tree(3)
        tree.tables[tree.location(1)] = 0xdf | 3 << 61
        #expect(tree.walker(memoryTypes: true).walk(GuestAddress(0), .read).violation?.reason == .memoryType)
    }

    @Test(arguments: [(3, 41), (4, 50), (5, 59)] as [(UInt8, UInt64)])
    func `a mode translates its address bits and not one more`(levels: UInt8, bits: UInt64) {
        let tree = Tree(levels)
        let walker = tree.walker()
        #expect(walker.walk(GuestAddress(1 << bits), .read).violation?.reason == .addressWidth)
        #expect(walker.walk(GuestAddress(1 << 63), .read).violation?.reason == .addressWidth)
        // The last root entry, at the end of 16 KiB, as one large leaf.
        tree.tables[0x4000 + 8 * 0x7ff] = 0xdf
        #expect(walker.walk(GuestAddress((1 << bits) - 0x1000), .read).violation == nil)
    }

    @Test func `Bare and reserved modes translate nothing`() {
        let tree = Tree(3)
        for mode in (0..<16 as Range<UInt64>) where !(8...10).contains(mode) {
            let walker = GStageWalker(memory: tree.tables.memory, hgatp: mode << 60 | 4, hardwareAD: true)
            #expect(walker.walk(GuestAddress(0), .read).misconfiguration?.reason == .rootPointer)
        }
    }

    @Test func `a page outside physical memory is an access fault`() throws {
        let tree = Tree(3)
        tree.tables[tree.location(1)] = (Self.top >> 12) << 10 | 0xdf
        let causes: [(AccessKind, UInt64)] = [(.execute, 1), (.read, 5), (.write, 7)]
        for (access, cause) in causes {
            let fault = try #require(tree.walker().walk(GuestAddress(0x18), access).misconfiguration)
            #expect(tree.walker().trap(for: fault) == GStageTrap(cause: cause, htval: 0, stval: 0x18))
        }
    }
}
