import Audit
import Frames
import Hardware
import HostMemory
import Testing

/// A leaf of one format behind a walker that sets A and D, for guest address 0.
struct LeafUnderTest {
    let tables: RawTables
    let stage: StageTwo
    let location: UInt64
    /// Present, all rights, A and D clear; maps frame 13.
    let clean: UInt64
    let writable: UInt64
    let accessed: UInt64
    let dirty: UInt64

    static func ept(accessDirty: Bool = true) -> LeafUnderTest {
        let fixture = EPTFixture()
        return LeafUnderTest(
            tables: fixture.tables, stage: .ept(fixture.walker(accessDirty: accessDirty)),
            location: EPTFixture.entry1, clean: 0x8600_0000_0000_0877 | 0xd000, writable: 2, accessed: 1 << 8,
            dirty: 1 << 9)
    }

    static func gStage() -> LeafUnderTest {
        let tree = Arches_2_1_GStageFormat.Tree(3)
        return LeafUnderTest(
            tables: tree.tables, stage: .gStage(tree.walker()), location: tree.location(1),
            clean: 0xd << 10 | 0x1f, writable: 4, accessed: 1 << 6, dirty: 1 << 7)
    }

    static func npt() -> LeafUnderTest {
        let fixture = LegacyFixture(.fourLevel)
        return LeafUnderTest(
            tables: fixture.tables, stage: .npt(fixture.nested()), location: fixture.location(1), clean: 0xd007,
            writable: 2, accessed: 1 << 5, dirty: 1 << 6)
    }

    enum Format: CaseIterable { case ept, gStage, npt }
    static func make(_ format: Format) -> LeafUnderTest {
        switch format {
        case .ept: ept()
        case .gStage: gStage()
        case .npt: npt()
        }
    }

    var entry: UInt64 {
        get { tables[location] }
        nonmutating set { tables[location] = newValue }
    }
}

@Suite struct HardwareAccessedDirty {
    @Test(arguments: LeafUnderTest.Format.allCases)
    func `a read sets A, a write sets A and D, and the journal has each once`(format: LeafUnderTest.Format) {
        let leaf = LeafUnderTest.make(format)
        leaf.entry = leaf.clean
        #expect(leaf.stage.walk(GuestAddress(8), .read).translation?.dirty == false)
        #expect(leaf.entry == leaf.clean | leaf.accessed)
        #expect(leaf.stage.walk(GuestAddress(8), .write).translation?.dirty == true)
        #expect(leaf.entry == leaf.clean | leaf.accessed | leaf.dirty)
        #expect(leaf.stage.walk(GuestAddress(8), .write).translation?.dirty == true)
        let events = leaf.tables.journal.events
        #expect(events.map(\.kind) == [.hardwareAccessed, .hardwareDirty])
        #expect(events.allSatisfy { $0.frame == 13 && $0.guest == 0 && $0.level == 1 })
        #expect(events.last?.value == leaf.entry && events.last?.extra == leaf.clean | leaf.accessed)
    }

    @Test func `with EPTP bit 6 clear nothing is set and every store may go on`() {
        let leaf = LeafUnderTest.ept(accessDirty: false)
        leaf.tables[EPTFixture.rootEntry] &= ~0x100
        leaf.entry = leaf.clean
        #expect(leaf.stage.walk(GuestAddress(0), .write).translation?.dirty == true)
        #expect(leaf.entry == leaf.clean && leaf.tables[EPTFixture.rootEntry] & 0x100 == 0)
    }

    @Test func `EPT tables get A on the way, also when the walk then fails`() {
        let leaf = LeafUnderTest.ept()
        for table in [EPTFixture.rootEntry, EPTFixture.entry3, EPTFixture.entry2] { leaf.tables[table] &= ~0x100 }
        leaf.entry = 0
        #expect(leaf.stage.walk(GuestAddress(0), .read).violation?.level == .page4K)
        for table in [EPTFixture.rootEntry, EPTFixture.entry3, EPTFixture.entry2] {
            #expect(leaf.tables[table] & 0xfff == 0x907)
        }
    }

    /// Another CPU clears W (dirty logging) at each point of a store's walk in turn. Whoever comes first wins; D never
    /// appears in an entry that was already read-only.
    @Test(arguments: LeafUnderTest.Format.allCases)
    func `D is never set in an entry whose W was just cleared`(format: LeafUnderTest.Format) throws {
        let leaf = LeafUnderTest.make(format)
        leaf.entry = leaf.clean
        let points = withHook({ _ in }, { leaf.stage.walk(GuestAddress(0), .write) }).points
        #expect(points >= 4, "three or four entries are read and one is written")
        for at in 0..<points {
            leaf.entry = leaf.clean
            let clear = { (number: Int) in if number == at { leaf.entry &= ~leaf.writable } }
            let result = withHook(clear) { leaf.stage.walk(GuestAddress(0), .write) }.result
            let fault = try #require(result.violation, "W was cleared before point \(at)")
            #expect(fault.reason == .rights)
            #expect(leaf.entry & leaf.dirty == 0 && leaf.entry & leaf.writable == 0)
        }
    }

    /// A zap between the read of the leaf and the update must not be undone by it.
    @Test(arguments: LeafUnderTest.Format.allCases)
    func `A is never set in an entry that was just zapped`(format: LeafUnderTest.Format) throws {
        let leaf = LeafUnderTest.make(format)
        leaf.entry = leaf.clean
        let points = withHook({ _ in }, { leaf.stage.walk(GuestAddress(0), .read) }).points
        for at in 0..<points {
            leaf.entry = leaf.clean
            let result = withHook({ if $0 == at { leaf.entry = 0 } }, { leaf.stage.walk(GuestAddress(0), .read) })
            #expect(result.result.violation?.reason == .absent)
            #expect(leaf.entry == 0)
        }
    }

    /// The update lands in the entry of the page that was judged, not of one put there meanwhile.
    @Test(arguments: LeafUnderTest.Format.allCases)
    func `a leaf that changes its frame under the walk is walked again`(format: LeafUnderTest.Format) {
        let leaf = LeafUnderTest.make(format)
        let other = leaf.clean + (format == .gStage ? 0x400 : 0x1000)
        leaf.entry = leaf.clean
        let points = withHook({ _ in }, { leaf.stage.walk(GuestAddress(0), .write) }).points
        for at in 0..<points {
            leaf.entry = leaf.clean
            let result = withHook({ if $0 == at { leaf.entry = other } }, { leaf.stage.walk(GuestAddress(0), .write) })
            #expect(result.result.translation?.frame == HostFrame(14))
            #expect(leaf.entry == other | leaf.accessed | leaf.dirty)
        }
    }

    /// A table's entry that is replaced while its A goes in: the walk must not follow the old pointer.
    @Test func `an EPT table that is unlinked under the walk is not followed once A has failed`() {
        let leaf = LeafUnderTest.ept()
        leaf.entry = leaf.clean
        leaf.tables[EPTFixture.entry2] &= ~0x100
        // Points: root, level 3, level 2 read, level 2's A.
        let unlink = { (number: Int) in if number == 3 { leaf.tables[EPTFixture.entry2] = 0 } }
        let result = withHook(unlink) { leaf.stage.walk(GuestAddress(0), .read) }.result
        #expect(result.violation?.level == .page2M)
        #expect(leaf.tables[EPTFixture.entry2] == 0 && leaf.entry == leaf.clean)
    }
}
