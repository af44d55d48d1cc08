import Frames
import Synchronization

/// What KVM holds on one page, for one holder.
public struct Holding: Sendable, Equatable {
    public var frame: UInt64
    public var holder: Holder
    public var references: Int
    public var pins: Int
}

/// Hears of events as they happen, on the task that makes them and under whatever locks it holds.
open class EventObserver {
    public init() {}
    open func observe(_ event: Event) {}
    // What is no event, since nothing but a check looks at it. Frames are numbers, as in events.

    /// A guest's load, fetch or store at guest frame `guest` has reached host frame `frame`.
    open func accessed(_ guest: UInt64, _ frame: UInt64, isStore: Bool) {}
    /// Every notifier has heard of the start of an invalidation of `pages` virtual pages from `first` on, and returned.
    open func invalidationStarted(_ first: UInt64, _ pages: UInt64) {}
    /// A driver has stopped using `frames` frames from `first` on: nobody may reach them until they serve again.
    open func givenBack(_ first: UInt64, _ frames: UInt64) {}
}

/// The record of a run: every event in order, the ledger of references that KVM holds, and the rules that an event
/// broke when it happened. One journal belongs to one host; without one, nothing is recorded and nothing is paid.
///
/// Any task may record, with any lock held: the journal's own lock is innermost and never waits for another.
public final class Journal: @unchecked Sendable {
    // Unchecked: every mutable property is touched only between `enter` and `leave`, or after the tasks have ended.
    private let busy = Atomic<UInt32>(0)
    private var storage: [Event] = []
    private var ledger: [Holding] = []
    private var broken: [Finding] = []
    private var steps: [Int] = []
    /// Whether events are kept; the ledger and the findings always are.
    public let keepsEvents: Bool

    public init(keepsEvents: Bool = true) { self.keepsEvents = keepsEvents }

    private func enter() {
        while !busy.compareExchange(expected: 0, desired: 1, ordering: .acquiring).exchanged {}
    }
    private func leave() { busy.store(0, ordering: .releasing) }

    /// Who hears of each event when it has been recorded, outside of the journal's lock. Set before the tasks run.
    public var observer: EventObserver?

    /// Records `event`, updates the ledger, and checks what one event alone can break.
    public func record(_ event: Event) {
        if keepsEvents || Self.changesLedger(event.kind) {
            enter()
            note(event)
            leave()
        }
        observer?.observe(event)
    }

    /// Whether `note` does anything with an event that is not kept.
    private static func changesLedger(_ kind: Event.Kind) -> Bool {
        switch kind {
        case .referenceTaken, .referenceDropped, .pinTaken, .pinDropped, .released, .forgotten, .markedAccessed,
            .markedDirty:
            true
        default: false
        }
    }

    private func note(_ event: Event) {
        switch event.kind {
        case .referenceTaken: change(event, references: 1, pins: 0)
        case .referenceDropped: change(event, references: -1, pins: 0)
        case .pinTaken: change(event, references: 0, pins: 1)
        case .pinDropped: change(event, references: 0, pins: -1)
        case .released:
            let kind = ReleaseKind(rawValue: UInt8(truncatingIfNeeded: event.value)) ?? .unused
            if event.holder == .guestFault, kind != .unused, event.value & 0x100 == 0 {
                report(.i10, "a fault's page was released as used after mmu_lock was dropped", event)
            }
        case .forgotten:
            report(.i1, "a page's owner was dropped without a release; it was released as unused", event)
        case .markedAccessed, .markedDirty:
            if event.holder == .heuristic {
                report(.i4, "a page's state was changed through a frame number taken from an entry", event)
            }
        default: break
        }
        if keepsEvents { storage.append(event) }
    }

    private func change(_ event: Event, references: Int, pins: Int) {
        guard event.holder.isKVM else { return }
        if event.holder == .heuristic, references > 0, event.value == 0 {
            report(.i5, "a reference was taken on a PFN-mapped page because its count was not zero", event)
        }
        for i in ledger.indices where ledger[i].frame == event.frame && ledger[i].holder == event.holder {
            if ledger[i].references + references < 0 {
                let crossed = ledger[i].pins > 0
                report(
                    crossed ? .i3 : .i2,
                    crossed ? "a pin was dropped as if it were a reference" : "a reference was put that was not held",
                    event)
                return
            }
            if ledger[i].pins + pins < 0 {
                let crossed = ledger[i].references > 0
                report(
                    crossed ? .i3 : .i2,
                    crossed ? "a reference was dropped as if it were a pin" : "a pin was dropped that was not held",
                    event)
                return
            }
            ledger[i].references += references
            ledger[i].pins += pins
            if ledger[i].references == 0 && ledger[i].pins == 0 { ledger.remove(at: i) }
            return
        }
        if references < 0 || pins < 0 {
            report(.i2, "a reference was put that was not held", event)
            return
        }
        ledger.append(Holding(frame: event.frame, holder: event.holder, references: references, pins: pins))
    }

    private func report(_ invariant: Invariant, _ reason: StaticReason, _ event: Event) {
        var finding = Finding(invariant, reason, event: storage.count)
        finding.frame = event.frame
        finding.guest = event.guest
        broken.append(finding)
    }

    /// Adds a finding that a checker made.
    public func add(_ finding: Finding) {
        enter()
        var finding = finding
        finding.event = storage.count
        broken.append(finding)
        leave()
    }

    /// Marks the beginning of a step of the scenario: the index of its first event.
    public func beginStep() {
        enter()
        steps.append(storage.count)
        leave()
    }

    /// Everything recorded, in order. Copies; call it after the tasks have ended.
    public var events: [Event] {
        enter()
        defer { leave() }
        return storage
    }
    /// What KVM holds now, by page and holder.
    public var holdings: [Holding] {
        enter()
        defer { leave() }
        return ledger
    }
    public var findings: [Finding] {
        enter()
        defer { leave() }
        return broken
    }
    /// The first event of each step.
    public var stepStarts: [Int] {
        enter()
        defer { leave() }
        return steps
    }
    public var count: Int {
        enter()
        defer { leave() }
        return storage.count
    }

    /// I-1, I-17: with KVM idle, the ledger is empty, but for the holders named in `longLived`. Adds a finding for each
    /// holding that is not.
    public func checkQuiescent(longLived: [Holder] = []) {
        for holding in holdings where !longLived.contains(holding.holder) {
            add(
                Finding(
                    .i1, "KVM still holds a reference though it is idle", frame: HostFrame(holding.frame)))
        }
    }
}
