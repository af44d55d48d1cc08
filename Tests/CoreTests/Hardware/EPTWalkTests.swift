import Audit
import Frames
import Hardware
import HostMemory
import Testing

/// One EPT of four levels with a path to each kind of leaf, written as KVM writes it (Spec: x86 1.4).
struct EPTFixture {
    let tables = RawTables()
    static let pointer: UInt64 = 0x1000 | 0x5e
    static let table: UInt64 = 0x8000_0000_0000_0907

    /// Where the entry of each level stands, for guest address 0: root, then down.
    static let rootEntry: UInt64 = 0x1000
    static let entry3: UInt64 = 0x2000
    static let entry2: UInt64 = 0x3000
    static let entry1: UInt64 = 0x4000

    init() {
        tables[Self.rootEntry] = Self.table | 0x2000
        tables[Self.entry3] = Self.table | 0x3000
        tables[Self.entry2] = Self.table | 0x4000
    }

    func walker(
        accessDirty: Bool = true, executeOnly: Bool = true, largestLeaf: PageLevel = .page1G, bits: Int = 46
    ) -> EPTWalker {
        EPTWalker(
            memory: tables.memory, pointer: accessDirty ? Self.pointer : Self.pointer & ~0x40,
            physicalAddressBits: bits, executeOnly: executeOnly, largestLeaf: largestLeaf, vcpu: 3)
    }

    /// The table under the entry at `level`; 0 at level 1.
    static func child(_ level: UInt8) -> UInt64 { [0, entry1, entry2, entry3][Int(level) - 1] }

    /// The entry's location at `level` on the path of guest address 0.
    static func location(_ level: UInt8) -> UInt64 { [entry1, entry2, entry3, rootEntry][Int(level) - 1] }
}

