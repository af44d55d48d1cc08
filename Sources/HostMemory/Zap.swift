import Audit
import Frames
import Synchronization
import Synchrony

/// Pages whose entries are gone, to be put when no page-table lock is held. Kernel: `mmu_gather`.
struct Gather {
    private var pages: [HostFrame] = []
    private static let batch = 512

    var isFull: Bool { pages.count >= Self.batch }
    mutating func add(_ frame: HostFrame) { pages.append(frame) }

    /// Drops the reference of each entry that was cleared. No spinning lock held.
    mutating func flush(_ memory: PhysicalMemory) {
        for frame in pages { memory.put(memory.page(frame)) }
        pages.removeAll(keepingCapacity: true)
    }
}

/// Removing entries. Kernel: `zap_page_range_single`, `unmap_page_range`.
extension AddressSpace {
    /// Clears the entries of `range`, between the notifier's start and end; the pages are put after that.
    /// `mmapLock` or the backing's mapping lock held.
    /// - Parameter keepAnonymous: leave private copies alone. Kernel: `even_cows == false`.
    func zapNotified(_ range: Range<UserAddress>, keepAnonymous: Bool = false) {
        var gather = Gather()
        notifyStart(range)
        zap(range, &gather, keepAnonymous: keepAnonymous)
        notifyEnd(range)
        gather.flush(memory)
    }

    /// Clears the entries of `range`. The caller has called the notifier.
    /// - Parameter dropGuards: guards go too: the area itself does.
    func zap(
        _ range: Range<UserAddress>, _ gather: inout Gather, keepAnonymous: Bool = false, dropGuards: Bool = false
    ) {
        zapGigantic(range, &gather, keepAnonymous)
        forEachMiddle(in: range) { part, word, table in
            let seen = HostEntry(word.load())
            if seen.isLargeLeaf {
                if part.upperBound.value - part.lowerBound.value == PageLevel.page2M.bytes {
                    zapHuge(part.lowerBound, word, table, &gather, keepAnonymous)
                } else {
                    splitHuge(part.lowerBound, word, table)
                }
            }
            let now = HostEntry(word.peek())
            if now.bits != 0, !now.isLargeLeaf { zapTable(part, now.frame, &gather, keepAnonymous, dropGuards) }
            if gather.isFull { gather.flush(memory) }
        }
    }

    /// Visits the level-2 entries of `range` that are not empty, with the part of the range under each.
    func forEachMiddle(
        in range: Range<UserAddress>, _ body: (Range<UserAddress>, AtomicWord, HostFrame) -> Void
    ) {
        var address = range.lowerBound
        while address < range.upperBound {
            let skip: PageLevel
            switch middleEntry(address) {
            case .missing(let level): skip = level
            case .present(let word, let table):
                skip = .page2M
                let end = min(range.upperBound, address.aligned(to: .page2M) + PageLevel.page2M.bytes)
                if word.peek() != 0 { body(address..<end, word, table) }
            }
            address = address.aligned(to: skip) + skip.bytes
        }
    }

    private func zapHuge(
        _ low: UserAddress, _ word: AtomicWord, _ table: HostFrame, _ gather: inout Gather, _ keepAnonymous: Bool
    ) {
        pageTableLock.lock()
        defer { pageTableLock.unlock() }
        let seen = HostEntry(word.peek())
        guard seen.isLargeLeaf else { return }
        if memory.isHugeTLB(seen) {
            if !keepAnonymous || !memory.isAnonymous(memory.page(seen.frame)) { clearHuge(word, low, .page2M, &gather) }
            return
        }
        if keepAnonymous, !seen.isSpecial { return }
        // The processor may set A or D until the entry is gone: what counts is what the exchange returns.
        let old = HostEntry(word.exchange(0))
        memory.record(Event(.hostEntryCleared, frame: old.frame, guest: low.page, level: 2, value: old.bits))
        if old.isSpecial, !isHugeZero(old) { return }
        if !old.isSpecial { forget(old, &gather) }
        freeTable(withdraw(from: table))
    }

    private func zapGigantic(_ range: Range<UserAddress>, _ gather: inout Gather, _ keepAnonymous: Bool) {
        forEachGigantic(in: range) { low, word in
            pageTableLock.lock()
            let seen = HostEntry(word.peek())
            if seen.isLargeLeaf, !keepAnonymous || !memory.isAnonymous(memory.page(seen.frame)) {
                clearHuge(word, low, .page1G, &gather)
            }
            pageTableLock.unlock()
        }
    }

    private func zapTable(
        _ part: Range<UserAddress>, _ table: HostFrame, _ gather: inout Gather, _ keepAnonymous: Bool,
        _ dropGuards: Bool
    ) {
        pageTableLock.lock()
        defer { pageTableLock.unlock() }
        for page in part.lowerBound.page..<part.upperBound.page {
            let word = memory.entry(Int(page & 511), of: table)
            let seen = HostEntry(word.peek())
            if seen.bits == 0 || (keepAnonymous && isPrivateCopy(seen)) || (seen.isGuard && !dropGuards) { continue }
            clear(word, page, &gather)
        }
    }

    private func isPrivateCopy(_ entry: HostEntry) -> Bool {
        !entry.mapsFrame || (entry.mapsFrame && !entry.isSpecial && memory.isAnonymous(memory.page(entry.frame)))
    }

    /// Clears one level-1 entry. `pageTableLock` held.
    func clear(_ word: AtomicWord, _ page: UInt64, _ gather: inout Gather) {
        let old = HostEntry(word.exchange(0))
        memory.record(Event(.hostEntryCleared, frame: old.frame, guest: page, level: 1, value: old.bits))
        if old.mapsFrame {
            if !old.isSpecial { forget(old, &gather) }
        } else if old.isSwapped {
            host.swap?.release(old.slot, memory)
        }
    }

    /// A counted entry is gone: its accessed and dirty bits go to the page, its reference to the gather.
    /// Kernel: `zap_present_folio_ptes`.
    private func forget(_ old: HostEntry, _ gather: inout Gather) {
        let page = memory.page(old.frame)
        // What a process did to an anonymous page matters to nobody when it is gone. Kernel: `zap_present_folio_ptes`.
        if !memory.isAnonymous(page) { memory.noteEntryBits(old, page) }
        page.pointee.mapCount.subtract(1, ordering: .relaxed)
        gather.add(old.frame)
    }
}

extension PhysicalMemory {
    /// Moves an entry's accessed and dirty bits to its page's folio.
    func noteEntryBits(_ entry: HostEntry, _ page: UnsafeMutablePointer<PageFrame>) {
        var bits: UInt64 = 0
        if entry.isAccessed { bits |= PageFlags.accessed(.primaryEntry) }
        if entry.isDirty { bits |= PageFlags.dirty(.primaryEntry) }
        if bits != 0 { mark(head(of: page), bits) }
    }
}
