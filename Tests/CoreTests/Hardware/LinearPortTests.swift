import Frames
import Hardware
import HostMemory
import SeededRandom
import Synchrony
import Testing

/// A port over shadow tables in physical memory, or over a guest's own behind a second stage; linear page 0 is guest or host
/// frame 0xd, whose bytes are at `page`.
struct PortUnderTest {
    enum Kind: CaseIterable { case shadow, behindEPT, behindNPT }

    let fixture: LegacyFixture
    let port: LinearPort
    let page: UInt64

    static func make(_ kind: Kind, capacity: Int = 8) -> PortUnderTest {
        let buffer = LinearTranslationBuffer(capacity: capacity)
        guard kind != .shadow else {
            let fixture = LegacyFixture(.fourLevel)
            return PortUnderTest(
                fixture: fixture, port: LinearPort(walker: fixture.walker(), buffer: buffer), page: 0xd000)
        }
        let two = TwoDimensionalFixture(.fourLevel, kind == .behindEPT ? .ept : .npt)
        return PortUnderTest(
            fixture: two.guest, port: LinearPort(walker: two.walker(), buffer: buffer), page: 0x80_d000)
    }

    var tables: RawTables { fixture.tables }
}

@Suite struct X86_12_LinearPort {
    @Test(arguments: PortUnderTest.Kind.allCases)
    func `stores, loads, fetches and locked additions reach the page`(kind: PortUnderTest.Kind) {
        let test = PortUnderTest.make(kind)
        var reached: [HostFrame] = []
        #expect(test.port.store(0x8, 40) { reached.append($0) } == .stored)
        #expect(test.tables[test.page + 8] == 40)
        #expect(test.port.lockedAdd(0x8, 2) { reached.append($0) } == .value(40))
        #expect(test.port.load(0x8) { reached.append($0) } == .value(42))
        #expect(test.port.fetch(0x8) { reached.append($0) } == .value(42))
        #expect(reached == Array(repeating: HostFrame(test.page >> 12), count: 4))
        #expect(test.port.store(0x8, ~0, mask: 0xff00) == .stored)
        #expect(test.tables[test.page + 8] == 0xff2a)
        for address in [1, 4, 0xfff] as [UInt64] {
            #expect(test.port.load(address) == .misaligned && test.port.store(address, 0) == .misaligned)
            #expect(test.port.lockedAdd(address, 0) == .misaligned)
        }
        #expect(test.port.load(0x8000_0000_0000) == .fault(.nonCanonical))
    }

    @Test func `a locked addition is one step between points`() {
        let test = PortUnderTest.make(.shadow)
        _ = test.port.store(0, 0)
        var writes = 0
        let task = TestTask { operation, _ in
            guard operation == SchedulingPoint.dataWrite.rawValue else { return }
            writes += 1
            test.tables[test.page] = 100
        }
        let (result, _) = task.run { test.port.lockedAdd(0, 1) }
        #expect(result == .value(100) && test.tables[test.page] == 101 && writes == 1)
    }

    @Test(arguments: PortUnderTest.Kind.allCases)
    func `a translation works until it is invalidated, whatever the tables say`(kind: PortUnderTest.Kind) {
        let test = PortUnderTest.make(kind)
        test.tables[test.page] = 7
        #expect(test.port.load(0) == .value(7))
        test.fixture[1] = 0
        let (cached, count) = loads { test.port.load(0) }
        #expect(cached == .value(7) && count == 0)
        test.port.buffer.invalidatePage(0x1000)
        #expect(test.port.load(0) == .value(7), "another page")
        test.port.buffer.invalidatePage(0xff8)
        guard case .fault(.pageFault(let fault)) = test.port.load(0) else {
            Issue.record("the page is gone")
            return
        }
        #expect(fault.errorCode == 4 && fault.address == 0)
        test.fixture.restore()
        _ = test.port.load(0)
        test.fixture[1] = 0
        test.port.buffer.invalidateAll()
        #expect(test.port.load(0) != .value(7))
    }

    @Test(arguments: PortUnderTest.Kind.allCases)
    func `a store through a cached clean entry walks and sets D`(kind: PortUnderTest.Kind) {
        let test = PortUnderTest.make(kind)
        test.fixture[1] &= ~0x40
        _ = test.port.load(0)
        #expect(test.fixture[1] & 0x40 == 0)
        #expect(test.port.store(0, 1) == .stored)
        #expect(test.fixture[1] & 0x40 != 0)
        let (again, count) = loads { test.port.store(0, 2) }
        #expect(again == .stored && count == 0)
        // Nor does it take the cached entry's word for W.
        test.fixture.restore()
        test.fixture[1] &= ~0x40
        test.port.buffer.invalidateAll()
        _ = test.port.load(0)
        test.fixture[1] &= ~2
        #expect(test.port.store(0, 3) != .stored)
        #expect(test.tables[test.page] == 2)
    }

    /// CPL, AC, PKRU are asked at each access, not when the entry was cached.
    @Test func `cached rights are judged by the registers of the moment`() {
        let test = PortUnderTest.make(.shadow)
        test.fixture[1] |= 3 << 59
        var port = test.port
        var registers = test.fixture.registers()
        registers.cr4 |= 1 << 21 | 1 << 22
        func set(_ change: (inout PagingRegisters) -> Void) {
            change(&registers)
            port.walker = test.fixture.walker(registers)
        }
        set { _ in }
        #expect(port.store(0, 5) == .stored)
        set { $0.pkru = 1 << 7 }
        #expect(port.load(0) == .value(5))
        #expect(port.store(0, 6) != .stored)
        set { $0.pkru = 0 }
        #expect(port.store(0, 6) == .stored)
        set { $0.privilegeLevel = 0 }
        #expect(port.load(0) != .value(6), "SMAP")
        set { $0.alignmentCheck = true }
        #expect(port.load(0) == .value(6))
        #expect(port.load(0, implicit: true) != .value(6))
    }

