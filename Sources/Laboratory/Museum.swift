import Machine
import Synchrony

/// A mistake that was made, or nearly, in the systems that this one models, and that can be made here again.
public struct Exhibit: Sendable {
    /// As the command knows it.
    public let name: String
    public let defect: Defect
    /// What the code does wrong, and what comes of it.
    public let mechanism: String
    /// Where it was, or what rule it breaks.
    public let reference: String
    /// The policy under which its code runs; nil: any.
    public let policy: PolicyName?
    /// Scenarios of `Scenarios/` in which it shows: the first was written for it, the second was not.
    public let scenarios: [String]

    public static let all: [Exhibit] = [
        Exhibit(
            name: "unowned-put", defect: .unownedPut,
            mechanism: "a page found in a PFN map is put at the fault's end though none was got: it is freed under its owner",
            reference: "CVE-2021-22543; generic 10.1, I-2", policy: .guess,
            scenarios: ["counted-pfnmap", "race-buffer-move"]),
        Exhibit(
            name: "tail-page-refused", defect: .tailPageRefused,
            mechanism: "a PFN-mapped page whose count is 0 is taken for no page at all: KVM_RUN fails with EFAULT",
            reference: "the series' cover letter; generic 10.3, I-5", policy: nil,
            scenarios: ["virtio-gpu-blob", "race-buffer-move"]),
        Exhibit(
            name: "snapshot-after-translate", defect: .snapshotAfterTranslate,
            mechanism: "the invalidation count is read after the translation: an invalidation in between is not seen",
            reference: "generic 2.8 step 1, I-8", policy: nil, scenarios: ["race-fault-unmap", "race-fork-write"]),
        Exhibit(
            name: "retry-check-missing", defect: .retryCheckMissing,
            mechanism: "the entry is made without the check for an invalidation: it maps a page that was taken away",
            reference: "generic 3.3, I-6", policy: nil, scenarios: ["race-fault-unmap", "race-write-discard"]),
        Exhibit(
            name: "sequence-bumped-early", defect: .sequenceBumpedEarly,
            mechanism: "the count goes up when the invalidation begins: a fault that starts during it is not refused after it",
            reference: "generic 3.2, 3.4", policy: nil, scenarios: ["race-fault-unmap", "race-write-discard"]),
        Exhibit(
            name: "in-progress-dropped-early", defect: .inProgressDroppedEarly,
            mechanism: "the invalidation is over for the retry check before its count goes up",
            reference: "generic 3.2 (the order of the end), I-6", policy: nil,
            scenarios: ["race-fault-unmap", "race-fork-write"]),
        Exhibit(
            name: "release-after-unlock", defect: .releaseAfterUnlock,
            mechanism: "the page is marked dirty after mmu_lock was dropped, when its mapping may be clean or gone",
            reference: "generic 2.9, 3.5, I-10", policy: nil, scenarios: ["race-two-vcpus", "anonymous"]),
        Exhibit(
            name: "flush-missing", defect: .flushMissing,
            mechanism: "the notifier's start returns without the flush: a vCPU goes on using the page through its TLB",
            reference: "generic 3.2, I-13, X11", policy: nil, scenarios: ["race-write-discard", "race-fork-write"]),
        Exhibit(
            name: "log-bit-taken-late", defect: .logBitTakenLate,
            mechanism: "GET_DIRTY_LOG write-protects first and takes the bit then: a fault in between sets a bit that is lost",
            reference: "generic 5.3, X47", policy: nil, scenarios: ["race-dirty-log", "race-dirty-log-two"]),
        Exhibit(
            name: "fast-fault-unlogged", defect: .fastFaultUnlogged,
            mechanism: "the lockless path gives W back and does not log the page: the write is lost to migration",
            reference: "x86 2.6, I-12", policy: nil, scenarios: ["dirty-logging", "race-dirty-log"]),
    ]

    public static func named(_ name: String) -> Exhibit? { all.first { $0.name == name } }
}
