/// The rules on `kvm_mmu_set_spte`: one leaf as a fault or a prefetch has just written it.
/// Spec: x86 X12, X21, X48; 2.11, 3.4, 4.5, 10, 12.4.
extension MachineAudit {
    func install(_ event: EntrySet, thread: inout TracedThread, at moment: Moment) {
        closeWindows(of: thread.id, at: moment)
        link(&thread, table: UInt32(truncatingIfNeeded: event.at >> 12), at: moment)
        recording.format.count(event.entry)
        guard let format = recording.format.decided else {
            rules.skip(.mmuPresent, "the entry format could not be told yet")
            return
        }
        let entry = DecodedEntry(raw: event.entry, format: format, level: event.level)
        let role = role(of: event, in: thread)
        if case .fault(let request) = role {
            let mask = pages(level: event.level) - 1
            recording.learnEncryptionBit(installed: entry.hostFrame, requested: request.hostFrame & ~mask)
        }
        checkPrinted(event, entry, at: moment)
        let isLeaf = checkEntry(entry, frame: event.frame, at: moment)
        if entry.isPresent, !isLeaf, !sawChange {
            rules.check(
                .alignment, false, at: moment,
                "level \(event.level) leaf \(hex(event.entry)) for gfn \(hex(event.frame)) lacks bit 7: it would be "
                    + "read as a pointer to a table")
        }
        tally.countEntry(entry, prefetched: role.isPrefetch)
        guard isLeaf else { return }
        checkRole(role, event, entry, at: moment)
        checkOvertaken(event, thread: thread, at: moment)
        checkShadowed(event.frame, entry, at: moment)
        remember(event, entry, at: moment)
        if case .fault = role {
            thread.answered = true
            thread.faultEntryAt = event.at
        }
    }

    /// What an entry is to the request before it in the same thread: the answer, a neighbour, or unrelated.
    private enum Role {
        case fault(EntryRequested)
        case prefetch(faultAt: UInt64?)
        case unknown

        var isPrefetch: Bool {
            if case .prefetch = self { return true }
            return false
        }
    }

    private func role(of event: EntrySet, in thread: TracedThread) -> Role {
        guard let request = thread.request else { return .unknown }
        let base = request.frame & ~(pages(level: event.level) - 1)
        if !thread.answered, event.frame == base, event.level <= request.level { return .fault(request) }
        return .prefetch(faultAt: thread.faultEntryAt)
    }

    private func checkRole(_ role: Role, _ event: EntrySet, _ entry: DecodedEntry, at moment: Moment) {
        switch role {
        case .unknown: break
        case .fault(let request):
            let requested = request.hostFrame & ~(pages(level: event.level) - 1)
            rules.check(
                .requestedInstalled, entry.hostFrame & ~(recording.encryptionBit >> 12) == requested, at: moment,
                "gfn \(hex(event.frame)), level \(event.level): pfn \(hex(entry.hostFrame)) was installed, "
                    + "\(hex(requested)) was requested")
        case .prefetch(let faultAt):
            checkPrefetch(event, entry, faultAt: faultAt, at: moment)
        }
    }

    private func checkPrefetch(_ event: EntrySet, _ entry: DecodedEntry, faultAt: UInt64?, at moment: Moment) {
        rules.check(
            .prefetchAccessed, !entry.accessed, at: moment,
            "prefetched entry \(hex(event.entry)) for gfn \(hex(event.frame)) has A set, but nobody used it yet")
        guard let faultAt else {
            rules.skip(.prefetchGroup, "the fault's own entry was not written")
            return
        }
        rules.check(
            .prefetchGroup, event.level == 1 && event.at >> 6 == faultAt >> 6, at: moment,
            "entry for gfn \(hex(event.frame)), level \(event.level), at \(hex(event.at)) belongs to the fault whose "
                + "entry is at \(hex(faultAt)): a prefetch is 4K and stays in the aligned 64 bytes around it")
    }

    private func checkPrinted(_ event: EntrySet, _ entry: DecodedEntry, at moment: Moment) {
        let same =
            event.printedWrite == entry.canWrite && event.printedExecute == entry.canExecute
            && (event.printedUser ?? entry.isUser) == entry.isUser
        rules.check(
            .printedFlags, same, at: moment,
            "entry \(hex(event.entry)) for gfn \(hex(event.frame)) is printed as "
                + "r\(event.printedWrite ? "w" : "-")\(event.printedExecute ? "x" : "-")"
                + "\(event.printedUser.map { $0 ? "u" : "-" } ?? ""), its bits say "
                + "r\(entry.canWrite ? "w" : "-")\(entry.canExecute ? "x" : "-")\(entry.isUser ? "u" : "-")")
    }

    /// Request and installation are one critical section of `mmu_lock`, and a notifier call needs that lock: one that
    /// began after the request and is over before the installation cannot exist. Spec: x86 X12, generic I-6.
    private func checkOvertaken(_ event: EntrySet, thread: TracedThread, at moment: Moment) {
        guard thread.request != nil else { return }
        guard !slots.isEmpty else {
            rules.skip(.staleInstall, "no slot marks: host ranges cannot be placed in the guest")
            return
        }
        if let why = why(.staleInstall) {
            rules.skip(.staleInstall, why)
            return
        }
        let window = overtakingWindow(frame: event.frame, level: event.level, thread: thread, now: moment.time)
        rules.check(
            .staleInstall, window == nil, at: moment,
            "gfn \(hex(event.frame)) was looked up at line \(thread.requestLine), an invalidation covering it ran at "
                + "lines \(window?.openLine ?? 0) to \(window?.closeLine ?? 0), and the old pfn "
                + "\(hex(event.entry >> 12 & (1 << 40 - 1))) was installed after it: the fault should have retried")
    }

    private func remember(_ event: EntrySet, _ entry: DecodedEntry, at moment: Moment) {
        let known = history.entry(space: 0, level: event.level, frame: event.frame)
        let table = UInt32(truncatingIfNeeded: event.at >> 12)
        if sawChange {
            // The change event before this one has already told; only the table is new. A value re-read here may be
            // newer than that change, and the next one starts from it.
            if known.state == .never {
                history.recordLeaf(
                    entry, space: 0, frame: event.frame, table: table, line: Self.short(moment.line), chained: false)
            }
            return
        }
        checkHostFrame(event, entry, known: known, table: table, at: moment)
        history.recordLeaf(
            entry, space: 0, frame: event.frame, table: table, line: Self.short(moment.line), chained: false)
    }

    /// Shadow-MMU zaps of leaves leave no event, so a changed pfn is wrong only if nothing since the last write could
    /// have zapped the entry. Spec: x86 X21, 10.
    private func checkHostFrame(
        _ event: EntrySet, _ entry: DecodedEntry, known: KnownEntry, table: UInt32, at moment: Moment
    ) {
        guard known.table == table, known.state == .present || known.state == .lost else { return }
        if known.state == .lost || (known.entry ^ entry.raw) & EntryBits.address == 0 {
            rules.held(.sameHostFrame)
            return
        }
        guard slots.slot(holding: event.frame) != nil else {
            rules.skip(.sameHostFrame, "no slot marks: a notifier range or a slot change may have zapped the entry")
            return
        }
        rules.suspect(
            .sameHostFrame, needsNotifierEvents: true, at: moment,
            "gfn \(hex(event.frame)), level \(event.level): the entry at \(hex(event.at)) went from pfn "
                + "\(hex((known.entry & EntryBits.address) >> 12)) (line \(known.setAt)) to \(hex(entry.hostFrame)), "
                + "and nothing zapped it in between")
    }
}