@Suite struct X86_1_1_EPTFormat {
    @Test func `the values that KVM writes translate`() throws {
        let ept = EPTFixture()
        ept.tables[EPTFixture.entry1 + 8 * 5] = 0x8600_0000_0000_0b77 | 0xabc000
        ept.tables[EPTFixture.entry2 + 8 * 1] = 0x8600_0000_0000_0bf7 | 0x600000
        let small = try #require(ept.walker().walk(GuestAddress(0x5018), .write).translation)
        #expect(
            small
                == Translation(
                    frame: HostFrame(0xabc), level: .page4K, readable: true, writable: true, executable: true,
                    dirty: true))
        let large = try #require(ept.walker().walk(GuestAddress(0x20_3018), .read).translation)
        #expect(
            large
                == Translation(
                    frame: HostFrame(0x603), level: .page2M, readable: true, writable: true, executable: true,
                    dirty: true))
    }

    @Test func `empty and frozen entries are violations, an MMIO entry is a misconfiguration`() throws {
        let ept = EPTFixture()
        for absent in [0x8000_0000_0000_0000, 0x8000_0000_0000_05a0, 0] as [UInt64] {
            ept.tables[EPTFixture.entry1] = absent
            let fault = try #require(ept.walker().walk(GuestAddress(0), .write).violation)
            #expect(fault.reason == .absent && fault.entry == absent && !fault.present && fault.level == .page4K)
            #expect(ept.walker().exitQualification(of: fault) == 0x182)
        }
        ept.tables[EPTFixture.entry1] = 0x0000_0000_dead_b00e  // GPA and generation 1 over 110
        let fault = try #require(ept.walker().walk(GuestAddress(0), .read).misconfiguration)
        #expect(fault.entry == 0xdead_b00e && fault.present && fault.reason == .encoding)
    }

    @Test func `every leaf and table pattern of the low bits does what the manual says`() {
        let ept = EPTFixture()
        for level in 1...4 as ClosedRange<UInt8> {
            for executeOnly in [false, true] {
                for low in 0..<(0x1000 as UInt64) {
                    for access in AccessKind.allCases {
                        check(ept, level: level, low: low, executeOnly: executeOnly, access)
                    }
                }
            }
            ept.tables[EPTFixture.location(level)] = EPTFixture.table | EPTFixture.child(level)
        }
    }

    /// Puts an entry with these low bits at `level` above an all-permitting rest, and compares with the manual's tables.
    private func check(
        _ ept: EPTFixture, level: UInt8, low: UInt64, executeOnly: Bool, _ access: AccessKind
    ) {
        // The lower table, or a page aligned for every leaf size: frame 0 serves as either.
        ept.tables[EPTFixture.entry1] = 0x8000_0000_0000_0b77 | 0xabc000
        let leaf = level == 1 || (level < 4 && low & 0x80 != 0)
        let next = leaf ? 0 : EPTFixture.child(level)
        ept.tables[EPTFixture.location(level)] = next | low
        let result = ept.walker(executeOnly: executeOnly).walk(GuestAddress(0), access)
        let after = ept.tables[EPTFixture.location(level)]

        let expected = EPTExpectation(level: level, low: low, leaf: leaf, executeOnly: executeOnly, access: access)
        #expect(expected.outcome == EPTExpectation.Outcome(result), "level \(level) low \(low) \(access)")
        #expect(after == next | expected.lowAfter, "level \(level) low \(low) \(access)")
        for above in (level + 1)..<5 where level < 4 {
            #expect(ept.tables[EPTFixture.location(above)] & 0xfff == 0x907)
        }
    }

    @Test func `each bit from 12 up is address, reserved or ignored`() {
        let ept = EPTFixture()
        for width in [36, 46, 52] {
            for level in 1...4 as ClosedRange<UInt8> {
                for leaf in [false, true] where leaf ? level < 4 : level > 1 {
                    let good =
                        leaf
                        ? (level == 1 ? 0x8000_0000_0000_0b77 : 0x8000_0000_0000_0bf7)
                        : EPTFixture.table | EPTFixture.child(level)
                    for bit in UInt64(12)..<64 {
                        ept.tables[EPTFixture.entry1] = 0x8000_0000_0000_0b77
                        ept.tables[EPTFixture.location(level)] = good ^ 1 << bit
                        let result = ept.walker(bits: width).walk(GuestAddress(0), .read)
                        let reason = result.misconfiguration?.reason
                        if bit >= 52 {
                            #expect(result.translation != nil, "bit \(bit) is ignored")
                        } else if bit >= width {
                            #expect(reason == .reservedBits, "bit \(bit) is beyond MAXPHYADDR \(width)")
                        } else if leaf, bit < 12 + 9 * (UInt64(level) - 1) {
                            #expect(reason == .misaligned, "bit \(bit) is inside a level \(level) page")
                        } else if bit >= 24 {
                            #expect(reason == .noMemory, "bit \(bit) leads outside the arena")
                        } else {
                            #expect(result.misconfiguration?.level.rawValue != level, "bit \(bit) is address")
                        }
                    }
                    ept.tables[EPTFixture.location(level)] =
                        EPTFixture.table | EPTFixture.child(level)
                }
            }
        }
    }

    @Test func `without the capability bit 7 of a directory entry is reserved`() {
        let ept = EPTFixture()
        ept.tables[EPTFixture.entry3] = 0x8000_0000_0000_0bf7
        #expect(ept.walker().walk(GuestAddress(0x1000), .read).translation?.level == .page1G)
        #expect(
            ept.walker(largestLeaf: .page2M).walk(GuestAddress(0x1000), .read).misconfiguration?.reason == .reservedBits
        )
    }

    @Test func `rights are those that all entries give`() throws {
        let ept = EPTFixture()
        ept.tables[EPTFixture.entry1] = 0x8000_0000_0000_0b77 | 0xabc000
        for level in 2...4 as ClosedRange<UInt8> {
            let table = ept.tables[EPTFixture.location(level)]
            ept.tables[EPTFixture.location(level)] = table & ~2
            let fault = try #require(ept.walker().walk(GuestAddress(0x10), .write).violation)
            #expect(fault.reason == .rights && fault.level == .page4K && fault.present)
            #expect(ept.walker().exitQualification(of: fault) == 0x1aa)
            #expect(ept.walker().walk(GuestAddress(0x10), .read).translation?.writable == false)
            ept.tables[EPTFixture.location(level)] = table
        }
    }

    @Test func `exit qualifications name the access, the rights and the kind of translation`() throws {
        let ept = EPTFixture()
        ept.tables[EPTFixture.entry1] = 0x8000_0000_0000_0b75  // read, execute
        let write = try #require(ept.walker().walk(GuestAddress(0), .write).violation)
        #expect(ept.walker().exitQualification(of: write) == 0x1aa)
        #expect(ept.walker().exitQualification(of: write, finalTranslation: false) == 0xab)
        #expect(ept.walker().exitQualification(of: write, linearAddress: false) == 0x2a)
        ept.tables[EPTFixture.entry1] = 0x8000_0000_0000_0b74  // execute
        let read = try #require(ept.walker().walk(GuestAddress(0), .read).violation)
        #expect(ept.walker().exitQualification(of: read) == 0x1a1)
        ept.tables[EPTFixture.entry1] = 0x8000_0000_0000_0b73  // read, write
        let fetch = try #require(ept.walker().walk(GuestAddress(0), .execute).violation)
        #expect(ept.walker().exitQualification(of: fetch) == 0x19c)
    }

    @Test func `a bad root pointer or too wide an address faults before any entry`() {
        let ept = EPTFixture()
        let good = EPTFixture.pointer
        for bad in [good ^ 0x1, good ^ 0x8, good | 0x80, good | 0x800, good | 1 << 46, good | 1 << 63] {
            let walker = EPTWalker(memory: ept.tables.memory, pointer: bad)
            #expect(walker.walk(GuestAddress(0), .read).misconfiguration?.reason == .rootPointer)
        }
        #expect(ept.walker().walk(GuestAddress(1 << 48), .read).violation?.reason == .addressWidth)
        #expect(ept.walker().walk(GuestAddress(1 << 47), .read).violation?.reason == .absent)
        let beyond = EPTWalker(memory: ept.tables.memory, pointer: 0x100_0000 | 0x5e)
        #expect(beyond.walk(GuestAddress(0), .read).misconfiguration?.reason == .noMemory)
    }

    @Test func `five levels translate 57 bits`() throws {
        let ept = EPTFixture()
        ept.tables[0x5000 + 8 * 0x101] = EPTFixture.table | 0x1000
        ept.tables[EPTFixture.entry1 + 8] = 0x8000_0000_0000_0b77 | 0xabc000
        let walker = EPTWalker(memory: ept.tables.memory, pointer: 0x5000 | 0x66)
        #expect(walker.walk(GuestAddress(0x101 << 48 | 0x1000), .read).translation?.frame == HostFrame(0xabc))
        #expect(walker.walk(GuestAddress(1 << 57), .read).violation?.reason == .addressWidth)
    }
}

