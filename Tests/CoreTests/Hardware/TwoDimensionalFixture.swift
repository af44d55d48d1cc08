import Frames
import Hardware
import HostMemory

/// A second stage that the guest's tables of `LegacyFixture` stand behind: guest physical 0 to 2 MiB is 0x80_0000 and up.
/// Its table of level n is at 0x10_0000 + n * 0x1000; no flag is set in it.
struct TwoDimensionalFixture {
    enum Stage: CaseIterable {
        case ept, eptWithoutFlags, npt
        var isEPT: Bool { self != .npt }
        /// Whether accesses to the guest's tables count as writes.
        var writesTables: Bool { self != .eptWithoutFlags }
    }

    let guest: LegacyFixture
    let stage: Stage
    let levels: UInt8
    static let base: UInt64 = 0x80_0000
    static let tables: UInt64 = 0x10_0000
    var tables: RawTables { guest.tables }

    init(_ mode: PagingMode, _ stage: Stage, levels: UInt8 = 4) {
        guest = LegacyFixture(mode, base: Self.base)
        self.stage = stage
        self.levels = levels
        for level in stride(from: levels, to: 1, by: -1) {
            tables[Self.tables + UInt64(level) * 0x1000] = Self.tables + UInt64(level - 1) * 0x1000 | 7
        }
        for i in 0..<512 as Range<UInt64> { tables[leaf(i)] = cleanLeaf(i) }
    }

    /// Where the second stage's entry for a guest frame is, and what it is.
    func leaf(_ frame: UInt64) -> UInt64 { Self.tables + 0x1000 + 8 * frame }
    func cleanLeaf(_ frame: UInt64) -> UInt64 { Self.base + frame * 0x1000 | (stage.isEPT ? 0x37 : 7) }
    var flagBits: (accessed: UInt64, dirty: UInt64) { stage.isEPT ? (1 << 8, 1 << 9) : (1 << 5, 1 << 6) }

    /// Entries of the guest's tables that a walk reads, from the top: the levels.
    var guestLevels: [UInt8] {
        let top: UInt8 = guest.mode == .pae && stage.isEPT ? 2 : guest.top
        return Array(stride(from: top, to: 0, by: -1))
    }

    func stageTwo(log: ModificationLog? = nil) -> StageTwo {
        let root = Self.tables + UInt64(levels) * 0x1000
        switch stage {
        case .npt:
            return .npt(NPTWalker(memory: tables.memory, root: root, mode: levels == 5 ? .fiveLevel : .fourLevel))
        case .ept, .eptWithoutFlags:
            let pointer = root | UInt64(levels - 1) << 3 | 6 | (stage == .ept ? 0x40 : 0)
            return .ept(EPTWalker(memory: tables.memory, pointer: pointer, log: log))
        }
    }

    func walker(_ registers: PagingRegisters? = nil, log: ModificationLog? = nil) -> LegacyWalker {
        LegacyWalker(tables: .guest(stageTwo(log: log)), registers: registers ?? guest.registers())
    }

    /// What the processor reports of a second-stage fault.
    func report(_ fault: StageTwoFault) -> UInt64? {
        guard case .violation(let violation) = fault.result else { return nil }
        switch stageTwo() {
        case .ept(let walker):
            return walker.exitQualification(of: violation, finalTranslation: fault.finalTranslation)
        case .npt(let walker): return walker.errorCode(of: violation, finalTranslation: fault.finalTranslation)
        case .gStage: return nil
        }
    }
}
