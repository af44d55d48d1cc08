import Frames
import Hardware
import Testing

@Suite struct X86_4_6_AccessedDirty {
    /// Clears A and D everywhere; the pointers of PAE have none.
    private func clear(_ fixture: LegacyFixture) {
        fixture.restore()
        for level in 1...fixture.top { fixture[level] &= ~0x60 }
    }

    private func flags(_ fixture: LegacyFixture) -> [UInt64] { (1...fixture.top).map { fixture[$0] & 0x60 } }

    private func hasFlags(_ mode: PagingMode, _ level: UInt8) -> Bool { !(mode == .pae && level == 3) }

    @Test(arguments: PagingMode.translating)
    func `A is set on every level and D in the leaf of a store`(mode: PagingMode) {
        let fixture = LegacyFixture(mode)
        for (access, leaf) in [(LinearAccess.read, 0x20), (.execute, 0x20), (.write, 0x60)] as [(LinearAccess, UInt64)]
        {
            clear(fixture)
            let result = fixture.walker().walk(0, access)
            #expect(result.translation?.dirty == (access == .write))
            #expect(flags(fixture) == (1...fixture.top).map { $0 == 1 ? leaf : hasFlags(mode, $0) ? 0x20 : 0 })
        }
        // D stays, and a later read's translation lets stores through.
        #expect(fixture.walker().walk(0, .read).translation?.dirty == true)
    }

    /// Only the half that is the entry changes.
    @Test func `a 4-byte entry's flags leave its neighbour alone`() {
        let fixture = LegacyFixture(.bits32)
        for index in 0..<2 as Range<UInt64> {
            fixture.tables[0x1000] = 0xd007 << 32 | 0xd007
            _ = fixture.walker().walk(index << 12, .write)
            #expect(fixture.tables[0x1000] == (index == 0 ? 0xd007 << 32 | 0xd067 : 0xd067 << 32 | 0xd007))
        }
    }

    @Test(arguments: PagingMode.translating)
    func `a walk that fails sets A on the way and nothing where it fails`(mode: PagingMode) {
        let fixture = LegacyFixture(mode)
        for level in 1...fixture.top where hasFlags(mode, level) {
            clear(fixture)
            let absent = fixture[level] & ~1
            fixture[level] = absent
            #expect(fixture.walker().walk(0, .write).pageFault?.level.rawValue == level)
            #expect(fixture[level] == absent)
            for other in 1...fixture.top where other != level {
                #expect(fixture[other] & 0x60 == (other > level && hasFlags(mode, other) ? 0x20 : 0))
            }
        }
        clear(fixture)
        fixture[1] &= ~2
        #expect(fixture.walker().walk(0, .write).pageFault?.errorCode == 0b111)
        #expect(fixture[1] & 0x60 == 0, "a refused leaf was not used")
    }

    @Test func `with CR0.WP clear a supervisor's store makes a read-only page dirty`() {
        let fixture = LegacyFixture(.fourLevel)
        clear(fixture)
        fixture[1] &= ~2
        var registers = fixture.registers(cpl: 0)
        #expect(fixture.walker(registers).walk(0, .write).pageFault?.errorCode == 0b011)
        registers.cr0 &= ~(1 << 16)
        #expect(fixture.walker(registers).walk(0, .write).translation?.dirty == true)
        #expect(fixture[1] & 0x60 == 0x60)
    }

    /// Another processor changes an entry at each point of the walk in turn.
    @Test(arguments: PagingMode.translating)
    func `flags go only into the entry that was judged`(mode: PagingMode) {
        let fixture = LegacyFixture(mode)
        clear(fixture)
        let points = withHook({ _ in }, { fixture.walker().walk(0, .write) }).points
        #expect(points >= 4)
        for level in 1...fixture.top where hasFlags(mode, level) {
            for at in 0..<points {
                clear(fixture)
                let registers = fixture.registers()
                let vanish = { (number: Int) in if number == at { fixture[level] = 0 } }
                let (result, seen) = withHook(vanish) { fixture.walker(registers).walk(0, .write) }
                guard seen > at else { continue }
                // Whoever comes after the change sees it; what was done before it is done.
                if result.translation == nil {
                    #expect(fixture[level] == 0 && result.pageFault?.level.rawValue == level)
                } else {
                    #expect(level > 1, "the leaf is the last to be read, and its flags are the last point")
                    #expect(fixture[level] == 0)
                }
            }
        }
    }

    /// A neighbour that changes all the time must not send the walk back to the start.
    @Test func `a change of a 4-byte entry's neighbour is no change of the entry`() {
        let fixture = LegacyFixture(.bits32)
        clear(fixture)
        fixture.tables[0x1000] = 0xd007
        var changes = 0
        let task = TestTask { _, _ in
            guard changes < 6 else { return }
            changes += 1
            fixture.tables[0x1000] = fixture.tables[0x1000] & 0xffff_ffff | UInt64(changes) << 32
        }
        let (result, _) = task.run { fixture.walker().walk(0, .write) }
        #expect(result.translation?.dirty == true)
        #expect(fixture.tables[0x1000] == 6 << 32 | 0xd067)
    }

    @Test func `the journal has what hardware sets, without a guest frame where there is none`() {
        let fixture = LegacyFixture(.fourLevel)
        clear(fixture)
        _ = fixture.walker().walk(0, .write)
        #expect(fixture.tables.journal.events.map(\.kind) == [.hardwareAccessed, .hardwareDirty])
        #expect(fixture.tables.journal.events.allSatisfy { $0.guest == .max && $0.frame == 0xd && $0.level == 1 })
        clear(fixture)
        _ = fixture.nested().walk(GuestAddress(0x123), .write)
        #expect(fixture.tables.journal.events.last?.guest == 0)
    }
}