    @Test func `a fault leaves no entry of its page behind`() {
        let test = PortUnderTest.make(.shadow)
        test.fixture[1] &= ~2
        _ = test.port.load(0)
        #expect(test.port.buffer.entries.count == 1)
        _ = test.port.store(0, 1)
        #expect(test.port.buffer.entries.isEmpty)
    }
}

@Suite struct X86_12_LinearTranslations {
    /// A guest's 2 MiB page over 4 KiB pages of the second stage.
    @Test func `INVLPG drops all parts of a large page, and not its neighbours`() {
        let two = TwoDimensionalFixture(.fourLevel, .ept)
        two.guest[2] = 0xe7
        two.guest.set(0xe7, at: two.guest.location(2) + 8)
        let port = LinearPort(walker: two.walker(), buffer: LinearTranslationBuffer(capacity: 8))
        for address in [0, 0x1000, 0x5000, 0x20_3000] as [UInt64] { _ = port.load(address) }
        #expect(port.buffer.entries.map(\.first) == [0, 0x1000, 0x5000, 0x20_3000])
        port.buffer.invalidatePage(0x1f_f000)
        #expect(port.buffer.entries.map(\.first) == [0x20_3000])
    }

    @Test(arguments: PagingMode.translating)
    func `a large page is one entry, which serves all of it`(mode: PagingMode) {
        let fixture = LegacyFixture(mode)
        fixture[2] = 0x80_00e7
        let port = LinearPort(walker: fixture.walker(), buffer: LinearTranslationBuffer(capacity: 8))
        let bytes: UInt64 = mode == .bits32 ? 4 << 20 : 2 << 20
        for address in [0x5008, 0, bytes - 8] as [UInt64] {
            fixture.tables[0x80_0000 + address] = address + 1
            #expect(port.load(address) == .value(address + 1))
        }
        #expect(port.buffer.entries.map(\.first) == [0])
        #expect(port.buffer.entries[0].translation.frame == HostFrame(0x800))
        let (far, count) = loads { port.load(bytes - 8) }
        #expect(far == .value(bytes - 7) && count == 0)
    }

    /// Against a list of pages that answers the same questions.
    @Test(arguments: [1, 2, 3, UInt64.random(in: 0 ... .max)])
    func `it answers as a list of translations would`(seed: UInt64) {
        var random = SplitMix(seed: seed)
        let buffer = LinearTranslationBuffer(capacity: 4)
        let registers = LegacyFixture(.fourLevel).registers()
        var list: [(first: UInt64, translation: LinearTranslation)] = []
        var next = 0
        for _ in 0..<3000 {
            let address = random.next() % 16 << 12 | random.next() % 3 << 21
            switch random.next() % 8 {
            case 0..<4:
                let translation = translation(for: address, &random)
                buffer.fill(address, translation)
                let first = address & ~(translation.bytes - 1)
                let entry = (first, translation.atStart(address))
                if let i = list.firstIndex(where: { $0.first == first && $0.translation.bytes == translation.bytes }) {
                    list[i] = entry
                } else if list.count < 4 {
                    list.append(entry)
                } else {
                    list[next] = entry
                    next = (next + 1) % 4
                }
            case 4:
                guard random.next() % 8 == 0 else { continue }
                buffer.invalidateAll()
                list = []
            default:
                let access = LinearAccess(AccessKind(rawValue: UInt8(random.next() % 3)) ?? .read)
                let found = buffer.lookup(address, access, registers)
                let expected = list.first {
                    (address & ~($0.translation.bytes - 1)) == $0.first && $0.translation.serves(access, registers)
                }
                let frame = expected.map { $0.translation.frame.number + (address - $0.first) >> 12 }
                #expect(found?.frame.number == frame, "seed \(seed)")
            }
        }
    }

    private func translation(for address: UInt64, _ random: inout SplitMix) -> LinearTranslation {
        let bits = random.next()
        let isLarge = bits & 1 != 0
        let bytes: UInt64 = isLarge ? 2 << 20 : 4096
        let frame = bits >> 8 & 0xff << 9 | (isLarge ? address >> 12 & 511 : 0)
        return LinearTranslation(
            guest: GuestFrame(frame), frame: HostFrame(frame), level: isLarge ? .page2M : .page4K, leafBytes: bytes,
            bytes: bytes, rights: LinearRights(user: bits & 2 != 0, writable: bits & 4 != 0, executable: bits & 8 != 0),
            stageTwo: .all, dirty: bits & 16 != 0)
    }
}

extension LinearTranslation {
    /// The same translation for the first frame that it covers.
    fileprivate func atStart(_ address: UInt64) -> LinearTranslation {
        let delta = (address & (bytes - 1)) >> 12
        return LinearTranslation(
            guest: GuestFrame(guest.number - delta), frame: HostFrame(frame.number - delta), level: level,
            leafBytes: leafBytes, bytes: bytes, rights: rights, stageTwo: stageTwo, dirty: dirty)
    }
}
