import Synchrony

/// What VMMs got wrong with the log in the field, or nearly. Each can be made here again: by `Mistakes` of a consumer, or
/// by the museum's defect of the same name.
public enum Mistake: UInt8, Sendable, CaseIterable {
    /// The clean pages at a slot's end are not skipped in the file: the next slot's pages are written too early in it.
    /// firecracker #5696, #5705.
    case trailingPagesNotSkipped
    /// A second migration begins with the log that the first left. propolis #232.
    case secondFromFirst
    /// The vCPUs run on, and so do devices, when the last harvest is made. cloud-hypervisor #8361.
    case runsOnAfterHarvest
    /// What the VMM writes itself is marked nowhere. cloud-hypervisor #2458.
    case ownWritesUnlogged
    /// What devices write by DMA is marked nowhere. cloud-hypervisor #7738, #8528.
    case deviceWritesUnlogged
    /// A writer marks the page, and then writes it.
    case markedBeforeWrite
    /// A page that mincore does not report is taken for clean, but it may be dirty and on the swap device. firecracker #5274.
    case residentTakenForDirty
    /// A slot that appeared since the last harvest is harvested before it was logged: no log is taken for no dirty page.
    case newSlotTakenForClean
    /// Pages are copied, and then logging is turned on.
    case copiedBeforeLogging
    /// With manual protection: pages are copied, and then cleared in the log.
    case clearedAfterCopy

    var defect: Defect {
        switch self {
        case .trailingPagesNotSkipped: .trailingPagesNotSkipped
        case .secondFromFirst: .secondFromFirst
        case .runsOnAfterHarvest: .runsOnAfterHarvest
        case .ownWritesUnlogged: .ownWritesUnlogged
        case .deviceWritesUnlogged: .deviceWritesUnlogged
        case .markedBeforeWrite: .markedBeforeWrite
        case .residentTakenForDirty: .residentTakenForDirty
        case .newSlotTakenForClean: .newSlotTakenForClean
        case .copiedBeforeLogging: .copiedBeforeLogging
        case .clearedAfterCopy: .clearedAfterCopy
        }
    }
}

/// The mistakes that a consumer makes; none unless it is told to.
public struct Mistakes: Sendable, Equatable {
    private var bits: UInt32 = 0
    public init() {}
    public init(_ mistake: Mistake) { bits = 1 << UInt32(mistake.rawValue) }

    public func make(_ mistake: Mistake) -> Bool {
        bits >> UInt32(mistake.rawValue) & 1 == 1 || mistake.defect.isOn
    }
}
