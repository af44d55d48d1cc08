import Audit
import Frames
import Paging
import TraceAudit

/// One thing that a recording and the model can both tell, without what differs from machine to machine: frame numbers and
/// the addresses of tables.
package enum ReplayEvent: Hashable, Sendable {
    /// Kernel: `kvm_mmu_pagetable_walk`.
    case walk(UInt64, code: UInt64)
    /// Kernel: `kvm_mmu_paging_element`.
    case element(UInt64, level: Int)
    case accessedSet(UInt64)
    case dirtySet(UInt64)
    case walkFailed(UInt64)
    /// Kernel: `kvm_mmu_spte_requested`.
    case requested(UInt64, level: Int)
    /// Kernel: `kvm_mmu_set_spte`: the guest frame, all bits but the frame, the level.
    case set(UInt64, bits: UInt64, level: Int)
    case page(PageFate, PageDescription)
    /// Kernel: `kvm_mmu_zap_all_fast`.
    case allObsolete(generation: UInt64, pages: UInt64)
    /// Kernel: `kvm_unmap_hva_range`.
    case invalidated(UInt64, UInt64)

    /// Whether the event is one of a walk's inner steps, which not every recording has.
    package var isStepOfWalk: Bool {
        switch self {
        case .element: true
        default: false
        }
    }
}

package enum PageFate: String, Sendable {
    case taken = "get_page"
    case zapped = "prepare_zap_page"
    case synced = "sync_page"
    case unsynced = "unsync_page"
}

/// A shadow page as the kernel prints it. Spec: x86 10.
package struct PageDescription: Hashable, Sendable {
    package var generation: UInt64
    package var frame: UInt64
    package var level: Int
    package var entryBytes: Int
    package var quadrant: Int
    package var isDirect: Bool
    package var access: Int
    package var isInvalid: Bool
    package var roots: UInt64
    package var isUnsync: Bool
    package var isNew: Bool?
}

/// With the frame, if it has one.
package struct ReplayObservation: Sendable {
    package var event: ReplayEvent
    package var frame: UInt64?
}

extension ReplayObservation {
    package init(invalidated range: Range<UInt64>) {
        event = .invalidated(range.lowerBound, range.upperBound)
        frame = nil
    }

    /// What a recording says. Nil: nothing that the model could say too.
    package init?(_ body: EventBody) {
        frame = nil
        switch body {
        case .tableWalk(let address, let code): event = .walk(address, code: code)
        case .walkedElement(let entry, let level): event = .element(entry, level: level)
        case .setFlag(.setAccessed, let address): event = .accessedSet(address)
        case .setFlag(_, let address): event = .dirtySet(address)
        case .walkerError(let code): event = .walkFailed(code)
        case .entryRequested(let request):
            event = .requested(request.frame, level: request.level)
            frame = request.hostFrame
        case .entrySet(let set):
            event = .set(set.frame, bits: set.entry & ~Self.frameMask, level: set.level)
            frame = (set.entry & Self.frameMask) >> 12
        case .table(let kind, let table):
            guard let fate = Self.fate(kind) else { return nil }
            event = .page(fate, PageDescription(table))
        case .zapAllFast(let generation, let pages): event = .allObsolete(generation: generation, pages: pages)
        case .unmapRange(let range): event = .invalidated(range.start, range.end)
        default: return nil
        }
    }

