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
    /// The policy and the MMU under which its code runs; nil: any.
    public let policy: PolicyName?
    public let architecture: Architecture?
    /// Scenarios of `Scenarios/` in which it shows: the first was written for it, the second was not.
    public let scenarios: [String]
    /// The fewest preemptions that show it, in each of them.
    public let fewest: [Int]

    init(
        _ name: String, _ defect: Defect, _ mechanism: String, _ reference: String, policy: PolicyName? = nil,
        architecture: Architecture? = nil, _ scenarios: [(String, Int)]
    ) {
        self.name = name
        self.defect = defect
        self.mechanism = mechanism
        self.reference = reference
        self.policy = policy
        self.architecture = architecture
        self.scenarios = scenarios.map(\.0)
        fewest = scenarios.map(\.1)
    }

    public static let all: [Exhibit] = ofTheCore + ofTheLog + ofX86

    /// Mistakes in KVM's own code.
    private static let ofTheCore: [Exhibit] = [
        Exhibit(
            "unowned-put", .unownedPut,
            "a page found in a PFN map is put at the fault's end though none was got: it is freed under its owner",
            "CVE-2021-22543; generic 10.1, I-2", policy: .guess, [("counted-pfnmap", 0), ("race-buffer-move", 0)]),
        Exhibit(
            "tail-page-refused", .tailPageRefused,
            "a PFN-mapped page whose count is 0 is taken for no page at all: KVM_RUN fails with EFAULT",
            "the series' cover letter; generic 10.3, I-5",
            [("virtio-gpu-blob", 0), ("buffer-eviction-while-mapped", 0)]),
        Exhibit(
            "snapshot-after-translate", .snapshotAfterTranslate,
            "the invalidation count is read after the translation: an invalidation in between is not seen",
            "generic 2.8 step 1, I-8", [("race-fault-unmap", 1), ("race-buffer-move", 1)]),
        Exhibit(
            "retry-check-missing", .retryCheckMissing,
            "the entry is made without the check for an invalidation: it maps a page that was taken away",
            "generic 3.3, I-6", [("race-fault-unmap", 1), ("race-write-discard", 1)]),
        Exhibit(
            "sequence-bumped-early", .sequenceBumpedEarly,
            "the count goes up when the invalidation begins: a fault that starts during it is not refused after it",
            "generic 3.2, 3.4", architecture: .riscvSv39x4, [("race-fault-unmap", 1), ("race-write-discard", 1)]),
        Exhibit(
            "in-progress-dropped-early", .inProgressDroppedEarly,
            "the invalidation is over for the retry check before its count goes up",
            "generic 3.2 (the order of the end), I-6", [("race-fault-unmap", 2), ("race-buffer-move", 2)]),
        Exhibit(
            "release-after-unlock", .releaseAfterUnlock,
            "the page is marked dirty after mmu_lock was dropped, when its mapping may be clean or gone",
            "generic 2.9, 3.5, I-10", [("race-two-vcpus", 0), ("anonymous", 0)]),
        Exhibit(
            "flush-missing", .flushMissing,
            "the notifier's start returns without the flush: a vCPU goes on using the page through its TLB",
            "generic 3.2, I-13, X11", [("race-write-discard", 0), ("race-fork-write", 0)]),
        Exhibit(
            "log-bit-taken-late", .logBitTakenLate,
            "GET_DIRTY_LOG write-protects first and takes the bit then: a fault in between sets a bit that is lost",
            "generic 5.3, X47", [("race-dirty-log", 2), ("race-dirty-log-two", 2)]),
        Exhibit(
            "fast-fault-unlogged", .fastFaultUnlogged,
            "the lockless path gives W back and does not log the page: the write is lost to migration",
            "x86 2.6, I-12", [("dirty-logging", 0), ("race-dirty-log", 0)]),
    ]

    public static func named(_ name: String) -> Exhibit? { all.first { $0.name == name } }
}
