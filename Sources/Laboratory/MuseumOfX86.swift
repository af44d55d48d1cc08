import Machine

extension Exhibit {
    /// Mistakes of x86's MMUs: of the shadow MMU first, then of the TDP MMU.
    static let ofX86: [Exhibit] = [
        Exhibit(
            "reread-too-early", .rereadTooEarly,
            "the guest's entry is compared before its table is shadowed and so protected: a store in between is never seen",
            "x86 4.5 (c), X54", architecture: .x86Shadow, [("race-shadow-walk", 0), ("race-shadow-log", 0)]),
        Exhibit(
            "shadowed-unflushed", .shadowedUnflushed,
            "a guest table is write-protected and no TLB flushed: a vCPU goes on writing what counts as protected",
            "x86 4.1, F3, X48", architecture: .x86Shadow, [("race-shadow-walk", 0), ("shadow-own-tables", 0)]),
        Exhibit(
            "protection-unflushed", .protectionUnflushed,
            "write-protecting flushes only if W was still there: the log had taken it, and not flushed yet",
            "x86 5 (F3, even if W was already 0), X48", architecture: .x86Shadow,
            [("race-shadow-log", 1), ("race-shadow-clear-log", 1)]),
        Exhibit(
            "unsync-unmarked", .unsyncUnmarked,
            "a table that is out of sync is linked and its parents are not told: a flush does not find it",
            "x86 4.2, X50", architecture: .x86Shadow, [("shadow-unsync", 0), ("shadow-write-protect", 0)]),
        Exhibit(
            "sync-unprotected", .syncUnprotected,
            "a flush reads an out-of-sync table that vCPUs can still write: what they store meanwhile is lost",
            "x86 4.7, X48, X51", architecture: .x86Shadow, [("race-shadow-sync", 0), ("shadow-unsync", 0)]),
        Exhibit(
            "sync-unflushed", .syncUnflushed,
            "a flush takes entries away and leaves them in the other vCPUs' TLBs, where no notifier finds them",
            "x86 5, F12", architecture: .x86Shadow, [("race-shadow-shootdown", 1), ("race-shadow-exchange", 1)]),
        Exhibit(
            "host-write-assumed", .hostWriteAssumed,
            "a flush gives W to an entry whose page the process may only read: the guest writes the zero page",
            "x86 4.7, X57", architecture: .x86Shadow, [("shadow-unsync", 0), ("shadow-zero-page", 0)]),
        Exhibit(
            "table-write-unheard", .tableWriteUnheard,
            "the emulator stores over a guest's table and what was made of it stays: the guest's change has no effect",
            "x86 4.8", architecture: .x86Shadow, [("shadow-write-protect", 0), ("race-shadow-table", 0)]),
        Exhibit(
            "prefetch-unguarded", .prefetchUnguarded,
            "neighbours are mapped ahead while an invalidation runs: one of them is the page that goes",
            "x86 4.5, X14", architecture: .x86Shadow, [("race-shadow-unmap", 1), ("race-shadow-punch", 1)]),
        Exhibit(
            "frame-moved-unmapped", .frameMovedUnmapped,
            "an entry maps the same page for another guest frame and stays in the first one's reverse map: no notifier finds it",
            "x86 4.5, X53", architecture: .x86Shadow, [("shadow-two-frames", 0), ("shadow-window", 0)]),
        Exhibit(
            "freed-unflushed", .freedUnflushed,
            "shadow pages are freed at once: a vCPU may still walk them, and whose table it is then nobody knows",
            "x86 4.9, F10, X56", architecture: .x86Shadow, [("race-shadow-zap", 0), ("race-shadow-table", 0)]),
        Exhibit(
            "obsolete-left", .obsoleteLeft,
            "a deletion changes the generation and zaps no page: the next one makes the old pages current again",
            "x86 3.7, 4.9, X62", architecture: .x86Shadow, [("race-shadow-zap", 0), ("memslot-delete", 0)]),
        Exhibit(
            "generation-ignored", .generationIgnored,
            "an entry that says \"no memory\" is believed whatever its generation: a new slot stays a device for ever",
            "x86 1.5, 2.8, X27", architecture: .x86TDP, [("race-mmio-slot", 0), ("memslot-delete", 0)]),
        Exhibit(
            "fast-write-unasked", .fastWriteUnasked,
            "the lockless path gives W to a leaf that has no MW: the guest writes a page that is the host's to copy",
            "x86 2.6, X19", architecture: .x86TDP, [("zero-page", 0), ("copy-on-write", 0)]),
        Exhibit(
            "split-uncounted", .splitUncounted,
            "a huge page is split and the statistics still count it whole",
            "x86 3.6, X36", architecture: .x86TDP, [("race-eager-split", 0), ("huge-page-logged", 0)]),
        Exhibit(
            "frozen-overwritten", .frozenOverwritten,
            "a fault takes the frozen entry of a table that is going for an empty one: its leaf goes with the table",
            "x86 3.3, 3.4, X28", architecture: .x86TDP, [("race-log-end", 1), ("race-ring-end", 1)]),
    ]
}
