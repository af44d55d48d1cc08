import Frames
import Hardware
import Testing

/// A mode of the guest's and a second stage.
struct TwoDimensionalCase: CustomTestStringConvertible {
    let mode: PagingMode
    let stage: TwoDimensionalFixture.Stage
    let levels: UInt8
    var testDescription: String { "\(mode) behind \(stage), \(levels) levels" }
    func make() -> TwoDimensionalFixture { TwoDimensionalFixture(mode, stage, levels: levels) }

    static let all: [TwoDimensionalCase] = PagingMode.translating.flatMap { mode in
        TwoDimensionalFixture.Stage.allCases.flatMap { stage in
            [4, 5].map { TwoDimensionalCase(mode: mode, stage: stage, levels: $0) }
        }
    }
}

@Suite struct X86_12_TwoDimensionalWalk {
    @Test(arguments: TwoDimensionalCase.all)
    func `each of the guest's tables costs a walk and a load, and the page a walk`(kind: TwoDimensionalCase) {
        let fixture = kind.make()
        let (result, count) = loads { fixture.walker().walk(0xab8, .read) }
        let page = result.translation
        #expect(page?.guest == GuestFrame(0xd) && page?.frame == HostFrame(0x80d))
        #expect(page?.rights == .all && page?.stageTwo == .all)
        #expect(count == fixture.guestLevels.count * (Int(kind.levels) + 1) + Int(kind.levels))
    }

    @Test(arguments: TwoDimensionalCase.all)
    func `a hole under a table or a page is told apart`(kind: TwoDimensionalCase) throws {
        let fixture = kind.make()
        for level in fixture.guestLevels {
            let frame = UInt64(level)
            fixture.tables[fixture.leaf(frame)] = 0
            let fault = try #require(fixture.walker().walk(0xab8, .read).stageTwo)
            fixture.tables[fixture.leaf(frame)] = fixture.cleanLeaf(frame)
            #expect(!fault.finalTranslation && fault.address == 0xab8)
            let violation = try #require(fault.result.violation)
            #expect(violation.address == GuestAddress(frame * 0x1000) && violation.reason == .absent)
            let expected: [TwoDimensionalFixture.Stage: UInt64] = [
                .ept: 0b11 | 1 << 7, .eptWithoutFlags: 0b1 | 1 << 7, .npt: 0b110 | 1 << 33,
            ]
            #expect(fixture.report(fault) == expected[kind.stage])
        }
        fixture.tables[fixture.leaf(0xd)] = 0
        let reports: [TwoDimensionalFixture.Stage: (AccessKind) -> UInt64] = [
            .ept: { 1 << UInt64($0.rawValue) | 3 << 7 }, .eptWithoutFlags: { 1 << UInt64($0.rawValue) | 3 << 7 },
            .npt: { [0b100, 0b110, 0b10100][Int($0.rawValue)] | 1 << 32 },
        ]
        for access in AccessKind.allCases {
            let fault = try #require(fixture.walker().walk(0xab8, LinearAccess(access)).stageTwo)
            #expect(fault.finalTranslation && fault.result.violation?.address == GuestAddress(0xdab8))
            #expect(fixture.report(fault) == reports[kind.stage]?(access))
        }
    }

    @Test(arguments: TwoDimensionalCase.all)
    func `the second stage keeps A of what is walked, and D of tables where they count as written`(
        kind: TwoDimensionalCase
    ) {
        for access in AccessKind.allCases {
            let fixture = kind.make()
            _ = fixture.walker().walk(0, LinearAccess(access))
            let (accessed, dirty) = fixture.flagBits
            let keepsFlags = kind.stage != .eptWithoutFlags
            for level in fixture.guestLevels {
                let expected = fixture.cleanLeaf(UInt64(level)) | (keepsFlags ? accessed | dirty : 0)
                #expect(fixture.tables[fixture.leaf(UInt64(level))] == expected)
            }
            let flags = !keepsFlags ? 0 : access == .write ? accessed | dirty : accessed
            #expect(fixture.tables[fixture.leaf(0xd)] == fixture.cleanLeaf(0xd) | flags)
            #expect(fixture.tables[fixture.leaf(0xe)] == fixture.cleanLeaf(0xe))
        }
    }

    @Test(arguments: TwoDimensionalCase.all)
    func `a table in read-only memory can be read only where nothing is written to it`(kind: TwoDimensionalCase) {
        let fixture = kind.make()
        for level in fixture.guestLevels {
            let frame = UInt64(level)
            let hasFlags = !(kind.mode == .pae && level == 3)
            fixture.tables[fixture.leaf(frame)] = fixture.cleanLeaf(frame) & ~2
            fixture.guest.restore()
            let complete = fixture.walker().walk(0, .write)
            if kind.stage.writesTables {
                #expect(complete.stageTwo?.result.violation?.access == .write)
                #expect(complete.stageTwo?.result.violation?.reason == .rights)
                #expect(complete.stageTwo?.finalTranslation == false)
            } else {
                #expect(complete.translation != nil, "A and D are set already")
                fixture.guest[level] &= ~0x60
                let refused = fixture.walker().walk(0, .read)
                #expect((refused.translation == nil) == hasFlags)
                #expect(refused.stageTwo?.result.violation?.access == .write)
                #expect(refused.stageTwo?.finalTranslation == false)
                #expect(fixture.guest[level] & 0x60 == 0)
            }
            fixture.tables[fixture.leaf(frame)] = fixture.cleanLeaf(frame)
        }
    }

