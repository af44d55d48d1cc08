import Audit
import Frames
import GuestMemory
import HostMemory

/// What one step gave.
public enum StepOutcome: Sendable, Equatable {
    case done
    /// The last value read.
    case value(UInt64)
    case emulated
    case mmio
    /// The guest was not entered: its dirty ring is full.
    case dirtyRingFull
    /// EFAULT, and KVM said of which page.
    case memoryFault
    /// The guest's own page fault.
    case pageFault
    case error(Errno)
    /// Pages of the slot that GET_DIRTY_LOG reported, or guest frames of a dirty ring, ascending.
    case pages([UInt64])
}

public struct StepResult: Sendable, Equatable {
    public var phase: Int
    public var task: Int
    public var step: Int
    public var outcome: StepOutcome
    /// Whether it is what the plan expects.
    public var expected: Bool
    /// The repetition that went another way, for a step with a count.
    public var repetition: Int
    /// The journal's events of the step.
    public var events: Range<Int>
}

/// The state of one region's pages at the end of the phases, before anything is taken down.
public struct RegionState: Sendable, Equatable {
    public var region: Int
    /// Pages that have a host entry.
    public var mapped = 0
    public var pagesWithFrames = 0
    /// Pages whose page frame is accessed, dirty, by who set it; index is `Originator.rawValue`.
    public var accessedBy = [Int](repeating: 0, count: Originator.allCases.count)
    public var dirtyBy = [Int](repeating: 0, count: Originator.allCases.count)
    /// Host entries with the accessed and the dirty bit.
    public var entriesAccessed = 0
    public var entriesDirty = 0
    /// Pages with a stage-2 leaf.
    public var guestMapped = 0
    public var guestWritable = 0
    /// Smallest and largest reference count of the pages that have page frames.
    public var lowestCount = Int.max
    public var highestCount = 0
    public init(region: Int) { self.region = region }
}

/// Everything a run gave.
public struct RunOutcome: Sendable {
    public var plan: Plan
    public var architecture: Architecture
    public var policy: PolicyName
    public var steps: [StepResult]
    public var events: [Event]
    public var findings: [Finding]
    /// What KVM still holds at the end; nothing, if all is well.
    public var holdings: [Holding]
    public var statistics: [StatisticExpectation]
    /// Statistics that differ from the plan's expectations: name, expected, found.
    public var statisticMismatches: [(StatisticName, expected: UInt64, found: UInt64)]
    /// All of KVM's counters in its own order: the VM's, and then each vCPU's.
    public var counters: [[NamedCounter]] = []
    public var regions: [RegionState]
    public var totals: EventTotals

    /// Steps that did not give what the plan expects.
    public var unexpected: [StepResult] { steps.filter { !$0.expected } }
    /// Nothing found, everything as expected.
    public var isClean: Bool {
        findings.isEmpty && holdings.isEmpty && unexpected.isEmpty && statisticMismatches.isEmpty
    }
}

/// How often things happened, for the summary.
public struct EventTotals: Sendable, Equatable {
    public var faults = 0
    public var retries = 0
    public var referencesTaken = 0
    public var referencesDropped = 0
    public var pinsTaken = 0
    public var releasedUnused = 0
    public var releasedClean = 0
    public var releasedDirty = 0
    public var entriesInstalled = 0
    public var entriesZapped = 0
    public var flushes = 0
    public var notifierRanges = 0

    public init(_ events: [Event]) {
        for event in events {
            switch event.kind {
            case .fault: faults += 1
            case .retry: retries += 1
            case .referenceTaken where event.holder.isKVM: referencesTaken += 1
            case .referenceDropped where event.holder.isKVM: referencesDropped += 1
            case .pinTaken where event.holder.isKVM: pinsTaken += 1
            case .released:
                switch ReleaseKind(rawValue: UInt8(truncatingIfNeeded: event.value)) {
                case .unused: releasedUnused += 1
                case .clean: releasedClean += 1
                case .dirty: releasedDirty += 1
                case nil: break
                }
            case .entryInstalled: entriesInstalled += 1
            case .entryZapped: entriesZapped += 1
            case .flush: flushes += 1
            case .notifierStart: notifierRanges += 1
            default: break
            }
        }
    }
}
