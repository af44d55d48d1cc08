import Frames
import HostMemory
import SeededRandom
import Testing

@testable import GuestMemory
@testable import Machine
@testable import Paging

/// What a hypervisor's tables are made of, and what the manuals say of an access to them. Of each format: frame 3 leads to
/// the lowest tables, 4 and 5, which begin with 16 words of entries.
enum HypervisorFormat: Sendable, CustomTestStringConvertible {
    case ept(accessDirty: Bool)
    /// On a host with `levels`.
    case old(OldPaging, levels: UInt8)

    var isEPT: Bool { if case .ept = self { true } else { false } }
    var hasPointers: Bool { if case .old(.extended, _) = self { true } else { false } }
    var isNarrow: Bool { if case .old(.twoLevels, _) = self { true } else { false } }
    var testDescription: String {
        switch self {
        case .ept(let accessDirty): accessDirty ? "EPT" : "EPT without A and D"
        case .old(let paging, let levels): "\(paging) under NPT of \(levels) levels"
        }
    }
    var pointer: UInt64 {
        if case .ept(false) = self { NestedGuest.pointerWithoutAD } else { NestedGuest.pointer }
    }
    /// A and D, of all entries in 8 bytes.
    var flags: UInt64 { isEPT ? 0x300 : isNarrow ? 0x60_0000_0060 : 0x60 }

    func configure(_ configuration: inout TDPConfiguration) {
        guard case .old(_, let levels) = self else { return }
        configuration.format = .npt
        configuration.levels = levels
    }

    func makeTables(_ guest: NestedGuest) throws {
        switch self {
        case .ept:
            try guest.makeTables(count: 16)
            try guest.write(3, 1, 0x5000 | NestedGuest.table)
            for i in 0..<16 { try guest.write(5, i, NestedGuest.leaf(16 + i)) }
        case .old(let paging, _):
            // The second GiB is the first once more.
            let again = paging == .twoLevels ? 256 : 0
            for first in [0, again] {
                for i in 0..<2 { try guest.write(paging, 3, first + i, UInt64(4 + i) << 12 | OldPaging.table) }
            }
            if paging == .extended { for i in 0..<2 { try guest.write(1, i, 0x3001) } }
            for i in 0..<32 {
                for table in 0..<2 { try guest.write(paging, 4 + table, i, OldPaging.leaf((table * 16 + i) % 32)) }
            }
        }
    }

    func enter(_ mmu: TDPMMU, _ cpu: NestedCPU) throws {
        switch self {
        case .ept: try mmu.enterNested(EPTTables(pointer: pointer), cpu)
        case .old(.twoLevels, _): try mmu.enterNested(GuestRegisters.twoLevels(0x3000), cpu)
        case .old(.extended, _): try mmu.enterNested(GuestRegisters.physicalExtension(0x1000), cpu)
        }
    }

    /// 8 bytes of sound entries of a lowest table, for page `page` of 32.
    func leaves(_ page: Int) -> UInt64 {
        if isEPT { return NestedGuest.leaf(page) }
        return OldPaging.leaf(page) | (isNarrow ? OldPaging.leaf(page) << 32 : 0)
    }

    /// Of page `page` of 32, of which each lowest table has the half.
    func address(_ page: Int, elsewhere: Bool) -> UInt64 {
        let again: UInt64 = elsewhere && !isEPT ? 1 << 30 : 0
        return UInt64(page / 16) << (isNarrow ? 22 : 21) | UInt64(page % 16) << 12 | again
    }

    // MARK: The manuals

    enum Expected {
        case page(Int)
        case exit(NestedExit)
    }

    func walk(_ guest: NestedGuest, _ address: UInt64, _ kind: AccessKind) throws -> Expected {
        switch self {
        case .ept: try walkEPT(guest, address, [1, 2, 4][Int(kind.rawValue)])
        case .old(.twoLevels, _): try walkTwoLevels(guest, address, kind)
        case .old(.extended, _): try walkExtended(guest, address, kind)
        }
    }

    private func walkEPT(_ guest: NestedGuest, _ address: UInt64, _ needed: UInt64) throws -> Expected {
        var table = 1
        var rights: UInt64 = 7
        func violation(_ rights: UInt64) -> Expected {
            .exit(.violation(GuestAddress(address), qualification: 0x180 | rights << 3 | needed))
        }
        for level in [UInt64(4), 3, 2, 1] {
            let entry = try guest.entry(table, Int(address >> (12 + 9 * (level - 1)) & 511))
            rights &= entry
            guard entry & 7 != 0 else { return violation(0) }
            let isBad =
                entry & 3 == 2 || entry >> 46 & 0x3f != 0
                || (level == 1 ? [2, 3, 7].contains(entry >> 3 & 7) : entry & 0xf8 != 0)
            if isBad { return .exit(.misconfiguration(GuestAddress(address))) }
            table = Int(entry >> 12 & 0x3_ffff_ffff)
        }
        return rights & needed == needed ? .page(table) : violation(rights)
    }

    /// What of the access a nested page fault says, with F if the hypervisor has NX, and its other bits.
    private func exit(_ address: UInt64, _ kind: AccessKind, _ bits: UInt64) -> Expected {
        let access: UInt64 = [4, 6, hasPointers ? 0x14 : 4][Int(kind.rawValue)]
        return .exit(.pageFault(GuestAddress(address), code: 1 << 32 | access | bits))
    }

