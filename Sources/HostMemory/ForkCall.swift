import Audit
import Frames
import Synchronization
import Synchrony

/// fork and exit.
extension AddressSpace {
    /// A child that shares every private page copy-on-write, and has its own copy of those that may be pinned.
    /// Error: ENOMEM. Kernel: `dup_mmap`, `copy_page_range`.
    ///
    /// The child is nobody's yet, so its own locks aren't taken. Its VMAs join their backings' lists while the list's
    /// lock is held over the copying, so that whoever takes a page away finds either no entry or a listed one.
    public func fork() throws(Errno) -> AddressSpace {
        mmapLock.lockForWrite()
        defer { mmapLock.unlockWrite() }
        precondition(!hasExited, "a fork of an address space that is gone")
        let child = AddressSpace(childIn: host)
        child.nextIdentity = nextIdentity
        for vma in vmas where vma.driver?.refusals.contains(.copies) != true {
            let twin = VMA(
                child, identity: vma.identity, range: vma.range, firstPage: vma.firstPage, flags: vma.flags,
                backing: vma.backing)
            twin.flags.locked = false
            child.vmas.append(twin)
            guard copy(vma, twin, child) else {
                child.tearDown()
                throw .ENOMEM
            }
        }
        host.enter(child)
        return child
    }

    /// Copies one VMA's entries and lists the twin. False: no memory.
    private func copy(_ vma: VMA, _ twin: VMA, _ child: AddressSpace) -> Bool {
        let list = vma.mappings
        let hasAnonymous = vma.mayHoldAnonymous
        if hasAnonymous {
            twin.anonymous.store(host.newAnonymousIdentity(), ordering: .relaxed)
            twin.hasInheritedAnonymous = true
        }
        // Elsewhere the child's own faults do as well. Kernel: `vma_needs_copy`.
        let hasGuards = vma.mayHoldGuards.load(ordering: .acquiring)
        let needsCopy = hasAnonymous || hasGuards || vma.flags.pfnMap || vma.flags.mixedMap
        let writeProtects = needsCopy && vma.flags.copiesOnWrite
        if writeProtects { notifyStart(vma.range) }
        list?.lock.lock()
        var fits = true
        twin.mayHoldGuards.store(hasGuards, ordering: .relaxed)
        if needsCopy {
            if writeProtects { writeProtectSequence.beginWrite() }
            fits = vma.hugeFile.map { copyHugeFile(vma, $0, child) } ?? copyEntries(vma, child)
            if writeProtects { writeProtectSequence.endWrite() }
        }
        list?.addLocked(twin)
        list?.lock.unlock()
        if writeProtects { notifyEnd(vma.range) }
        return fits
    }

    private func copyEntries(_ vma: VMA, _ child: AddressSpace) -> Bool {
        var fits = true
        forEachMiddle(in: vma.range) { part, word, table in
            guard fits else { return }
            guard let target = child.makeMiddleEntry(part.lowerBound) else {
                fits = false
                return
            }
            if HostEntry(word.load()).isLargeLeaf {
                switch copyHuge(vma, part.lowerBound, word, table, target, child) {
                case .done: return
                case .outOfMemory:
                    fits = false
                    return
                case .splitFirst: splitHuge(part.lowerBound, word, table)
                }
            }
            let now = HostEntry(word.load())
            guard now.isPresent, !now.isLargeLeaf else { return }
            fits = copyTable(vma, part, now.frame, target.word, child)
        }
        return fits
    }

    private enum HugeCopy { case done, splitFirst, outOfMemory }

    /// Kernel: `copy_huge_pmd`.
    private func copyHuge(
        _ vma: VMA, _ address: UserAddress, _ word: AtomicWord, _ table: HostFrame,
        _ target: (word: AtomicWord, table: HostFrame), _ child: AddressSpace
    ) -> HugeCopy {
        guard let spare = newTable() else { return .outOfMemory }
        pageTableLock.lock()
        defer { pageTableLock.unlock() }
        let seen = HostEntry(word.load())
        if isHugeZero(seen) {
            if copyHugeZero(seen, address, target, spare, child) { return .done }
            freeTable(spare)
            return .outOfMemory
        }
        guard seen.isLargeLeaf, !seen.isSpecial else {
            // A driver's huge leaf has no spare and no counts; the child faults it in itself.
            freeTable(spare)
            return seen.isLargeLeaf ? .done : .splitFirst
        }
        let head = memory.page(seen.frame)
        if memory.isExclusivelyAnonymous(head), memory.maybePinned(head) {
            freeTable(spare)
            return .splitFirst
        }
        memory.get(head)
        head.pointee.mapCount.add(1, ordering: .relaxed)
        head.pointee.flags.bitwiseAnd(~PageFlags.anonymousExclusive, ordering: .relaxed)
        let shared = writeProtect(word, address, .page2M)
        child.deposit(spare, in: target.table)
        child.setLeaf(target.word, shared.clearing(HostEntry.accessed), address, .page2M)
        return .done
    }