    /// What the model says. Nil: nothing that a kernel prints.
    package init?(_ event: Event) {
        frame = nil
        let level = Int(event.level)
        switch event.kind {
        case .guestWalk: self.event = .walk(event.guest, code: event.value)
        case .guestEntryRead: self.event = .element(event.value, level: level)
        case .guestAccessedSet: self.event = .accessedSet(event.guest)
        case .guestDirtySet: self.event = .dirtySet(event.guest)
        case .guestWalkFailed: self.event = .walkFailed(event.value)
        case .entryRequested:
            self.event = .requested(event.guest, level: level)
            frame = event.frame
        case .entrySet:
            self.event = .set(event.guest, bits: event.value & ~Self.frameMask, level: level)
            frame = event.frame
        case .shadowPageTaken: self.event = .page(.taken, PageDescription(event))
        case .shadowPageZapped: self.event = .page(.zapped, PageDescription(event))
        case .shadowPageSynced: self.event = .page(.synced, PageDescription(event))
        case .shadowPageUnsynced: self.event = .page(.unsynced, PageDescription(event))
        case .zapAllFast: self.event = .allObsolete(generation: event.value, pages: event.extra)
        case .notifierStart:
            self.event = .invalidated(event.guest << 12, (event.guest + event.value) << 12)
        default: return nil
        }
    }

    private static let frameMask: UInt64 = 0x000f_ffff_ffff_f000

    private static func fate(_ kind: EventKind) -> PageFate? {
        switch kind {
        case .getTable: .taken
        case .zapTable: .zapped
        case .syncTable: .synced
        case .unsyncTable: .unsynced
        default: nil
        }
    }
}

extension PageDescription {
    init(_ table: TableEvent) {
        self.init(
            generation: table.generation, frame: table.frame, level: table.level, entryBytes: table.entryBytes,
            quadrant: table.quadrant, isDirect: table.direct, access: table.access, isInvalid: table.invalid,
            roots: table.rootCount, isUnsync: table.unsync, isNew: table.created)
    }

    init(_ event: Event) {
        let role = PageRole(rawValue: UInt32(truncatingIfNeeded: event.value))
        self.init(
            generation: event.extra >> 34, frame: event.guest, level: Int(role.level),
            entryBytes: role.has4ByteEntries ? 4 : 8, quadrant: Int(role.quadrant), isDirect: role.isDirect,
            access: Int(role.access.rawValue), isInvalid: role.isInvalid, roots: event.extra & 0xffff_ffff,
            isUnsync: event.extra >> 32 & 1 != 0,
            isNew: event.kind == .shadowPageTaken ? event.extra >> 33 & 1 != 0 : nil)
    }
}

extension ReplayEvent: CustomStringConvertible {
    /// Much as the kernel prints it.
    package var description: String {
        func hex(_ value: UInt64) -> String { String(value, radix: 16) }
        switch self {
        case .walk(let address, let code): return "walk addr \(hex(address)) pferr \(hex(code))"
        case .element(let entry, let level): return "element pte \(hex(entry)) level \(level)"
        case .accessedSet(let address): return "set_accessed_bit gpa \(hex(address))"
        case .dirtySet(let address): return "set_dirty_bit gpa \(hex(address))"
        case .walkFailed(let code): return "walker_error pferr \(hex(code))"
        case .requested(let frame, let level): return "spte_requested gfn \(hex(frame)) level \(level)"
        case .set(let frame, let bits, let level):
            return "set_spte gfn \(hex(frame)) bits \(hex(bits)) level \(level)"
        case .page(let fate, let page): return "\(fate.rawValue) \(page)"
        case .allObsolete(let generation, let pages): return "zap_all_fast gen \(generation) used_pages \(hex(pages))"
        case .invalidated(let start, let end): return "unmap range \(hex(start)) -- \(hex(end))"
        }
    }
}

extension PageDescription: CustomStringConvertible {
    private static let accessText = ["---", "--x", "w--", "w-x", "-u-", "-ux", "wu-", "wux"]

    package var description: String {
        let kind = (isDirect ? " direct" : "") + " " + Self.accessText[access & 7] + (isInvalid ? " invalid" : "")
        let made = isNew.map { $0 ? " new" : " existing" } ?? ""
        return "gen \(generation) gfn \(String(frame, radix: 16)) l\(level) \(entryBytes)-byte q\(quadrant)\(kind) "
            + "root \(roots) \(isUnsync ? "unsync" : "sync")\(made)"
    }
}
