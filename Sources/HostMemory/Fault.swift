import Audit
import Frames
import Synchronization
import Synchrony

/// What a fault is for.
enum FaultAccess: Sendable {
    case read, write
    /// Make an anonymous page exclusive before it is pinned, without making it writable. Kernel: `FAULT_FLAG_UNSHARE`.
    case unshare
}

/// Why a fault failed.
enum FaultError: Sendable {
    /// Kernel: `VM_FAULT_SIGSEGV`.
    case segmentation
    /// Kernel: `VM_FAULT_SIGBUS`.
    case bus
    /// Kernel: `VM_FAULT_OOM`.
    case outOfMemory
    /// Kernel: `VM_FAULT_HWPOISON`.
    case poisoned

    var errno: Errno {
        switch self {
        case .segmentation, .bus: .EFAULT
        case .outOfMemory: .ENOMEM
        case .poisoned: .EHWPOISON
        }
    }
}

/// What a fault came to. `mmapLock` is never dropped inside: who may drop it waits and comes back.
enum FaultOutcome: Sendable {
    /// Something was done, or another task was faster: look again.
    case done
    /// The object's page must be read first. Kernel: `VM_FAULT_RETRY`.
    case waitForPage(MemoryObject, Int)
    /// The page must be read from the swap device first. Kernel: `VM_FAULT_RETRY`.
    case waitForSwap(Host, Int, place: Int)
    /// Another task of the process serves it. Kernel: `handle_userfault`.
    case waitForUser(UserFaults, UserFaults.Message)
    /// The driver wants the lock dropped. Kernel: `VM_FAULT_RETRY`.
    case waitForDriver(DriverMapping)
    case failed(FaultError)

    /// Waits for what the fault asked for; no lock held. A fatal signal ends a wait for another task, with `interruptible`
    /// any signal.
    func wait(interruptible: Bool = false) {
        switch self {
        case .waitForPage(let object, let page): object.waitForPage(page)
        case .waitForSwap(let host, let slot, let place): host.waitForSwap(slot, place: place)
        case .waitForUser(let server, let message): server.wait(message, interruptible: interruptible)
        case .waitForDriver(let driver): driver.waitForRetry()
        case .done, .failed: break
        }
    }
}

/// The page fault of the primary MMU. Kernel: `handle_mm_fault`.
///
/// `mmapLock` is held for read by the caller, who has checked that the VMA allows the access. Filling an absent entry
/// and widening the rights of an entry whose frame stays fire no notifier; putting another frame in place of a present
/// one does (Spec: generic 3.1, 3.4).
extension AddressSpace {
    func handleFault(_ vma: VMA, _ address: UserAddress, _ access: FaultAccess) -> FaultOutcome {
        let outcome = handleStableFault(vma, address, access)
        // Pages that a reaper took would come back as zeros. Kernel: `check_stable_address_space`.
        return isUnstable.load(ordering: .acquiring) ? .failed(.bus) : outcome
    }

    private func handleStableFault(_ vma: VMA, _ address: UserAddress, _ access: FaultAccess) -> FaultOutcome {
        if isUnstable.load(ordering: .acquiring) { return .failed(.bus) }
        if let file = vma.hugeFile { return hugeFileFault(vma, file, address, access) }
        while true {
            guard let middle = makeMiddleEntry(address) else { return .failed(.outOfMemory) }
            let seen = HostEntry(middle.word.load())
            if seen.isLargeLeaf {
                if let outcome = hugeFault(vma, address, middle.word, middle.table, seen, access) { return outcome }
                continue
            }
            if seen.bits == 0, let outcome = fillHuge(vma, address, middle.word, middle.table, access) {
                return outcome
            }
            let last = makeLastEntry(address, in: middle.word)
            if last.isLeaf { continue }
            guard let word = last.word else { return .failed(.outOfMemory) }
            return handleEntry(vma, address, word, access)
        }
    }

    /// Kernel: `handle_pte_fault`.
    private func handleEntry(
        _ vma: VMA, _ address: UserAddress, _ word: AtomicWord, _ access: FaultAccess
    ) -> FaultOutcome {
        let seen = HostEntry(word.load())
        if seen.bits == 0 { return fill(vma, address, word, access) }
        if !seen.mapsFrame { return handleAbsent(vma, address, word, seen, access) }
        if seen.isProtectNone {
            restoreHinted(vma, address, word, seen, .page4K)
            return .done
        }
        if access == .write, let outcome = userFault(vma, address, protected: seen) { return outcome }
        if access != .read, !seen.isWritable { return breakSharing(vma, address, word, seen, access) }
        return .done
    }

    /// An entry that says why no page is there. Kernel: `do_swap_page`, `handle_pte_marker`.
    private func handleAbsent(
        _ vma: VMA, _ address: UserAddress, _ word: AtomicWord, _ seen: HostEntry, _ access: FaultAccess
    ) -> FaultOutcome {
        if seen.isSwapped { return swapIn(vma, address, word, seen, access) }
        if seen.isGuard { return .failed(.segmentation) }
        if seen.isMigrating {
            waitForMigration(word, seen)
            return .done
        }
        return .failed(.poisoned)
    }