    @Test(arguments: TwoDimensionalCase.all)
    func `the guest's flags are set before its page is looked for, and not when the guest itself refuses`(
        kind: TwoDimensionalCase
    ) {
        let fixture = kind.make()
        fixture.tables[fixture.leaf(0xd)] = 0
        fixture.guest[1] = 0xd007
        #expect(fixture.walker().walk(0, .write).stageTwo?.finalTranslation == true)
        #expect(fixture.guest[1] == 0xd067)
        fixture.guest[1] = 0xd005
        #expect(fixture.walker().walk(0, .write).pageFault?.errorCode == 0b111)
        #expect(fixture.guest[1] == 0xd005)
    }

    @Test(arguments: TwoDimensionalCase.all)
    func `a store needs both stages' right and both stages' D`(kind: TwoDimensionalCase) {
        let fixture = kind.make()
        fixture.guest[1] = 0xd027
        #expect(fixture.walker().walk(0, .read).translation?.dirty == false, "the guest's D is clear")
        fixture.guest[1] = 0xd067
        let read = fixture.walker().walk(0, .read).translation
        #expect(read?.dirty == (kind.stage == .eptWithoutFlags))
        #expect(fixture.walker().walk(0, .write).translation?.dirty == true)
        #expect(fixture.walker().walk(0, .read).translation?.dirty == true)
        fixture.tables[fixture.leaf(0xd)] = fixture.cleanLeaf(0xd) & ~2
        #expect(fixture.walker().walk(0, .write).stageTwo?.result.violation?.reason == .rights)
        #expect(fixture.walker().walk(0, .read).translation?.stageTwo.write == false)
    }

    @Test(arguments: TwoDimensionalCase.all)
    func `what one translation covers is the smaller of both leaves`(kind: TwoDimensionalCase) {
        let fixture = kind.make()
        let small = fixture.walker().walk(0xab8, .read).translation
        #expect(small?.bytes == 4096 && small?.leafBytes == 4096)
        fixture.guest[2] = 0xe7
        let cut = fixture.walker().walk(0x5008, .read).translation
        #expect(cut?.frame == HostFrame(0x805) && cut?.bytes == 4096)
        #expect(cut?.leafBytes == (kind.mode == .bits32 ? 4 << 20 : 2 << 20))
        let level2 = TwoDimensionalFixture.tables + 0x2000
        fixture.tables[level2] = TwoDimensionalFixture.base | (kind.stage.isEPT ? 0xb7 : 0x87)
        let both = fixture.walker().walk(0x5008, .read).translation
        #expect(both?.frame == HostFrame(0x805) && both?.bytes == 2 << 20)
        fixture.guest.restore()
        #expect(fixture.walker().walk(0x8, .read).translation?.bytes == 4096)
    }

    @Test(arguments: TwoDimensionalFixture.Stage.allCases)
    func `with the guest's paging off only the second stage counts`(stage: TwoDimensionalFixture.Stage) {
        let fixture = TwoDimensionalFixture(.bits32, stage)
        var registers = fixture.guest.registers()
        registers.cr0 = 0
        let (result, count) = loads { fixture.walker(registers).walk(0x5008, .write) }
        #expect(result.translation?.frame == HostFrame(0x805) && count == 4)
        #expect(result.translation?.dirty == true)
        #expect(fixture.walker(registers).walk(0x20_0000, .read).stageTwo?.finalTranslation == true)
    }

    @Test func `EPT loads PAE's pointers as reads, NPT reads them at each walk`() throws {
        for stage in TwoDimensionalFixture.Stage.allCases where stage.isEPT {
            let fixture = TwoDimensionalFixture(.pae, stage)
            #expect(
                fixture.walker().loadPageDirectoryPointers() == .loaded(PageDirectoryPointers(fixture.guest[3])))
            #expect(fixture.tables[fixture.leaf(3)] & 1 << 9 == 0, "no D")
            fixture.tables[fixture.leaf(3)] = 0
            guard case .stageTwo(let result) = fixture.walker().loadPageDirectoryPointers() else {
                Issue.record("no violation")
                continue
            }
            #expect(result.violation?.address == GuestAddress(0x3000) && result.violation?.access == .read)
        }
        let fixture = TwoDimensionalFixture(.pae, .npt)
        var registers = fixture.guest.registers()
        registers.pointers = PageDirectoryPointers()
        #expect(fixture.walker(registers).walk(0, .read).translation != nil)
        fixture.guest[3] |= 1 << 5
        #expect(fixture.walker(registers).walk(0, .read).pageFault?.errorCode == 0b1101)
    }

    /// The guest's root is one of the second stage's own tables, which the guest can reach because its hypervisor gave it.
    @Test func `a guest's table that is a table of the second stage ends like others`() {
        let fixture = TwoDimensionalFixture(.fourLevel, .eptWithoutFlags)
        fixture.tables[fixture.leaf(4)] = TwoDimensionalFixture.tables + 0x1000 | 0x37
        let (result, count) = loads { fixture.walker().walk(0, .write) }
        #expect(result != .nonCanonical && count <= 4 * 5 + 4 + 4)
    }
}
