import Frames
import Hardware
import Testing

/// What the manual says about one bit of a present entry, one sentence a line (Intel SDM volume 3, tables 4-3 to 4-20; AMD
/// APM volume 2, figures 5-8 to 5-25).
private struct ManualBit {
    let mode: PagingMode
    let level: UInt8
    /// Whether the entry maps a page of more than 4 KiB.
    let large: Bool
    let processor: PagingProcessor
    let noExecute: Bool

    func isReserved(_ bit: Int) -> Bool {
        let width = processor.physicalAddressBits
        switch (mode, level, large) {
        case (.bits32, 2, true):
            // "bits (M-20):13: bits (M-1):32 of the physical address; bits 21:(M-19): reserved", M at most 40.
            let m = min(width, 40)
            return bit >= m - 19 && bit <= 21
        case (.bits32, _, _): return false
        case (.pae, 3, _):
            // "2:1 reserved, 8:5 reserved, 63:M reserved".
            return [1, 2, 5, 6, 7, 8].contains(bit) || bit >= width
        case (.pae, _, _):
            // "62:M reserved; 63: if IA32_EFER.NXE = 0, reserved; 20:13 of a 2-MByte page reserved".
            if bit == 63 { return !noExecute }
            if bit >= width { return true }
            return large && (13...20).contains(bit)
        default: return isReservedInLongMode(bit)
        }
    }

    private func isReservedInLongMode(_ bit: Int) -> Bool {
        if bit == 63 { return !noExecute }
        if bit >= 52 { return false }
        if bit >= processor.physicalAddressBits { return true }
        switch level {
        case 5, 4: return bit == 7 || (processor.isAMD && bit == 8)
        case 3 where large: return !processor.gigabytePages && bit == 7 || (13...29).contains(bit)
        case 2 where large: return (13...20).contains(bit)
        default: return false
        }
    }
}

@Suite struct X86_1_2_ReservedBits {
    static let processors: [PagingProcessor] = [32, 36, 39, 40, 46, 52].flatMap { width in
        [(true, false), (false, false), (true, true)].map {
            PagingProcessor(physicalAddressBits: width, gigabytePages: $0.0, isAMD: $0.1)
        }
    }

    @Test(arguments: PagingMode.translating)
    func `each bit of each entry is reserved where the manual says so`(mode: PagingMode) {
        let fixture = LegacyFixture(mode)
        for processor in Self.processors {
            for noExecute in [false, true] {
                for level in 1...fixture.top {
                    for bit in 1..<(fixture.isNarrow ? 32 : 64) {
                        check(fixture, processor, noExecute, level, bit)
                    }
                }
            }
        }
    }

    /// The bit alone, in a table's entry and in a large leaf, on an otherwise good path.
    private func check(
        _ fixture: LegacyFixture, _ processor: PagingProcessor, _ noExecute: Bool, _ level: UInt8, _ bit: Int
    ) {
        let canBeLarge = level == 2 || (level == 3 && fixture.mode.isLong && processor.gigabytePages)
        for large in canBeLarge ? [false, true] : [false] {
            fixture.restore()
            let clean: UInt64 = large ? LegacyFixture.leaf | 0x80 : fixture[level]
            let entry = clean ^ 1 << UInt64(bit)
            fixture[level] = entry
            // Bit 7 itself turns a table's entry into a leaf, and a leaf into a table's.
            let isLarge = canBeLarge ? entry & 0x80 != 0 : false
            let manual = ManualBit(
                mode: fixture.mode, level: level, large: isLarge, processor: processor, noExecute: noExecute)
            let expected =
                (1..<64).contains { entry >> UInt64($0) & 1 != 0 && manual.isReserved($0) }
                || (level == 3 && fixture.mode.isLong && !processor.gigabytePages && bit == 7)
            let walker = fixture.walker(fixture.registers(noExecute: noExecute, cpl: 0), processor: processor)
            let fault = walker.walk(0, .read).pageFault
            let found = fault?.reason == .reservedBits && fault?.level.rawValue == level
            if found != expected {
                Issue.record("level \(level) large \(large) bit \(bit) \(processor) NX \(noExecute): \(found)")
            }
            if found, fault?.errorCode != 0b1001 || fault?.entry != entry {
                Issue.record("level \(level) bit \(bit): \(String(describing: fault))")
            }
        }
    }