    private func copyTable(
        _ vma: VMA, _ part: Range<UserAddress>, _ table: HostFrame, _ target: AtomicWord, _ child: AddressSpace
    ) -> Bool {
        guard let childTable = child.makeTable(target) else { return false }
        pageTableLock.lock()
        defer { pageTableLock.unlock() }
        for page in part.lowerBound.page..<part.upperBound.page {
            let index = Int(page & 511)
            let word = memory.entry(index, of: table)
            let seen = HostEntry(word.peek())
            if seen.bits == 0 { continue }
            let address = UserAddress(page << pageShift)
            guard let entry = inherit(vma, address, word, seen) else { return false }
            child.setLeaf(memory.entry(index, of: childTable), entry, address)
        }
        return true
    }

    /// The child's entry for one of the parent's, the references counted and the parent's entry write-protected.
    /// Nil: no memory. `pageTableLock` held. Kernel: `copy_present_pte`, `copy_present_page`.
    private func inherit(
        _ vma: VMA, _ address: UserAddress, _ word: AtomicWord, _ seen: HostEntry
    ) -> HostEntry? {
        guard seen.mapsFrame else { return inheritAbsent(address, word, seen) }
        let protects = vma.flags.copiesOnWrite
        if seen.isSpecial {
            let kept = protects ? writeProtect(word, address, .page4K) : seen
            return kept.clearing(HostEntry.accessed)
        }
        let page = memory.page(seen.frame)
        if memory.isExclusivelyAnonymous(page) {
            if memory.maybePinned(page) { return copyPinned(vma, address, seen) }
            page.pointee.flags.bitwiseAnd(~PageFlags.anonymousExclusive, ordering: .relaxed)
        }
        memory.get(page)
        page.pointee.mapCount.add(1, ordering: .relaxed)
        let kept = protects ? writeProtect(word, address, .page4K) : seen
        // Nobody serves the child.
        return kept.clearing(HostEntry.accessed | HostEntry.userProtected)
    }

    /// Kernel: `copy_nonpresent_pte`.
    private func inheritAbsent(_ address: UserAddress, _ word: AtomicWord, _ seen: HostEntry) -> HostEntry {
        if seen.isSwapped { host.swap?.use(seen.slot) }
        let shared = seen.clearing(HostEntry.wasExclusive | HostEntry.wasWritable)
        if (seen.isSwapped || seen.isMigrating) && shared != seen { word.store(shared.bits) }
        return shared.clearing(HostEntry.userProtected)
    }

    /// A page that may be under DMA stays the parent's, writable; the child gets a copy at once.
    private func copyPinned(_ vma: VMA, _ address: UserAddress, _ seen: HostEntry) -> HostEntry? {
        guard let new = newAnonymousPage(vma.backingPage(of: address)) else { return nil }
        memory.copy(seen.frame, to: new)
        memory.lists?.add(memory.page(new))
        memory.record(
            Event(.copyOnWrite, frame: new, guest: address.page, value: seen.bits, extra: seen.frame.number))
        return HostEntry.leaf(new, vma.flags, writable: vma.flags.write).setting(HostEntry.dirty)
    }

    /// Takes W away and returns what the entry then is. Kernel: `ptep_set_wrprotect`.
    private func writeProtect(_ word: AtomicWord, _ address: UserAddress, _ level: PageLevel) -> HostEntry {
        let old = HostEntry(word.fetchAnd(~HostEntry.writable))
        let new = old.clearing(HostEntry.writable)
        if old != new {
            memory.record(
                Event(
                    .hostEntrySet, frame: new.frame, guest: address.page, level: level.rawValue, value: new.bits,
                    extra: old.bits))
        }
        return new
    }

    // MARK: Exit

    /// The process ends: the notifiers are released, every entry and table goes. Nobody may use the address space
    /// afterwards but to drop it. Kernel: `exit_mmap`.
    public func exit() {
        releaseNotifiers()
        mmapLock.lockForWrite()
        tearDown()
        mmapLock.unlockWrite()
        host.leave(self)
    }

    /// The part of `exit` that follows the notifiers' release; also for an address space that is dropped without
    /// `exit`, which by then has no notifier that could care.
    func tearDown() {
        guard !hasExited else { return }
        hasExited = true
        var gather = Gather()
        for vma in vmas {
            zap(vma.range, &gather, dropGuards: true)
            vma.mappings?.remove(vma)
            vma.hugeFile?.pool.unreserve(vma.promises.exchange(0, ordering: .relaxed))
        }
        vmas.removeAll()
        gather.flush(memory)
        leaveHugeZero()
        freeAllTables()
    }
}
