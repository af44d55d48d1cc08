import Audit
import Frames
import Synchronization
import Synchrony

/// Get-user-pages, the way that may sleep and fault. Spec: generic 1.9.
extension AddressSpace {
    /// Kernel: `get_user_pages_unlocked(.., 1, ..)`. `mmapLock` must not be held.
    public func getUserPageUnlocked(
        _ address: UserAddress, _ flags: LookupFlags, holder: Holder
    ) throws(GetUserPagesError) -> PageReference {
        let page = try lookup(address, flags, pin: false)
        return PageReference(adopting: page, of: memory, holder: holder)
    }

    /// Kernel: `pin_user_pages_unlocked(.., 1, ..)`. `mmapLock` must not be held.
    public func pinUserPageUnlocked(
        _ address: UserAddress, _ flags: LookupFlags, holder: Holder
    ) throws(GetUserPagesError) -> PagePin {
        let page = try lookup(address, flags, pin: true)
        return PagePin(adopting: page, of: memory, holder: holder)
    }

    /// Kernel: `__get_user_pages_locked`.
    private func lookup(
        _ address: UserAddress, _ flags: LookupFlags, pin: Bool
    ) throws(GetUserPagesError) -> UnsafeMutablePointer<PageFrame> {
        mightSleep()
        // Only the first acquisition that a fatal signal breaks answers -EAGAIN.
        if signals.fatal { throw .again }
        while true {
            mmapLock.lockForRead()
            let step = lookupLocked(address, flags, pin: pin)
            mmapLock.unlockRead()
            switch step {
            case .found(let page): return page
            case .failed(.noMemory) where host.makeRoom(): continue
            case .failed(let error): throw error
            case .wait(let outcome): try wait(outcome, flags)
            }
        }
    }

    /// The lock was dropped to wait: now, and only now, an ordinary signal counts.
    private func wait(_ outcome: FaultOutcome, _ flags: LookupFlags) throws(GetUserPagesError) {
        if flags.noWait { throw .wouldBlock }
        if isInterrupted(flags) { throw .interrupted }
        outcome.wait(interruptible: flags.interruptible)
        if isInterrupted(flags) { throw .interrupted }
    }

    private func isInterrupted(_ flags: LookupFlags) -> Bool {
        signals.fatal || (flags.interruptible && signals.pending)
    }

    private enum Step {
        case found(UnsafeMutablePointer<PageFrame>)
        case failed(GetUserPagesError)
        case wait(FaultOutcome)
    }

    /// With `mmapLock` held for read: follow the entry, fault, follow again, until it is there.
    /// Kernel: `__get_user_pages`.
    private func lookupLocked(_ address: UserAddress, _ flags: LookupFlags, pin: Bool) -> Step {
        guard let vma = find(address), Self.permits(vma, flags) else { return .failed(.fault) }
        while true {
            if signals.fatal { return .failed(.interrupted) }
            let access: FaultAccess
            switch follow(address, vma, flags, pin: pin) {
            case .found(let page): return .found(page)
            case .failed(let error): return .failed(error)
            case .fault: access = flags.write ? .write : .read
            case .unshare: access = .unshare
            }
            switch handleFault(vma, address, access) {
            case .done: continue
            case .failed(let error): return .failed(Self.answer(error, flags))
            case .waitForPage(let object, let page): return .wait(.waitForPage(object, page))
            case .waitForSwap(let host, let slot, let place):
                return .wait(.waitForSwap(host, slot, place: place))
            case .waitForUser(let server, let message): return .wait(.waitForUser(server, message))
            case .waitForDriver(let driver): return .wait(.waitForDriver(driver))
            }
        }
    }

    /// Kernel: `check_vma_flags`.
    private static func permits(_ vma: VMA, _ flags: LookupFlags) -> Bool {
        if vma.flags.io || vma.flags.pfnMap || vma.isSecret { return false }
        return flags.write ? vma.flags.write : vma.flags.read
    }

    private static func answer(_ error: FaultError, _ flags: LookupFlags) -> GetUserPagesError {
        switch error {
        case .segmentation, .bus: .fault
        case .outOfMemory: .noMemory
        case .poisoned: flags.hardwarePoison ? .hardwarePoison : .fault
        }
    }

    private enum Followed {
        case found(UnsafeMutablePointer<PageFrame>)
        case failed(GetUserPagesError)
        /// Nothing there, or not with these rights.
        case fault
        /// A shared anonymous page, to be pinned: unshare it first. Kernel: -EMLINK.
        case unshare
    }

    /// Looks at the entry under the page-table lock and takes the page. Kernel: `follow_page_pte`.
    private func follow(_ address: UserAddress, _ vma: VMA, _ flags: LookupFlags, pin: Bool) -> Followed {
        pageTableLock.lock()
        defer { pageTableLock.unlock() }
        guard let leaf = leaf(address), leaf.entry.mapsFrame else { return .fault }
        // A hint is looked through by a read that doesn't care; a write always takes the fault.
        if leaf.entry.isProtectNone, flags.honorNUMA || flags.write { return .fault }
        if flags.write, !leaf.entry.isWritable { return .fault }
        let frame = leaf.frame(of: address)
        if leaf.entry.isSpecial, !isZeros(leaf) { return .failed(.exists) }
        let page = memory.page(frame)
        if pin, !flags.write,
            memory.mustUnshare(page, leaf.level) || (flags.longTerm && !vma.flags.shared && !isOwn(page))
        {
            return .unshare
        }
        guard pin ? memory.tryPin(page) : memory.tryGet(page) else { return .failed(.noMemory) }
        touch(page, leaf, write: flags.write)
        return .found(page)
    }

    /// Whether the page is the process's own, not one of a file or the page of zeros, which a write would leave.
    private func isOwn(_ page: UnsafeMutablePointer<PageFrame>) -> Bool { memory.isAnonymous(page) }

    /// GUP's own marks: at a small entry on the folio, at a huge one in the entry. Kernel: `FOLL_TOUCH`, `touch_pmd`.
    func touch(_ page: UnsafeMutablePointer<PageFrame>, _ leaf: HostLeaf, write: Bool) {
        if leaf.level > .page4K {
            let bits = write ? HostEntry.accessed | HostEntry.dirty : HostEntry.accessed
            if leaf.entry.bits & bits != bits { _ = leaf.word.fetchOr(bits) }
            return
        }
        let head = memory.head(of: page)
        if write, !leaf.entry.isDirty, head.pointee.flags.load(ordering: .relaxed) & PageFlags.anyDirty == 0 {
            memory.mark(head, PageFlags.dirty(.getUserPages))
        }
        memory.mark(head, PageFlags.accessed(.getUserPages))
    }
}

extension PhysicalMemory {
    /// Whether a pin must first make the page its mapper's own. Kernel: `gup_must_unshare` (without FOLL_LONGTERM:
    /// page cache and the zero page are left shared).
    func mustUnshare(_ page: UnsafeMutablePointer<PageFrame>, _ level: PageLevel) -> Bool {
        // A huge leaf keeps the mark at the folio's head, a small entry at its own page.
        isAnonymous(page) && !isExclusivelyAnonymous(level > .page4K ? head(of: page) : page)
    }
}
