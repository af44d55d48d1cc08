import Frames
import Hardware
import HostMemory
import SeededRandom
import Testing

@testable import GuestMemory
@testable import Machine
@testable import Paging

/// The tables that the MMUs make, as `Hardware` walks them and as QEMU's processor does: the same answers, the same error
/// codes, the same A and D afterwards. EPT has no emulator in Debian; its walker stands alone.
@Suite(.enabled(if: Emulator.missing == nil, Comment(rawValue: Emulator.missing ?? "")), .serialized)
struct Hardware_BesideAnEmulator {
    /// The guest's instructions, each with a halt: load, store, jump.
    private static let code: [(offset: UInt64, word: UInt64)] = [(0, 0xf4_038b), (16, 0xf4_0389), (32, 0xe3ff)]
    /// Where a jump finds a halt.
    private static let target: UInt64 = 0xff8

    private func memory(_ host: TestHost) -> [UInt64] {
        (0..<Int(host.memory.ram.upperBound.number) * 512).map { host.memory.word(at: UInt64($0) * 8).load() }
    }

    private func makeCode(_ space: AddressSpace, _ page: UserAddress) throws {
        for (offset, word) in Self.code { try space.store(page + offset, word) }
    }

    /// Asks both, in the same order, and compares everything.
    private func compare(
        _ host: TestHost, root: HostFrame, code: UInt64, _ pages: [UInt64],
        sourceLocation: SourceLocation = #_sourceLocation
    ) throws {
        var probes: [Emulator.Probe] = []
        for page in pages {
            for kind in Emulator.Kind.allCases { probes.append(.init(kind: kind, address: page | Self.target)) }
        }
        let (answers, after) = try Emulator.walk(memory(host), root: root, code: code, probes)
        let walker = NPTWalker(
            memory: host.memory, root: root.physicalAddress,
            processor: PagingProcessor(physicalAddressBits: 46, isAMD: true))
        for (probe, answer) in zip(probes, answers) {
            guard case .translated = walker.walk(GuestAddress(code + probe.kind.rawValue), .execute) else {
                Issue.record("the guest's code is not mapped", sourceLocation: sourceLocation)
                return
            }
            let expected = try perform(probe, walker, host)
            #expect(known(answer) == expected, "\(probe)", sourceLocation: sourceLocation)
        }
        let mine = memory(host)
        let different = mine.indices.filter { mine[$0] != after[$0] }
        #expect(different.isEmpty, "words \(different.prefix(4))", sourceLocation: sourceLocation)
    }

    /// Of a reserved bit QEMU 7.2 tells without P, which the manual sets.
    private func known(_ answer: Emulator.Answer) -> Emulator.Answer {
        var answer = answer
        if answer.exit == 0x400, answer.code & 8 != 0 { answer.code |= 1 }
        return answer
    }

    private func perform(_ probe: Emulator.Probe, _ walker: NPTWalker, _ host: TestHost) throws -> Emulator.Answer {
        let address = GuestAddress(probe.address)
        switch walker.walk(address, probe.kind.access) {
        case .translated(let translation):
            let word = host.memory.word(at: translation.frame.physicalAddress | address.offset)
            switch probe.kind {
            case .load: return Emulator.Answer(exit: 0x78, value: word.loadData() & 0xffff_ffff)
            case .store:
                word.storeData(word.loadData() & ~0xffff_ffff | 0xf4)
                return Emulator.Answer(exit: 0x78, value: 0xf4)
            case .fetch: return Emulator.Answer(exit: 0x78, value: 0xf4)
            }
        case .violation(let fault):
            return Emulator.Answer(
                exit: 0x400, code: walker.errorCode(of: fault), address: probe.address, value: 0xf4)
        case let other:
            Issue.record("\(other)")
            return Emulator.Answer(exit: 0)
        }
    }

    /// Pages whose byte at `target` is a halt, so that a jump there ends; a store writes the same.
    private func makeTargets(_ space: AddressSpace, _ first: UserAddress, count: Int) throws {
        for i in 0..<count { try space.store(first + UInt64(i) * pageSize + Self.target, 0xf4) }
    }

