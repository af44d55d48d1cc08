import Frames
import Hardware
import HostMemory
import Synchrony
import Testing

/// Entries read during `body`: scheduling points of that kind.
func loads<R>(during body: () -> R) -> (result: R, loads: Int) {
    var count = 0
    let task = TestTask { operation, _ in
        if operation == SchedulingPoint.entryRead.rawValue { count += 1 }
    }
    let result = task.run(body).result
    return (result, count)
}

@Suite struct X86_1_2_LegacyWalk {
    @Test(arguments: PagingMode.translating)
    func `a walk reads one entry of each level and finds the page`(mode: PagingMode) throws {
        let fixture = LegacyFixture(mode)
        let (result, count) = loads { fixture.walker().walk(0xabc, .write) }
        #expect(count == (mode == .pae ? 2 : Int(fixture.top)), "PAE's pointers are in registers")
        let page = try #require(result.translation)
        #expect(page.frame == HostFrame(0xd) && page.guest == GuestFrame(0xd) && page.level == .page4K)
        #expect(page.bytes == 4096 && page.leafBytes == 4096 && page.dirty && page.stageTwo == .all)
        #expect(page.rights == .all)
    }

    /// Every bit of the address below the translated width picks another entry of one level.
    @Test(arguments: PagingMode.translating)
    func `each address bit belongs to the index of its level`(mode: PagingMode) {
        let fixture = LegacyFixture(mode)
        let levels: [UInt8: Range<UInt64>] =
            mode == .bits32
            ? [1: 12..<22, 2: 22..<32]
            : [1: 12..<21, 2: 21..<30, 3: 30..<(mode == .pae ? 32 : 39), 4: 39..<48, 5: 48..<57]
        for level in 1...fixture.top {
            guard let bits = levels[level] else { continue }
            for bit in bits {
                fixture.restore()
                let index: UInt64 = 1 << (bit - bits.lowerBound)
                fixture.set(fixture[level], at: fixture.location(level) + index * (mode == .bits32 ? 4 : 8))
                fixture[level] = 0
                var registers = fixture.registers()
                if mode == .pae, level == 3 {
                    registers.pointers =
                        index == 1 ? PageDirectoryPointers(0, 0x2001) : PageDirectoryPointers(0, 0, 0x2001)
                } else if mode == .pae {
                    registers.pointers = PageDirectoryPointers(0x2001)
                }
                var address: UInt64 = 1 << bit
                if mode.isLong, bit == 11 + 9 * UInt64(fixture.top) { address = ~0 << bit as UInt64 }
                #expect(fixture.walker(registers).walk(address, .read).translation?.frame == HostFrame(0xd), "\(bit)")
                #expect(fixture.walker(registers).walk(0, .read).pageFault?.level.rawValue == level)
                fixture.set(0, at: fixture.location(level) + index * (mode == .bits32 ? 4 : 8))
            }
        }
    }

    @Test(arguments: [PagingMode.fourLevel, .fiveLevel])
    func `an address is canonical if the bits above the tables' repeat their highest`(mode: PagingMode) {
        let fixture = LegacyFixture(mode)
        let highest = 11 + 9 * UInt64(fixture.top)
        for start in [0, ~0 << highest] as [UInt64] {
            #expect(fixture.walker().walk(start, .read) != .nonCanonical)
            for bit in 0..<64 as Range<UInt64> {
                let isCanonical = fixture.walker().walk(start ^ 1 << bit, .read) != .nonCanonical
                #expect(isCanonical == (bit < highest), "bit \(bit)")
            }
        }
    }

    @Test(arguments: [PagingMode.off, .bits32, .pae])
    func `outside of IA-32e mode an address has 32 bits`(mode: PagingMode) {
        let fixture = LegacyFixture(mode == .off ? .bits32 : mode)
        var registers = fixture.registers()
        if mode == .off { registers.cr0 = 0 }
        let page = fixture.walker(registers).walk(0x1234_5678_0000_0123, .write)
        #expect(page == fixture.walker(registers).walk(0x123, .write) && page.translation != nil)
    }