    /// An empty entry. Kernel: `do_pte_missing`.
    private func fill(
        _ vma: VMA, _ address: UserAddress, _ word: AtomicWord, _ access: FaultAccess
    ) -> FaultOutcome {
        if let outcome = userFault(vma, address, access) { return outcome }
        switch vma.backing {
        case .anonymous, .anonymousShared:
            return access == .write ? fillAnonymous(vma, address, word) : fillZero(vma, address, word)
        case .object(let object, _, _):
            return fillFromObject(vma, object, address, word, access)
        case .driver(let driver, _, _):
            return ask(driver, vma, address, write: access == .write)
        case .huge(let file, _, _): return hugeFileFault(vma, file, address, access)
        }
    }

    func outcome(_ fault: DriverFault, _ driver: DriverMapping) -> FaultOutcome {
        switch fault {
        case .inserted, .handled: .done
        case .busError: .failed(.bus)
        case .outOfMemory: .failed(.outOfMemory)
        case .poisoned: .failed(.poisoned)
        case .retry: .waitForDriver(driver)
        }
    }

    /// A read of nothing maps the page of zeros, which no count knows of. Kernel: `do_anonymous_page`.
    private func fillZero(_ vma: VMA, _ address: UserAddress, _ word: AtomicWord) -> FaultOutcome {
        let entry = HostEntry.leaf(host.zeroPage, vma.flags, writable: false, special: true)
        pageTableLock.lock()
        if word.load() == 0 { setLeaf(word, entry, address) }
        pageTableLock.unlock()
        return .done
    }

    private func fillAnonymous(_ vma: VMA, _ address: UserAddress, _ word: AtomicWord) -> FaultOutcome {
        prepareAnonymous(vma)
        guard let frame = newAnonymousPage(vma.backingPage(of: address)) else { return .failed(.outOfMemory) }
        memory.clear(frame, count: 1)
        let entry = HostEntry.leaf(frame, vma.flags, writable: true).setting(HostEntry.dirty)
        pageTableLock.lock()
        let won = word.load() == 0
        if won { setNewLeaf(word, entry, address) }
        pageTableLock.unlock()
        if !won { memory.put(memory.page(frame)) }
        return .done
    }

    /// Writes the first entry of a new anonymous page, which reclaim may find from now on. `pageTableLock` held.
    func setNewLeaf(_ word: AtomicWord, _ entry: HostEntry, _ address: UserAddress, _ level: PageLevel = .page4K) {
        setLeaf(word, entry, address, level)
        memory.lists?.add(memory.page(entry.frame))
    }

    /// A fresh page for `place` of a mapping, exclusive, counted as mapped once: the entry-to-be owns its one reference.
    /// Its bytes are not set.
    func newAnonymousPage(_ place: Int) -> HostFrame? {
        guard let frame = memory.allocatePages(order: 0) else { return nil }
        let page = memory.page(frame)
        page.pointee.word0 = UInt64(place)
        page.pointee.flags.bitwiseOr(PageFlags.anonymous | PageFlags.anonymousExclusive, ordering: .relaxed)
        page.pointee.mapCount.store(1, ordering: .relaxed)
        return frame
    }

    /// The page of an object. Shared: the page itself, writable if the mapping is, even on a read (nobody wants to hear
    /// of the first write). Private: read-only, or a copy at once. Kernel: `do_read_fault`, `do_cow_fault`,
    /// `do_shared_fault`.
    private func fillFromObject(
        _ vma: VMA, _ object: MemoryObject, _ address: UserAddress, _ word: AtomicWord, _ access: FaultAccess
    ) -> FaultOutcome {
        let index = vma.backingPage(of: address)
        // Also where it comes to nothing.
        if access == .write, !vma.flags.shared { prepareAnonymous(vma) }
        if access == .read, vma.userFaults == nil, !object.isSecret, mapAround(vma, object, address, word) {
            return .done
        }
        let page: UnsafeMutablePointer<PageFrame>
        switch object.take(index) {
        case .page(let found): page = found
        case .mustWait: return .waitForPage(object, index)
        case .beyondEnd: return .failed(.bus)
        case .outOfMemory: return .failed(.outOfMemory)
        case .poisoned: return .failed(.poisoned)
        case .unreadable: return .failed(.bus)
        }
        if access == .write, !vma.flags.shared {
            defer { memory.put(page) }
            return fillWithCopy(vma, object, index, page, address, word)
        }
        let writes = access == .write && vma.flags.write
        var entry = HostEntry.leaf(memory.frame(of: page), vma.flags, writable: writes || vma.entriesAreWritable)
        if access == .write { entry = entry.setting(HostEntry.dirty) }
        pageTableLock.lock()
        let won = word.load() == 0 && object.holds(page, at: index)
        if won {
            if writes, object.disk != nil { memory.mark(page, PageFlags.dirty(.primaryEntry)) }
            page.pointee.mapCount.add(1, ordering: .relaxed)
            setLeaf(word, entry, address)
        }
        pageTableLock.unlock()
        if !won { memory.put(page) }
        return .done
    }

