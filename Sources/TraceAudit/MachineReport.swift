extension MachineAudit {
    /// Whether there is anything to tell: slots, faults, entries or zaps.
    var isMachine: Bool {
        tally.walks + tally.pageFaults + tally.requests + tally.changes + tally.marks + tally.newTables > 0
            || !tally.entryCounts.isEmpty || tally.entriesNotPresent > 0
    }

    func report(threads: [UInt32], command: String) -> MachineReport {
        let (kind, reason) = kind()
        return MachineReport(
            process: process, threads: threads, command: command, kind: kind, kindReason: reason,
            firstLine: tally.firstLine, lastLine: tally.lastLine, events: tally.events, marks: tally.marks,
            slotChanges: tally.slotChanges, slotChangeCount: tally.slotChangeCount, runs: tally.runs,
            runCount: tally.runCount, failedRuns: tally.failedRuns, dirtyLogReads: tally.dirtyLogReads,
            dirtyPages: tally.dirtyPages,
            faults: FaultCounts(
                pageFaults: tally.pageFaults, fastFixed: tally.fastFixed, fastSpurious: tally.fastSpurious,
                fastOther: tally.fastFaults - min(tally.fastFaults, tally.fastFixed + tally.fastSpurious),
                walksRead: tally.walksRead, walksWrite: tally.walksWrite, walksFetch: tally.walksFetch,
                requests: tally.requests, emulated: tally.emulated),
            entries: tally.entryCounts, prefetched: tally.prefetched,
            notifier: NotifierCounts(
                unmapRanges: tally.notifierRanges, unmappedPages: tally.notifierPages,
                rangesInSlots: tally.notifierRangesInSlots, guestFrames: tally.notifierGuestFrames,
                ageRanges: tally.ageRanges),
            zaps: ZapCounts(
                fastZaps: tally.fastZaps, tables: MachineTally.levels(tally.zappedTables),
                leaves: MachineTally.levels(tally.zappedLeaves), newTables: tally.newTables,
                foundTables: tally.foundTables, unsynced: tally.unsynced, synced: tally.synced, splits: tally.splits,
                changes: tally.changes),
            otherEvents: otherEvents())
    }

    private func kind() -> (MachineReport.Kind, String) {
        if sawChange { return (.tdp, "it has kvm_tdp_mmu_spte_changed events") }
        if recording.format.decided == .extended { return (.tdp, "its entries have the EPT format") }
        if sawShadowTable { return (.shadow, "it has shadow pages of guest page tables") }
        return (.unknown, "no event tells the two apart")
    }

    private func otherEvents() -> [EventCount] {
        [
            ("async page faults", tally.asyncFaults), ("dirty ring", tally.ringEvents),
            ("emulated or cached MMIO", tally.mmioEvents + tally.mmioChecks), ("PML full", tally.logFull),
        ].filter { $0.1 > 0 }.map { EventCount(name: $0.0, count: $0.1, malformed: 0) }
    }
}
