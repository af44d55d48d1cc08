import Frames
import HostMemory
import Synchrony

/// The three models of page references. Spec: generic 0.5, section 10.
public enum PolicyKind: UInt8, Sendable, CaseIterable {
    /// v13: a page is referenced exactly while KVM owns a reference it was given.
    case precise
    /// v8 to v11: a software bit in the entry says "refcounted".
    case tracked
    /// Before: the heuristic.
    case guess
}

/// What a policy does for each entry. A compile-time parameter of the loops over entries, so that `precise`, which does
/// nothing, costs nothing. Spec: x86 3.12.
public protocol ReferencePolicy: Sendable {
    /// A leaf went away. `counted`: its software bit; `accessed`, `dirty`: its A and D.
    func leafRemoved(_ frame: HostFrame, counted: Bool, accessed: Bool, dirty: Bool)
    /// A leaf lost D (or W) for the dirty log. What it was is asked for only where it matters.
    func dirtyCleared(_ frame: @autoclosure () -> HostFrame, counted: @autoclosure () -> Bool)
}

/// The policy of a VM, with what it needs. Loops over entries switch on it once and run a specialised body.
public enum Policy: Sendable {
    case precise(Precise)
    case tracked(Tracked)
    case guess(Guess)

    init(_ kind: PolicyKind, memory: PhysicalMemory, entryHasSoftwareBit: Bool) {
        switch kind {
        case .precise: self = .precise(Precise())
        case .tracked: self = .tracked(Tracked(memory: memory, entryHasSoftwareBit: entryHasSoftwareBit))
        case .guess: self = .guess(Guess(memory: memory))
        }
    }

    public var kind: PolicyKind {
        switch self {
        case .precise: .precise
        case .tracked: .tracked
        case .guess: .guess
        }
    }
}

/// How leaves end, or lose what tells that their page was written.
public enum LeafLoss: Sendable {
    /// A notifier, or a slot's end, takes away what a range of frames has.
    case zapped
    /// The table goes that they are in.
    case tornDown
    /// W or D for the log, rights or A for ageing.
    case cleared
}

extension VirtualMachine {
    /// Whose rules a loop over entries follows: the VM's. Spec: x86 3.12, X4. One patch of the series taken back makes it
    /// tell pages what it told them before.
    public func policy(for loss: LeafLoss) -> Policy {
        guard case .precise = policy else { return policy }
        let marksDirty = SeriesPatch.dirtyWhenMapped.isUndone
        let marksAccessed =
            switch loss {
            case .zapped: SeriesPatch.zapMarksNothing.isUndone
            case .tornDown: SeriesPatch.accessedByRange.isUndone
            case .cleared: false
            }
        guard marksDirty || marksAccessed else { return policy }
        return .guess(Guess(memory: memory, marksAccessed: marksAccessed, marksDirty: marksDirty))
    }
}
