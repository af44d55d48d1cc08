import CSchedule

/// The museum's defects that are switched on in the core's own code: mistakes that were made, or nearly, in the systems
/// that this one models. Each is asked for in one place. Without an explorer none is ever on; `Explorer` says what each
/// does, and where it comes from.
public enum Defect: UInt32, Sendable, CaseIterable {
    /// A page found in a PFN map is put at the fault's end although no reference was taken.
    case unownedPut = 0
    /// A PFN-mapped page with count 0 is refused.
    case tailPageRefused
    case snapshotAfterTranslate
    case retryCheckMissing
    /// The invalidation count goes up when the invalidation begins, not when it ends.
    case sequenceBumpedEarly
    /// The invalidation counts as ended, and mmu_lock is dropped, before the count goes up.
    case inProgressDroppedEarly
    case releaseAfterUnlock
    /// The notifier's start returns without the flush that its zaps need.
    case flushMissing
    /// The log's bit is taken after the pages were write-protected.
    case logBitTakenLate
    /// The lockless path makes a page writable and does not log it.
    case fastFaultUnlogged
    // Mistakes of the log's users: `Mistake` of `LogConsumers` says what each is.
    case trailingPagesNotSkipped, secondFromFirst, runsOnAfterHarvest, ownWritesUnlogged, deviceWritesUnlogged
    case markedBeforeWrite, residentTakenForDirty, newSlotTakenForClean, copiedBeforeLogging, clearedAfterCopy
    // Mistakes of x86's MMUs.
    /// The guest's entry is read again before its table is shadowed, not after.
    case rereadTooEarly
    /// The guest's table is write-protected, and vCPUs keep W in their TLBs.
    case shadowedUnflushed
    /// The same where W had gone before, for the log, and the flush that it needs has not been yet.
    case protectionUnflushed
    /// A page that is out of sync gets a parent that does not know it.
    case unsyncUnmarked
    /// An out-of-sync table is read while vCPUs write it.
    case syncUnprotected
    /// What a sync took away stays in TLBs.
    case syncUnflushed
    /// A sync takes every page for one that the process may write.
    case hostWriteAssumed
    /// An emulated store over a guest's table leaves what was made of it.
    case tableWriteUnheard
    /// Neighbours are mapped ahead while an invalidation runs.
    case prefetchUnguarded
    /// An entry that says "no memory" is believed after the slots have changed.
    case generationIgnored
    /// The lockless path gives W to leaves that may not have it.
    case fastWriteUnasked
    /// The parts of a huge page that was split are not counted.
    case splitUncounted
    /// A fault writes over the frozen entries of a table that is being removed.
    case frozenOverwritten
    /// A leaf that maps the same host page for another guest frame now stays in the first one's reverse map.
    case frameMovedUnmapped
    /// Shadow pages are freed without a flush that waits for who walks them.
    case freedUnflushed
    /// Shadow pages of an earlier generation are not zapped.
    case obsoleteLeft

    /// Whether the running task is to make this mistake. One branch, never taken without an explorer.
    @inlinable @inline(__always) public var isOn: Bool { fl_defect(rawValue) != 0 }
}