    private func walkTwoLevels(_ guest: NestedGuest, _ address: UInt64, _ kind: AccessKind) throws -> Expected {
        func entry(_ table: UInt64, _ index: UInt64) throws -> UInt64 {
            try guest.space.loadHalf(at(Int(table)) + index * 4)
        }
        func end(_ rights: UInt64, _ page: UInt64) -> Expected {
            let isAllowed = rights & 4 != 0 && (kind != .write || rights & 2 != 0)
            return isAllowed ? .page(Int(page)) : exit(address, kind, 1)
        }
        let upper = try entry(3, address >> 22)
        guard upper & 1 != 0 else { return exit(address, kind, 0) }
        if upper & 0x80 != 0 {
            guard upper >> 17 & 0x1f == 0 else { return exit(address, kind, 9) }
            // 4 MiB, of up to 36 bits.
            return end(upper, (upper >> 22) << 10 | (upper >> 13 & 15) << 20 | address >> 12 & 0x3ff)
        }
        let lower = try entry(upper >> 12, address >> 12 & 0x3ff)
        guard lower & 1 != 0 else { return exit(address, kind, 0) }
        return end(upper & lower, lower >> 12)
    }

    private func walkExtended(_ guest: NestedGuest, _ address: UInt64, _ kind: AccessKind) throws -> Expected {
        let high: UInt64 = 0x1_ffff << 46
        let pointer = try guest.entry(1, Int(address >> 30))
        guard pointer & 1 != 0 else { return exit(address, kind, 0) }
        guard pointer & (high | 1 << 63 | 0x1e6) == 0 else { return exit(address, kind, 9) }
        var table = pointer >> 12
        var rights: UInt64 = 6
        var isExecutable = true
        for level in [2, 1] as [UInt64] {
            guard table < 64 else { return exit(address, kind, 0) }
            let entry = try guest.entry(Int(table), Int(address >> (3 + 9 * level) & 511))
            guard entry & 1 != 0 else { return exit(address, kind, 0) }
            let isLarge = level == 2 && entry & 0x80 != 0
            guard entry & (high | (isLarge ? 0xff << 13 : 0)) == 0 else { return exit(address, kind, 9) }
            rights &= entry
            if entry >> 63 != 0 { isExecutable = false }
            table = entry >> 12 & 0x3_ffff_ffff
            if isLarge {
                table = table & ~0x1ff | address >> 12 & 0x1ff
                break
            }
        }
        let isAllowed = rights & 4 != 0 && (kind != .write || rights & 2 != 0) && (kind != .execute || isExecutable)
        return isAllowed ? .page(Int(table)) : exit(address, kind, 1)
    }

    // MARK: What the hypervisor writes: 8 bytes

    private func pick(_ random: inout SplitMix, _ count: Int) -> Int { Int(random.next() % UInt64(count)) }

    /// Of a lowest table.
    func randomEntries(_ random: inout SplitMix) -> UInt64 {
        guard isNarrow else { return randomEntry(&random) }
        return randomEntry(&random) & 0xffff_ffff | randomEntry(&random) << 32
    }

    private func randomEntry(_ random: inout SplitMix) -> UInt64 {
        let frame = pick(&random, 100) < 85 ? 16 + pick(&random, 32) : [4, 5, 3, 200][pick(&random, 4)]
        let rest: UInt64 = pick(&random, 100) < 95 ? 0 : 1 << (46 + random.next() % (isEPT ? 6 : 17))
        let choice = pick(&random, 10)
        guard isEPT else {
            let rights: UInt64 = [7, 7, 7, 5, 1, 3, 4, 0, 7, 6][choice]
            let noExecute: UInt64 = pick(&random, 8) == 0 ? 1 << 63 : 0
            return UInt64(frame) << 12 | rights | [0x60, 0x20, 0][pick(&random, 3)] | rest | noExecute
        }
        let rights: UInt64 = [7, 7, 7, 5, 1, 3, 4, 0, 2, 6][choice]
        let type = pick(&random, 100) < 90 ? 6 : UInt64(pick(&random, 8))
        return UInt64(frame) << 12 | rights | type << 3 | [0x300, 0x100, 0][pick(&random, 3)] | rest
    }

    /// Of the table above.
    func randomLinks(_ random: inout SplitMix) -> UInt64 {
        let ept: [UInt64] = [0x4007, 0x5007, 0x4005, 0x5003, 0, 0x4087, 0x4002]
        // The large ones are at 0, out of memory, and of reserved bits.
        let wide: [UInt64] = [0x4007, 0x5067, 0x4065, 0x5063, 0, 0x87, 0x20_00e7, 0x2_00e7, 1 << 63 | 0x4007, 0x4006]
        let narrow: [UInt64] = [0x4007, 0x5067, 0x4065, 0x5063, 0, 0x87, 0x2087, 0x40_00e5, 0x2_00e7, 0x5006]
        if isEPT { return ept[pick(&random, ept.count)] }
        guard isNarrow else { return wide[pick(&random, wide.count)] }
        return narrow[pick(&random, narrow.count)] | narrow[pick(&random, narrow.count)] << 32
    }

    /// Of PAE's pointers.
    func randomPointer(_ random: inout SplitMix) -> UInt64 {
        [0x3001, 0x3001, 0, 0x3003, 0x3001 | 1 << 63, 0x3001 | 1 << 50, 0xc8001][pick(&random, 7)]
    }
}
