import Frames
import HostMemory
import Synchrony

/// What the addresses in ordinary x86 tables are addresses of.
public enum TableMemory: Sendable {
    /// Of physical memory: shadow paging, nested page tables, a host's own tables.
    case physical(PhysicalMemory)
    /// Of a guest's memory, which the second stage translates, tables and pages alike.
    case guest(StageTwo)

    public var memory: PhysicalMemory {
        switch self {
        case .physical(let memory): memory
        case .guest(let stage): stage.memory
        }
    }

    /// Whether the pointers of PAE paging are read in the course of each walk, not taken from registers. Source: AMD APM
    /// volume 2, "Legacy PAE mode" under nested paging.
    var readsPageDirectoryPointers: Bool {
        guard case .guest(.npt) = self else { return false }
        return true
    }

    /// Finds the entry at `location`, or tells why nobody can. `linear` is what is being translated.
    func slot(at location: UInt64, narrow: Bool, for linear: UInt64) -> TableLookup {
        switch self {
        case .physical(let memory):
            guard memory.exists(HostFrame(location >> pageShift)) else { return .failed(.outside(location)) }
            return .found(TableSlot(memory, location, narrow: narrow, isWritable: true))
        case .guest(let stage):
            return lookUp(location, stage, stage.tableAccess, narrow: narrow, for: linear)
        }
    }

    private func lookUp(
        _ location: UInt64, _ stage: StageTwo, _ access: AccessKind, narrow: Bool, for linear: UInt64
    ) -> TableLookup {
        let result = stage.walk(GuestAddress(location), access)
        guard case .translated(let translation) = result else {
            return .failed(.stageTwo(StageTwoFault(result: result, address: linear, finalTranslation: false)))
        }
        let physical = translation.frame.physicalAddress | location & (pageSize - 1)
        return .found(TableSlot(stage.memory, physical, narrow: narrow, isWritable: translation.serves(.write)))
    }

    /// Why the entry at `location`, which the second stage lets be read, may not be written. Nil: it may, by now.
    func writeFault(at location: UInt64, for linear: UInt64) -> LinearResult? {
        guard case .guest(let stage) = self,
            case .failed(let result) = lookUp(location, stage, .write, narrow: false, for: linear)
        else { return nil }
        return result
    }
}

extension StageTwo {
    /// What the processor's accesses to the guest's own tables count as. Source: Intel SDM volume 3, "Accessed and dirty
    /// flags for EPT"; AMD APM volume 2, "Nested table walk": there always user writes.
    var tableAccess: AccessKind {
        switch self {
        case .ept(let walker): walker.accessDirty ? .write : .read
        case .npt: .write
        case .gStage: .read
        }
    }
}

enum TableLookup {
    case found(TableSlot)
    case failed(LinearResult)
}

/// An entry's place in physical memory: 8 bytes, or one half of them.
struct TableSlot {
    private let word: AtomicWord
    /// Of the entry in the word, in bits.
    private let shift: UInt64
    private let mask: UInt64
    /// Whether the second stage permits to write it.
    let isWritable: Bool

    /// `physical` is a multiple of the entry's size, and exists.
    init(_ memory: PhysicalMemory, _ physical: UInt64, narrow: Bool, isWritable: Bool) {
        word = memory.word(at: physical & ~7)
        shift = narrow ? (physical & 4) * 8 : 0
        mask = narrow ? 0xffff_ffff : .max
        self.isWritable = isWritable
    }

    func load() -> UInt64 { word.loadRacing() >> shift & mask }

    /// Puts `desired` in if the entry is still `expected`. A change of the word's other half does not count.
    func replace(_ expected: UInt64, by desired: UInt64) -> Bool {
        guard mask != .max else { return word.compareExchange(expected: expected, desired: desired) == nil }
        var found = word.load()
        while found >> shift & mask == expected {
            let changed = found & ~(mask << shift) | desired << shift
            guard let other = word.compareExchange(expected: found, desired: changed) else { return true }
            found = other
        }
        return false
    }
}
