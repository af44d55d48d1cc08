import Machine

extension Exhibit {
    /// Mistakes of those who use the dirty log. KVM does nothing wrong in any of them.
    static let ofTheLog: [Exhibit] = [
        Exhibit(
            "trailing-pages-not-skipped", .trailingPagesNotSkipped,
            "the clean pages at a slot's end are not skipped in a differential snapshot: the next slots' pages are misplaced",
            "firecracker #5696 and #5705; LOG-1", [("diff-snapshot", 0), ("race-snapshot", 0)]),
        Exhibit(
            "second-from-first", .secondFromFirst,
            "a second migration copies only what the log names since the first, to a destination that has nothing",
            "propolis #232; LOG-1", [("precopy", 0), ("precopy-dma", 0)]),
        Exhibit(
            "runs-on-after-harvest", .runsOnAfterHarvest,
            "the last harvest is made, and then vCPUs and devices are stopped: what they write in between is lost",
            "cloud-hypervisor #8361; LOG-1", [("race-precopy", 1), ("race-snapshot", 1)]),
        Exhibit(
            "own-writes-unlogged", .ownWritesUnlogged,
            "what the VMM writes through its own mapping is in no log",
            "cloud-hypervisor #2458, #2497, #5356; LOG-1", [("precopy", 0), ("race-precopy", 0)]),
        Exhibit(
            "device-writes-unlogged", .deviceWritesUnlogged,
            "what a device writes by DMA is in no log",
            "cloud-hypervisor #7738, #8528; LOG-1", [("precopy-dma", 0), ("diff-snapshot", 0)]),
        Exhibit(
            "marked-before-write", .markedBeforeWrite,
            "the VMM marks a page and then writes it: a harvest in between takes the mark and copies the old page",
            "generic 2.19 (KVM marks after the write); LOG-1", [("race-precopy", 1), ("race-precopy-manual", 1)]),
        Exhibit(
            "resident-taken-for-dirty", .residentTakenForDirty,
            "a differential snapshot has the pages that mincore reports: a dirty page on the swap device is left out",
            "firecracker #5274; LOG-1", [("diff-snapshot", 0), ("race-snapshot", 0)]),
        Exhibit(
            "new-slot-taken-for-clean", .newSlotTakenForClean,
            "a slot that was added is harvested before it is logged, and no log is taken for no dirty page",
            "generic 5.3 (ENOENT without a bitmap); LOG-1", [("precopy", 0), ("precopy-dma", 0)]),
        Exhibit(
            "copied-before-logging", .copiedBeforeLogging,
            "everything is copied, and then logging is turned on: what was written in between is in neither",
            "generic 5.5; LOG-1", [("race-precopy-start", 1), ("precopy-dma", 1)]),
        Exhibit(
            "cleared-after-copy", .clearedAfterCopy,
            "with manual protection pages are copied and then cleared: CLEAR takes the mark of a write in between",
            "generic 5.4; LOG-1", [("race-precopy-manual", 1), ("precopy-manual", 1)]),
    ]
}