/// The manual's tables (Spec: x86 1.1), spelled as lists, to compare the walker with.
struct EPTExpectation {
    enum Outcome: Equatable {
        case translated, violation, misconfiguration, logFull
        init(_ result: WalkResult) {
            switch result {
            case .translated: self = .translated
            case .violation: self = .violation
            case .misconfiguration: self = .misconfiguration
            case .modificationLogFull: self = .logFull
            }
        }
    }
    let outcome: Outcome
    /// The entry's low 12 bits after the walk.
    let lowAfter: UInt64

    /// By XWR, bits 2:0: what is permitted; nil where the combination is illegal.
    static let permitted: [String?] = ["", "r", nil, "rw", "x", "rx", nil, "rwx"]
    /// UC, WC, WT, WP, WB.
    static let memoryTypes: Set<UInt64> = [0, 1, 4, 5, 6]

    init(level: UInt8, low: UInt64, leaf: Bool, executeOnly: Bool, access: AccessKind) {
        let xwr = Int(low & 7)
        let letter: Character = access == .read ? "r" : access == .write ? "w" : "x"
        let legal = Self.permitted[xwr] != nil && (xwr != 4 || executeOnly)
        let reservedClear =
            leaf ? Self.memoryTypes.contains(low >> 3 & 7) : (low >> 3 & 0xf == 0 && (level < 4 || low & 0x80 == 0))
        if xwr == 0 {
            outcome = .violation
            lowAfter = low
        } else if !legal || !reservedClear {
            outcome = .misconfiguration
            lowAfter = low
        } else if Self.permitted[xwr]!.contains(letter) {
            outcome = .translated
            lowAfter = low | 0x100 | (leaf && access == .write ? 0x200 : 0)
        } else {
            outcome = .violation
            // The walk went through a table's entry, and A says so; a refused leaf was not used.
            lowAfter = leaf ? low : low | 0x100
        }
    }
}