    @Test func `with paging off linear addresses are physical ones with all rights`() {
        let fixture = LegacyFixture(.bits32)
        var registers = fixture.registers()
        registers.cr0 &= ~(1 << 31)
        let (result, count) = loads { fixture.walker(registers).walk(0xab_c123, .execute) }
        #expect(result.translation?.frame == HostFrame(0xabc) && count == 0)
        #expect(fixture.walker(registers).walk(0x100_0000, .read) == .outside(0x100_0000))
    }

    @Test(arguments: PagingMode.translating)
    func `large leaves keep the address's lower bits`(mode: PagingMode) {
        let fixture = LegacyFixture(mode)
        fixture[2] = 0x80_0000 | 0xe7
        let bytes: UInt64 = mode == .bits32 ? 4 << 20 : 2 << 20
        let page = fixture.walker().walk(bytes - 8, .read).translation
        #expect(page?.frame == HostFrame((0x80_0000 + bytes) / 4096 - 1) && page?.level == .page2M)
        #expect(page?.leafBytes == bytes && page?.bytes == bytes)
        guard mode.isLong else { return }
        fixture[3] = 0xe7
        #expect(fixture.walker().walk(0xab_c000, .read).translation?.frame == HostFrame(0xabc))
        #expect(fixture.walker().walk(0xab_c000, .read).translation?.leafBytes == 1 << 30)
    }

    // MARK: Hostile tables

    /// Every entry of a table points to the table itself.
    @Test(arguments: PagingMode.translating)
    func `a table that points to itself ends after all levels`(mode: PagingMode) {
        let fixture = LegacyFixture(mode)
        let table: UInt64 = 0x6000
        for i in 0..<512 as Range<UInt64> {
            fixture.tables[table + 8 * i] =
                mode == .bits32 ? 0x6007 << 32 | 0x6007 : mode == .pae ? 0x6001 : 0x6007
        }
        var registers = fixture.registers(cpl: 0)
        registers.cr3 = table
        registers.pointers = PageDirectoryPointers(0x6001, 0x6001, 0x6001, 0x6001)
        for address in [0, 0x1234_5678, 0x7fff_ffff] as [UInt64] {
            let (result, count) = loads { fixture.walker(registers).walk(address, .read) }
            #expect(result.translation?.frame == HostFrame(6))
            #expect(count == (mode == .pae ? 2 : Int(fixture.top)))
        }
    }

    @Test(arguments: PagingMode.translating)
    func `tables and pages outside of memory are told, and no bit is set for a page outside`(mode: PagingMode) {
        let fixture = LegacyFixture(mode)
        for level in 1...fixture.top {
            fixture.restore()
            let clean: UInt64 = mode == .pae && level == 3 ? 1 : 7
            fixture[level] = 0x100_0000 | clean
            #expect(fixture.walker().walk(0x8, .write) == .outside(0x100_0000 + (level == 1 ? 8 : 0)))
            if level == 1 { #expect(fixture[1] == 0x100_0007) }
            fixture[level] = 0xff_f000 | clean
            #expect(fixture.walker().walk(0x8, .write) != .outside(0x100_0000), "device memory's last frame")
        }
        guard mode != .pae else { return }
        var registers = fixture.registers()
        registers.cr3 = 0x100_0000
        #expect(fixture.walker(registers).walk(0, .read) == .outside(0x100_0000))
    }

    @Test(arguments: PagingMode.translating)
    func `tables in device memory are tables like others`(mode: PagingMode) {
        let fixture = LegacyFixture(mode)
        let device: UInt64 = 0x80_0000
        for level in 1...fixture.top {
            let next = level == 1 ? LegacyFixture.page : device + UInt64(level - 1) * 0x1000
            let flags: UInt64 = mode == .pae && level == 3 ? 1 : 7
            fixture.set(next | flags, at: device + UInt64(level) * 0x1000)
        }
        var registers = fixture.registers()
        registers.cr3 += device
        if case .loaded(let pointers) = fixture.walker(registers).loadPageDirectoryPointers() {
            registers.pointers = pointers
        }
        #expect(fixture.walker(registers).walk(0, .write).translation?.frame == HostFrame(0xd))
        #expect(fixture.entry(at: device + 0x1000) == LegacyFixture.page | LegacyFixture.leaf)
    }
}