    /// Maps the pages of the object that are there, around `address`: a block that begins at a multiple of its size, or
    /// where the VMA or the table does. True: the one at `address` was among them. Kernel: `do_fault_around`,
    /// `filemap_map_pages`.
    private func mapAround(
        _ vma: VMA, _ object: MemoryObject, _ address: UserAddress, _ word: AtomicWord
    ) -> Bool {
        let count = UInt64(host.faultAroundPages)
        guard count > 1 else { return false }
        let page = address.page
        let low = max(page & ~(count - 1), vma.range.lowerBound.page, page & ~511)
        let high = min(low + count, vma.range.upperBound.page, (page | 511) + 1)
        pageTableLock.lock()
        defer { pageTableLock.unlock() }
        for neighbour in low..<high {
            let place = word.following(Int(neighbour) - Int(page))
            guard place.peek() == 0 else { continue }
            let neighbourAddress = UserAddress(neighbour << pageShift)
            guard let found = object.takeIfPresent(vma.backingPage(of: neighbourAddress)) else { continue }
            found.pointee.mapCount.add(1, ordering: .relaxed)
            let entry = HostEntry.leaf(memory.frame(of: found), vma.flags, writable: vma.entriesAreWritable)
            setLeaf(place, neighbour == page ? entry : entry.clearing(HostEntry.accessed), neighbourAddress)
        }
        return word.peek() != 0
    }

    private func fillWithCopy(
        _ vma: VMA, _ object: MemoryObject, _ index: Int, _ source: UnsafeMutablePointer<PageFrame>,
        _ address: UserAddress, _ word: AtomicWord
    ) -> FaultOutcome {
        guard let frame = newAnonymousPage(index) else { return .failed(.outOfMemory) }
        memory.copy(memory.frame(of: source), to: frame)
        let entry = HostEntry.leaf(frame, vma.flags, writable: true).setting(HostEntry.dirty)
        pageTableLock.lock()
        let won = word.load() == 0 && object.holds(source, at: index)
        if won { setNewLeaf(word, entry, address) }
        pageTableLock.unlock()
        if !won { memory.put(memory.page(frame)) }
        return .done
    }

    /// An entry that a NUMA hint made inaccessible becomes present again; the frame stays. Kernel: `do_numa_page`.
    func restoreHinted(
        _ vma: VMA, _ address: UserAddress, _ word: AtomicWord, _ seen: HostEntry, _ level: PageLevel
    ) {
        pageTableLock.lock()
        if word.load() == seen.bits {
            let entry = withRights(of: vma, seen.clearing(HostEntry.protectNone))
            setLeaf(word, entry.setting(HostEntry.accessed), address, level)
        }
        pageTableLock.unlock()
    }

    /// `entry`'s frame with what the VMA now allows: writable without a fault only if the page is surely nobody
    /// else's, or truly shared. Kernel: `pte_modify` and `can_change_pte_writable`.
    func withRights(of vma: VMA, _ entry: HostEntry) -> HostEntry {
        var result = entry.clearing(
            HostEntry.present | HostEntry.protectNone | HostEntry.writable | HostEntry.noExecute)
        result.bits |= vma.flags.isAccessible ? HostEntry.present : HostEntry.protectNone
        if !vma.flags.execute { result.bits |= HostEntry.noExecute }
        guard vma.flags.write, !entry.isUserProtected else { return result }
        let writable: Bool
        if vma.flags.shared {
            // What is dirty the file has heard of. Kernel: `can_change_shared_pte_writable`.
            writable = vma.entriesAreWritable || entry.isDirty
        } else {
            writable = !entry.isSpecial && memory.isExclusivelyAnonymous(memory.page(entry.frame))
        }
        return writable ? result.setting(HostEntry.writable) : result
    }
}

extension PhysicalMemory {
    func isAnonymous(_ page: UnsafeMutablePointer<PageFrame>) -> Bool {
        head(of: page).pointee.flags.load(ordering: .relaxed) & PageFlags.anonymous != 0
    }

    /// Kernel: `PageAnonExclusive`.
    func isExclusivelyAnonymous(_ page: UnsafeMutablePointer<PageFrame>) -> Bool {
        isAnonymous(page) && page.pointee.flags.load(ordering: .relaxed) & PageFlags.anonymousExclusive != 0
    }

    /// Copies the bytes of one frame. The target is the caller's alone.
    func copy(_ source: HostFrame, to target: HostFrame) {
        let isKnownZero =
            hasPageFrame(source) && page(source).pointee.flags.load(ordering: .relaxed) & PageFlags.written == 0
        if isKnownZero { return clear(target, count: 1) }
        willWrite(target)
        bytes(of: target).copyMemory(from: bytes(of: source), byteCount: Int(pageSize))
    }
}
