import Audit
import Frames
import GuestMemory

/// One event in one line, for `--verbose`.
enum EventText {
    static func line(_ event: Event) -> String {
        var parts = [words(event.kind).padded(20)]
        if event.holder != .primary { parts.append("by \(event.holder)") }
        if event.guest != Event.none { parts.append("\(isVirtual(event.kind) ? "page" : "gfn") \(hex(event.guest))") }
        if event.frame != Event.none { parts.append("pfn \(hex(event.frame))") }
        if event.level > 0 { parts.append("level \(event.level)") }
        switch event.kind {
        case .entryInstalled, .entryZapped, .entryChanged, .tableLinked, .tableRemoved:
            parts.append("\(hex(event.extra)) → \(hex(event.value))")
        case .hostEntrySet, .hostEntryCleared: parts.append(hex(event.value))
        case .released: parts.append("\(ReleaseKind(rawValue: UInt8(truncatingIfNeeded: event.value)) ?? .unused)")
        case .snapshot: parts.append("seq \(event.value)")
        case .dirtyHarvested, .dirtyCleared: parts.append("mask \(address(event.value))")
        case .mmioRead, .mmioWrite: parts.append("at \(address(event.extra))")
        default: break
        }
        return parts.joined(separator: "  ")
    }

    private static func isVirtual(_ kind: Event.Kind) -> Bool {
        switch kind {
        case .notifierStart, .notifierEnd, .hostEntrySet, .hostEntryCleared, .copyOnWrite: true
        default: false
        }
    }

    /// The case's name with blanks: `entryInstalled` gives `entry installed`.
    static func words(_ kind: Event.Kind) -> String {
        var text = ""
        for character in "\(kind)" {
            if character.isUppercase { text += " " }
            text += character.lowercased()
        }
        return text
    }
}
