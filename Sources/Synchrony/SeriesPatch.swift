import CSchedule

/// The patches of "KVM: Stop grabbing references to PFNMAP'd pages" (v13) whose behaviour before can be had back, by
/// their numbers there. Each is asked for in one place; without a task that asks for it none is ever taken back. It is
/// there so that the test of a patch can be seen to fail without the patch. Spec: generic section 9.
///
/// What was before stands at each case. It never harms the process: where the kernel would have touched memory that is
/// not its own, the journal has a finding. Of one patch at a time; later ones do not go with it.
public enum SeriesPatch: UInt32, Sendable, CaseIterable {
    /// A lookup of a page that fails gives a page all the same: the poison constant, which callers must know.
    case nilForNoPage = 1
    /// To release nothing is a mistake.
    case releaseOfNothing = 2
    /// There is no release that marks nothing.
    case releaseUnused = 3
    /// An old entry that can be written proves that its frame may be, also if it points to a table. x86.
    case leafProvesWritable = 4
    /// A prefetch puts its own entry in place of the one that it finds.
    case prefetchKeepsEntries = 5
    /// An entry that is made anew for the guest's flush is not accessed. x86.
    case syncedIsAccessed = 7
    /// An entry that goes, or loses what tells that its page was written, marks the page dirty. x86.
    case dirtyWhenMapped = 8
    /// The end of a whole root marks the pages of its entries accessed. x86.
    case accessedByRange = 9
    /// A translation that finds its page without sleeping does not say that it might have slept.
    case mayAlwaysSleep = 13
    /// A task that is being killed looks on, at the VMA, and fails with a fault.
    case killedIsSignal = 14
    /// A failed lookup is followed by another that asks for poison alone.
    case oneLookForPoison = 15
    /// That a page needs I/O is said beside the result, which is a fault.
    case needsIO = 16
    /// A map of memory without page frames has a page: another poison constant.
    case remappedHasNoPage = 22
    /// The reference of a translation is not handed out; who releases guesses it from the frame number.
    case pageIsReported = 27
    /// Whether an enlightened VMCS is mapped is told by its pointer, not by the map. x86.
    case mapTellsWhetherMapped = 23
    /// A frame cache's refresh that is refused marks its page accessed.
    case refusedIsUnused = 29
    /// A map of guest memory holds a reference, no pin.
    case mapsArePinned = 31
    /// The page that a guest hypervisor's guest has for its APIC is given back clean. x86.
    case apicAccessPageIsDirtied = 32
    /// Whether a map was written is said when it ends.
    case writabilityFixedAtMap = 33
    /// Every map asks for a page that can be written.
    case readOnlyMapsRead = 34
    /// A map is made of memory that can't be pinned.
    case unpinnedMapsRefused = 35
    /// The page of a VM's APIC is fetched when its slot is made. x86.
    case apicPageIsNotFetched = 36
    /// The pages that come along with a direct mapping are released unused. x86.
    case prefetchedIsAccessed = 38
    /// A fault's page is marked dirty, by its number, when its entry is made up, whether it is put in or not. x86.
    case makingMarksNothing = 41
    /// The end of a fault marks what page there is behind the frame number. x86.
    case faultEndsItsPage = 47
    /// A fault that is to be tried again marks its page accessed. x86.
    case retriedIsUnused = 48
    /// A fault's page is released after mmu_lock is dropped.
    case releasedUnderLock = 49
    /// The page of a VM's APIC is released after mmu_lock is dropped. x86.
    case apicPageUnderLock = 50
    /// The page of a VM's APIC is released by its number. x86.
    case apicPageIsFaultedIn = 51
    /// A page that is mapped by its number is handed out, with a reference.
    case noPageOfPFNMap = 75
    /// A page is always looked up for writing.
    case pageForReading = 76
    /// Who does not take the page that a translation gives is not told.
    case pageIsRequired = 81
    /// An entry that a notifier takes away marks its page accessed. x86.
    case zapMarksNothing = 82
    /// A page that is mapped by its number is referenced, or refused if its count is 0.
    case mappedPagesUncounted = 85

    /// Whether the running task is to do as before. One branch, never taken without a task that asks for it.
    @inlinable @inline(__always) public var isUndone: Bool { fl_undone(rawValue) != 0 }
}