    @Test(arguments: [false, true])
    func `NPT of the TDP MMU`(nxHugePages: Bool) throws {
        let machine = TDPMachine(ramFrames: 1024, thp: true) {
            $0.format = .npt
            $0.nxHugePages = nxHugePages
            $0.cachesMMIO = true
        }
        try machine.slot(0, frame: 0, page: 0, count: 16)
        try machine.slot(1, frame: 32, page: 32, count: 4, flags: SlotFlags(readOnly: true))
        try machine.slot(2, frame: 48, page: 48, count: 4, flags: SlotFlags(logDirtyPages: true))
        try machine.slot(3, frame: 512, page: 512, count: 512)
        try makeTargets(machine.space, at(0), count: 16)
        try makeTargets(machine.space, at(32), count: 4)
        try makeTargets(machine.space, at(48), count: 4)
        try makeTargets(machine.space, at(512), count: 16)
        try makeCode(machine.space, at(0))
        machine.fault(.execute, 0)
        for frame in [1, 2, 5, 48, 49, 50] as [UInt64] { machine.fault(.write, frame) }
        for frame in [3, 32, 33, 51] as [UInt64] { machine.fault(.read, frame) }
        machine.fault(.write, 512)
        // W goes, and of one page comes back.
        _ = try machine.dirtyLog(2)
        machine.fault(.write, 49, present: true)
        // Where nothing is: an entry with a reserved bit.
        machine.fault(.read, 100)
        machine.fault(.read, 700, present: true)
        #expect(machine.leaf(512)?.level == .page2M)
        let frames: [UInt64] = [1, 2, 3, 4, 5, 32, 33, 34, 48, 49, 50, 51, 100, 101, 512, 513, 520]
        try compare(machine.test, root: machine.cpu.root!, code: 0, frames.map { $0 << 12 })
    }

    @Test func `the shadow MMU's, as nested tables`() throws {
        let guest = try PagedGuest()
        try guest.identityMap()
        try makeTargets(guest.space, at(8), count: 24)
        try makeCode(guest.space, at(5))
        // Read-only, supervisor's, not executable, clean, not there.
        let bits: [UInt64] = [0x65, 0x63, 0x67 | 1 << 63, 0x27, 0]
        for (i, bits) in bits.enumerated() {
            for page in [9 + i, 17 + i] { try guest.write(4, page, bits == 0 ? 0 : UInt64(page) << 12 | bits) }
        }
        #expect(guest.cpus[0].access(.fetch, at: 0x5000) != .failed(.EIO))
        for page in 8..<24 as Range<UInt64> {
            for access in [PagedAccess.load, .fetch] { _ = guest.cpus[0].access(access, at: page << 12) }
            if page % 2 == 0 { _ = guest.cpus[0].access(.store(0), at: page << 12) }
        }
        try compare(
            guest.test, root: guest.cpus[0].root!, code: 0x5000, (8..<26 as Range<UInt64>).map { $0 << 12 })
    }

    @Test func `those of a nested guest`() throws {
        let guest = try NestedGuest { $0.format = .npt }
        try guest.makeTables(leaf: 0x67, table: 0x67)
        try makeTargets(guest.space, at(16), count: 32)
        try makeCode(guest.space, at(16 + 5))
        let bits: [UInt64] = [0x65, 0x63, 0x67 | 1 << 63, 0x27, 0]
        for (i, bits) in bits.enumerated() { try guest.write(4, 9 + i, bits == 0 ? 0 : NestedGuest.leaf(9 + i, bits)) }
        try guest.mmu.enterNested(GuestRegisters.longMode(root: GuestAddress(0x1000)), guest.cpu)
        #expect(guest.cpu.access(.fetch, at: 0x5000) != .failed(.EIO))
        for page in 6..<20 as Range<UInt64> {
            for access in [PagedAccess.load, .fetch] { _ = guest.cpu.access(access, at: page << 12) }
            if page % 2 == 0 { _ = guest.cpu.access(.store(0), at: page << 12) }
        }
        try compare(guest.test, root: guest.cpu.root!, code: 0x5000, (6..<22 as Range<UInt64>).map { $0 << 12 })
    }
}
