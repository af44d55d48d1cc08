import Audit
import Frames
import Synchrony

/// mprotect, and the NUMA hints that change entries the same way.
extension AddressSpace {
    /// Kernel: `mprotect`. Errors: EINVAL for a bad range, and inside a huge page of a pool; EACCES to execute secret memory;
    /// ENOMEM for a hole. What lies before is changed.
    public func protect(_ range: Range<UserAddress>, _ protection: Protection) throws(Errno) {
        guard Self.isUsable(range) else { throw .EINVAL }
        mmapLock.lockForWrite()
        defer { mmapLock.unlockWrite() }
        let reached = endOfMapped(range)
        guard reached > range.lowerBound else { throw .ENOMEM }
        try protect(mapped: range.lowerBound..<reached, protection)
        if reached < range.upperBound { throw .ENOMEM }
    }

    private func protect(mapped range: Range<UserAddress>, _ protection: Protection) throws(Errno) {
        try changeEach(range) { (vma) throws(Errno) in
            if protection.execute, vma.isSecret { throw .EACCES }
            var flags = vma.flags
            flags.protection = protection
            if flags.write {
                // Private memory is charged when it may first be written. Kernel: `mprotect_fixup`.
                if !flags.shared, !flags.accounted, let part = Self.overlap(vma.range, range),
                    !mayCommit(part.upperBound.value - part.lowerBound.value)
                {
                    throw .ENOMEM
                }
                flags.accounted = flags.accounted || !flags.shared
            } else if case .anonymous = vma.backing, !vma.mayHoldAnonymous {
                flags.accounted = false
            }
            return flags
        } then: { part in
            guard let vma = find(part.lowerBound) else { return }
            changeNotified(vma, part, hint: false)
        }
    }

    /// As `change`. The notifiers hear of what lies behind the first table, once in each 512 GiB; of huge pages of a pool
    /// they hear in any case. Kernel: `change_pud_range`, `hugetlb_change_protection`; recorded on 6.18.
    private func changeNotified(_ vma: VMA, _ range: Range<UserAddress>, hint: Bool) {
        var low = range.lowerBound
        while low < range.upperBound {
            let high = min(range.upperBound, UserAddress((low.value >> 39 + 1) << 39))
            if let first = vma.hugeFile != nil ? low : firstWithTable(low..<high) {
                notifyStart(first..<high)
                change(vma, first..<high, hint: hint)
                notifyEnd(first..<high)
            }
            low = high
        }
    }

    /// Makes the present entries of `range` inaccessible, so that the next access tells where it comes from.
    /// The frames stay. Kernel: `change_prot_numa`. Shared mappings of objects and special entries are left alone.
    public func hintNUMA(_ range: Range<UserAddress>) {
        mmapLock.lockForRead()
        defer { mmapLock.unlockRead() }
        var index = firstIndex(endingAfter: range.lowerBound)
        while index < vmas.count, let part = Self.overlap(vmas[index].range, range) {
            let vma = vmas[index]
            index += 1
            guard vma.hugeFile == nil, vma.flags.isAccessible, !vma.flags.pfnMap, !vma.flags.mixedMap, !vma.flags.shared
            else { continue }
            changeNotified(vma, part, hint: true)
        }
    }

    /// Gives every entry of `range` the VMA's rights, or takes all away as a hint. Kernel: `change_protection`.
    private func change(_ vma: VMA, _ range: Range<UserAddress>, hint: Bool) {
        forEachGigantic(in: range) { low, word in changeEntry(vma, low, word, .page1G, hint: hint) }
        forEachMiddle(in: range) { part, word, table in
            let seen = HostEntry(word.load())
            if seen.isLargeLeaf {
                if part.upperBound.value - part.lowerBound.value == PageLevel.page2M.bytes {
                    changeEntry(vma, part.lowerBound, word, .page2M, hint: hint)
                    return
                }
                splitHuge(part.lowerBound, word, table)
            }
            let now = HostEntry(word.load())
            guard now.isPresent, !now.isLargeLeaf else { return }
            for page in part.lowerBound.page..<part.upperBound.page {
                let last = memory.entry(Int(page & 511), of: now.frame)
                let seen = HostEntry(last.peek())
                if seen.isMigrating { _ = last.fetchAnd(~HostEntry.wasWritable) }
                if seen.mapsFrame {
                    changeEntry(vma, UserAddress(page << pageShift), last, .page4K, hint: hint)
                }
            }
        }
    }

    private func changeEntry(
        _ vma: VMA, _ address: UserAddress, _ word: AtomicWord, _ level: PageLevel, hint: Bool
    ) {
        pageTableLock.lock()
        defer { pageTableLock.unlock() }
        // Accessed and dirty may be set by the processor meanwhile: try until nothing changed in between.
        while true {
            let old = HostEntry(word.peek())
            guard old.mapsFrame, level == .page4K || old.isLargeLeaf else { return }
            if hint && old.isSpecial { return }
            let new =
                hint
                ? old.clearing(HostEntry.present | HostEntry.writable).setting(HostEntry.protectNone)
                : withRights(of: vma, old)
            if new == old { return }
            if new.isWritable { memory.willWrite(new.frame, count: Int(level.frames)) }
            if word.compareExchange(expected: old.bits, desired: new.bits) != nil { continue }
            memory.record(
                Event(
                    .hostEntrySet, frame: new.frame, guest: address.page, level: level.rawValue, value: new.bits,
                    extra: old.bits))
            return
        }
    }
}
