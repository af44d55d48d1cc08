import Audit
import Frames
import GuestMemory
import HostMemory
import Machine

/// One guest fault, told from its events: which frame was found, whose reference was taken, what was installed, how it
/// was released.
struct FaultStory: Equatable {
    var guest: UInt64 = 0
    var access: AccessKind = .read
    var frame: UInt64?
    var isMapped = false
    var isWritable = false
    var referencesTaken = 0
    var heuristicReferences = 0
    var error: TranslationError?
    var installed: (level: UInt8, entry: UInt64)?
    var upgraded = false
    var releases: [ReleaseKind] = []
    var retries = 0
    var outcome: UInt64 = 0

    static func == (a: FaultStory, b: FaultStory) -> Bool {
        a.guest == b.guest && a.sentence == b.sentence
    }

    /// Everything but the frame numbers: faults with the same sentence are told together.
    var sentence: String {
        var parts: [String] = []
        if let error { parts.append("no translation: \(Self.text(error))") }
        if frame != nil {
            parts.append(reference)
            if let installed {
                let size = installed.level == 1 ? "4K" : installed.level == 2 ? "2M" : "1G"
                parts.append("\(upgraded ? "upgraded" : "installed") \(size) \(isWritable ? "rw" : "r-")")
            }
            parts.append(release)
        } else if error == nil, upgraded {
            parts.append("fast path: entry upgraded, no page touched")
        }
        if retries > 0 { parts.append(counted(retries, "retry", "retries")) }
        if outcome >= 100 {
            parts.append(
                "KVM_RUN fails: \(Errno(rawValue: Int32(outcome - 100)).map { "\($0)" } ?? "errno \(outcome - 100)")")
        } else if let text = Self.outcomes[Int(outcome)] {
            parts.append(text)
        }
        return parts.joined(separator: " · ")
    }

    private var reference: String {
        if heuristicReferences > 0, isMapped { return "PFN-mapped, reference guessed" }
        if isMapped { return "PFN-mapped, no reference" }
        if heuristicReferences > 0 { return "GUP, \(counted(referencesTaken, "reference")), then guessed" }
        return "GUP, \(counted(referencesTaken, "reference"))"
    }

    private var release: String {
        if releases.isEmpty { return isMapped ? "nothing to release" : "not released" }
        return "released "
            + releases.map { kind in
                switch kind {
                case .unused: "unused"
                case .clean: "accessed"
                case .dirty: "dirty"
                }
            }.joined(separator: ", ")
    }

    private static let outcomes: [Int: String] = [1: "retry", 2: "emulated", 3: "write-tracked", 6: "spurious"]

    static func text(_ error: TranslationError) -> String {
        switch error {
        case .fault: "FAULT"
        case .hardwarePoison: "HWPOISON"
        case .readOnly: "RO_FAULT"
        case .signalPending: "SIGPENDING"
        case .needsIO: "NEEDS_IO"
        case .noSlot: "no slot"
        }
    }

    /// The faults among `events`, in order. Events of one step belong to one task.
    static func all(in events: ArraySlice<Event>) -> [FaultStory] {
        var stories: [FaultStory] = []
        var current: FaultStory?
        for event in events {
            if event.kind == .fault {
                current = FaultStory()
                current?.guest = event.guest
                current?.access = AccessKind(rawValue: UInt8(truncatingIfNeeded: event.value)) ?? .read
            }
            current?.add(event)
            if event.kind == .faultResolved, let story = current {
                stories.append(story)
                current = nil
            }
        }
        return stories
    }

    private mutating func add(_ event: Event) {
        switch event.kind {
        case .translated:
            frame = event.frame
            isWritable = event.value & 1 != 0
            isMapped = event.value & 4 != 0
        case .translationFailed where event.holder == .guestFault:
            error = TranslationError.allCases[Int(event.value)]
        case .referenceTaken where event.holder == .guestFault: referencesTaken += 1
        case .referenceTaken where event.holder == .heuristic: heuristicReferences += 1
        case .released: releases.append(ReleaseKind(rawValue: UInt8(truncatingIfNeeded: event.value)) ?? .unused)
        case .entryInstalled: installed = (event.level, event.value)
        case .entryChanged:
            upgraded = true
            if frame != nil { installed = (event.level, event.value) }
        case .retry: retries += 1
        case .faultResolved: outcome = event.value
        default: break
        }
    }
}