    @Test(arguments: PagingMode.translating)
    func `an entry that is not present has no reserved bits`(mode: PagingMode) {
        let fixture = LegacyFixture(mode)
        for level in 1...fixture.top {
            fixture.restore()
            fixture[level] = ~1
            let fault = fixture.walker(fixture.registers(cpl: 0)).walk(0, .write).pageFault
            #expect(fault?.reason == .absent && fault?.level.rawValue == level && fault?.errorCode == 0b10)
        }
    }

    @Test func `with CR4.PSE clear bit 7 of a 32-bit directory entry is ignored, and so are all others`() {
        let fixture = LegacyFixture(.bits32)
        var registers = fixture.registers()
        registers.cr4 &= ~(1 << 4)
        for bit in 13...21 as ClosedRange<UInt64> {
            let table: UInt64 = 0x40_0000 | 1 << bit
            fixture[2] = table | LegacyFixture.table | 0x80
            fixture.set(LegacyFixture.page | LegacyFixture.leaf, at: table)
            #expect(fixture.walker(registers).walk(0, .read).translation?.frame == HostFrame(0xd))
            let isReserved = fixture.walker(processor: PagingProcessor(physicalAddressBits: 32)).walk(0, .read)
            #expect(isReserved.pageFault?.reason == .reservedBits, "bit \(bit)")
        }
    }

    /// PSE-36: each bit of 20:13 up to MAXPHYADDR is one of 39:32.
    @Test func `a 4 MiB page has up to 40 address bits`() {
        let fixture = LegacyFixture(.bits32)
        for width in 33...52 {
            let processor = PagingProcessor(physicalAddressBits: width)
            for bit in 32..<min(width, 40) {
                fixture[2] = 0x80_0000 | 1 << UInt64(bit - 19) | 0xe7
                let result = fixture.walker(processor: processor).walk(0x12_3450, .read)
                #expect(result == .outside(1 << UInt64(bit) | 0x80_0000 | 0x12_3450))
            }
        }
        fixture[2] = 0x80_0000 | 1 << 12 | 0xe7
        let page = fixture.walker().walk(0x32_3450, .read).translation
        #expect(page?.frame == HostFrame(0xb23), "bit 12 is PAT")
        #expect(page?.leafBytes == 4 << 20 && page?.level == .page2M)
    }

    @Test func `loading the pointers of PAE refuses reserved bits in those that are present`() {
        let fixture = LegacyFixture(.pae)
        for width in [32, 36, 46, 52] {
            let walker = fixture.walker(processor: PagingProcessor(physicalAddressBits: width))
            for index in 0..<4 as Range<UInt64> {
                for bit in 0..<64 as Range<UInt64> {
                    for other in 0..<4 as Range<UInt64> { fixture.tables[0x3000 + 8 * other] = 0x2001 }
                    fixture.tables[0x3000 + 8 * index] = 0x2001 ^ 1 << bit
                    let reserved = [1, 2, 5, 6, 7, 8].contains(bit) || bit >= width
                    let load = walker.loadPageDirectoryPointers()
                    #expect((load == .generalProtection) == reserved, "pointer \(index) bit \(bit) width \(width)")
                    if case .loaded(let pointers) = load {
                        #expect(pointers[Int(index)] == 0x2001 ^ 1 << bit)
                    }
                }
            }
        }
        for other in 0..<4 as Range<UInt64> { fixture.tables[0x3000 + 8 * other] = 0x2001 }
        fixture.tables[0x3000] = ~1
        guard case .loaded(let pointers) = fixture.walker().loadPageDirectoryPointers() else {
            Issue.record("an absent pointer has no reserved bits")
            return
        }
        #expect(pointers[0] == ~1 && pointers[1] == 0x2001)
        var registers = fixture.registers()
        registers.cr3 = 0x100_0020
        #expect(fixture.walker(registers).loadPageDirectoryPointers() == .outside(0x100_0020))
        registers.cr3 = 0x301f | 0xdead << 32
        #expect(fixture.walker(registers).loadPageDirectoryPointers() == .loaded(pointers), "CR3 31:5")
    }
}
