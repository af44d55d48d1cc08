// Audit: the event vocabulary, the ledger of page references, and the numbered invariants of the specification.
//
// It knows frames and nothing else: what happened is told to it, and it says which rule that breaks. It never looks at
// memory and never changes anything.

import Frames

/// For whom a page reference or pin is held, or a page's flags are changed. Spec: generic section 8 (owner tags).
public enum Holder: UInt8, Sendable, CaseIterable {
    /// A guest fault, between fault-in and release. Spec: generic 2.8.
    case guestFault
    /// Prefetch of neighbouring entries. Spec: generic 2.11.
    case prefetch
    /// A host mapping of guest memory. Kernel: `kvm_vcpu_map`. Spec: generic 2.12.
    case hostMap
    /// A page handed out for itself. Kernel: `gfn_to_page`. Spec: generic 2.10.
    case framePage
    /// A frame cache, from the translation of a refresh to its end. Kernel: `gfn_to_pfn_cache`. Spec: generic 2.14.
    case frameCache
    /// The heuristic of the policies `guess` and `tracked`: nobody knows. Spec: generic 10.1.
    case heuristic
    /// Get-user-pages outside of KVM.
    case getUserPages
    /// The host's own page tables and caches.
    case primary
    /// A device driver.
    case driver

    /// Whether the holder is KVM, whose references must be gone when it is idle (I-1).
    public var isKVM: Bool {
        switch self {
        case .guestFault, .prefetch, .hostMap, .framePage, .frameCache, .heuristic: true
        case .getUserPages, .primary, .driver: false
        }
    }
}

/// How a fault's page was released. Spec: generic 2.9.
public enum ReleaseKind: UInt8, Sendable {
    case unused, clean, dirty
}

/// One thing that happened to guest memory. Plain data, the same in every build.
public struct Event: Sendable, Equatable {
    public enum Kind: UInt8, Sendable, CaseIterable {
        // Faults. `guest` is the guest frame.
        /// A guest access missed: `value` = access kind (AccessKind raw value), `extra` = vCPU, `level` = the code's P, U
        /// and RSVD (PFERR bits).
        case fault
        /// `value` = FaultOutcome raw value.
        case faultResolved
        /// The invalidation sequence was read: `value` = the count.
        case snapshot
        /// A guest frame was translated: `frame`; `value` bit 0 writable, bit 1 holds a reference, bit 2 PFN-mapped.
        case translated
        /// A translation failed: `value` = index in TranslationError.allCases.
        case translationFailed
        /// The retry check refused: an invalidation came between.
        case retry

        // References. `frame` is the page, `holder` whose it is.
        case referenceTaken, referenceDropped
        case pinTaken, pinDropped
        /// `value` = ReleaseKind; bit 8: mmu_lock held.
        case released
        /// A page owner went out of scope without a release.
        case forgotten
        case markedAccessed, markedDirty

        // Stage-2 entries. `guest`, `frame`, `level`, `value` new entry, `extra` old entry.
        case entryInstalled
        case entryZapped
        case entryChanged
        case tableLinked, tableRemoved
        case flush

        // Host memory.
        case notifierStart, notifierEnd
        /// A host entry: `guest` = virtual page, `frame`, `value` = new host entry.
        case hostEntrySet, hostEntryCleared
        case pageAllocated, pageFreed
        case copyOnWrite

        // Hardware.
        case tlbFill, hardwareAccessed, hardwareDirty

        // KVM.
        case slotCreated, slotDeleted, slotMoved, slotFlags
        case dirtyLogged, dirtyHarvested, dirtyCleared
        /// MMIO exit: `guest` = address, `value` = data.
        case mmioRead, mmioWrite
        /// An entry was made that says "no memory here": `value` = the entry, `extra` = its generation, `frame` = the table.
        case mmioMarked
        /// Such an entry was looked at: `value` = the entry, `extra` = the slots' generation.
        case mmioChecked

        // The shadow MMU.
        /// The guest's own tables are walked: `guest` = its linear address, `value` = PFERR bits.
        case guestWalk
        /// An entry of the guest's was read: `level`, `value`.
        case guestEntryRead
        /// KVM set A or D in an entry of the guest's: `guest` = the entry's guest physical address, `level`.
        case guestAccessedSet, guestDirtySet
        /// The guest's own fault: `guest` = linear address, `value` = PFERR bits.
        case guestWalkFailed
        /// A frame was found for a fault: `guest`, `frame`, `level` that is aimed at.
        case entryRequested
        /// An entry was written by a fault or a prefetch: `guest`, `frame`, `level`, `value`, `extra` = its physical address.
        case entrySet
        /// A shadow page: `frame` = its table, `guest` = the frame that it shadows, `value` = role, `extra` = root count,
        /// bit 32 unsync (as it was before), bit 33 just made, from 34 on its generation.
        case shadowPageTaken, shadowPageZapped, shadowPageSynced, shadowPageUnsynced
        /// All shadow pages are obsolete: `value` = the generation before, `extra` = pages in use.
        case zapAllFast

        // Users of the log. `guest` is the guest frame.
        /// Guest memory was written: `value` = who (Writer raw value), `frame`. Told only where a consumer looks on.
        case memoryWritten
        /// A page was marked in the VMM's own log.
        case writeMarked
        /// A page was copied: `value` = slot.
        case pageCopied
        /// Whoever writes guest memory stands still; goes on.
        case writersStopped, writersResumed

        // What KVM's tracepoints tell besides.
        /// The lockless path has ended: `guest`, `frame` = the table, `level` = the entry's, and in bits 7:4 how (5 fixed,
        /// 6 spurious, 0 it can't say), `value` new entry, `extra` old.
        case fastFault
        /// The age of host pages was asked for: `guest` = virtual page, `value` = how many; `extra` 1: nothing was cleared.
        case hostAged
        /// An entry was pushed into a vCPU's ring (`task`): `guest` = offset in the slot `extra`; or entries were consumed.
        /// `value` = index pushed, and from bit 32 on index consumed.
        case ringPushed, ringReset
        /// The vCPU leaves because its ring is full.
        case ringExit
        /// A vCPU (`task`) would leave a page to others: `guest`; does, for the first time; asks again for what is asked for.
        case asyncTried, asyncNotPresent, asyncRepeated
        /// The page was fetched, `value` = virtual address; the vCPU was told.
        case asyncCompleted, asyncReady
    }

    public var kind: Kind
    public var holder: Holder
    public var level: UInt8
    /// The task that did it: vCPU number, or 0xff for a host task.
    public var task: UInt8
    /// Host frame number, or `Event.none`.
    public var frame: UInt64
    /// Guest frame number (or virtual page, where the kind says so), or `Event.none`.
    public var guest: UInt64
    public var value: UInt64
    public var extra: UInt64

    public static let none = UInt64.max

    public init(
        _ kind: Kind, holder: Holder = .primary, frame: HostFrame? = nil, guest: UInt64 = Event.none,
        level: UInt8 = 0, value: UInt64 = 0, extra: UInt64 = 0, task: UInt8 = 0xff
    ) {
        self.kind = kind
        self.holder = holder
        self.level = level
        self.task = task
        self.frame = frame?.number ?? Event.none
        self.guest = guest
        self.value = value
        self.extra = extra
    }
}
