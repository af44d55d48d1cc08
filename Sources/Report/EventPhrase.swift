import Audit
import Frames
import GuestMemory
import Machine

/// An event in a few words, for the columns of a story.
enum EventPhrase {
    static func text(_ event: Event) -> String {
        let page = hex(event.guest)
        let frame = hex(event.frame)
        return switch event.kind {
        case .fault: "fault on gfn \(page)"
        case .faultResolved: "fault ends"
        case .snapshot: "snapshot, seq \(event.value)"
        case .translated: "gfn \(page) is pfn \(frame)"
        case .translationFailed: "no translation of gfn \(page)"
        case .retry: "retry check: stale, try again"
        case .referenceTaken: "get pfn \(frame)"
        case .referenceDropped: "put pfn \(frame)"
        case .pinTaken: "pin pfn \(frame)"
        case .pinDropped: "unpin pfn \(frame)"
        case .released: "release \(ReleaseKind(rawValue: UInt8(truncatingIfNeeded: event.value)) ?? .unused)"
        case .forgotten: "reference forgotten"
        case .markedAccessed: "pfn \(frame) accessed"
        case .markedDirty: "pfn \(frame) dirty"
        default: changes(event)
        }
    }

    private static func changes(_ event: Event) -> String {
        let page = hex(event.guest)
        let frame = hex(event.frame)
        return switch event.kind {
        case .entryInstalled: "map gfn \(page) to pfn \(frame)"
        case .entryZapped: "zap gfn \(page)"
        case .entryChanged: "change entry of gfn \(page)"
        case .tableLinked: "link a table"
        case .tableRemoved: "remove a table"
        case .flush: "flush TLBs"
        case .notifierStart: "invalidate start, page \(page)"
        case .notifierEnd: "invalidate end, page \(page)"
        case .hostEntrySet: "host page \(page) is pfn \(frame)"
        case .hostEntryCleared: "host page \(page) cleared"
        case .pageAllocated: "allocate pfn \(frame)"
        case .pageFreed: "free pfn \(frame)"
        case .copyOnWrite: "copy pfn \(hex(event.extra)) to \(frame)"
        case .tlbFill: "TLB: gfn \(page) is pfn \(frame)"
        case .hardwareAccessed: "hardware sets A, gfn \(page)"
        case .hardwareDirty: "hardware sets D, gfn \(page)"
        case .slotCreated: "slot created"
        case .slotDeleted: "slot deleted"
        case .slotMoved: "slot moved"
        case .slotFlags: "slot flags changed"
        case .dirtyLogged: "log gfn \(page)"
        case .dirtyHarvested: "report dirty \(address(event.value))"
        case .dirtyCleared: "clear dirty \(address(event.value))"
        case .mmioRead, .mmioWrite: "MMIO exit"
        case .memoryWritten: "\(Writer(rawValue: UInt8(truncatingIfNeeded: event.value)) ?? .guest) writes gfn \(page)"
        case .writeMarked: "mark gfn \(page) in the VMM's log"
        case .pageCopied: "copy gfn \(page)"
        case .writersStopped: "everything stands still"
        case .writersResumed: "everything goes on"
        default: "\(event.kind)"
        }
    }
}
