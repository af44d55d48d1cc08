import Audit
import Frames
import Synchronization
import Synchrony

/// Frames that are mapped by number, and the walk that finds them. No call here ever takes a reference.
extension AddressSpace {
    /// Calls `body` with the entry that maps `address`, the page-table lock held: it may not sleep, notify or take
    /// `mmu_lock`. What it learns holds only until it returns, unless a notifier guards it.
    /// Nil (the kernel's -EINVAL): `vma` is no VM_IO or VM_PFNMAP mapping of `address`, or nothing is present there.
    /// What kind of page the entry maps is not looked at. `mmapLock` held since `vma` was looked up.
    /// Kernel: `follow_pfnmap_start`, `follow_pfnmap_end`. Spec: generic 1.9, 2.6.
    ///
    /// A PROT_NONE entry counts as not present (the specification is silent; Linux 6.18 on x86 lets it through, and the
    /// guest reads it): a mapping that allows nothing must not become guest memory.
    public func withPFNMapping<R>(of address: UserAddress, in vma: VMAInfo, _ body: (PFNMapping) -> R) -> R? {
        precondition(isHeld(.mmap), "follow_pfnmap_start without mmap_lock")
        guard vma.flags.io || vma.flags.pfnMap, vma.contains(address) else { return nil }
        pageTableLock.lock()
        defer { pageTableLock.unlock() }
        guard let leaf = leaf(address), leaf.entry.isPresent else { return nil }
        return body(
            PFNMapping(
                frame: leaf.frame(of: address), writable: leaf.entry.isWritable, special: leaf.entry.isSpecial,
                isUncounted: Defect.tailPageRefused.isOn && isUncounted(leaf.frame(of: address))))
    }

    private func isUncounted(_ frame: HostFrame) -> Bool {
        memory.hasPageFrame(frame) && memory.page(frame).pointee.referenceCount.load(ordering: .relaxed) == 0
    }

    /// Simulates an access of the process. `mmapLock` is held for read, also when it returns; it may have been dropped
    /// in between. Kernel: `fixup_user_fault`. Spec: generic 1.9, 2.6.
    public func fixupUserFault(_ address: UserAddress, write: Bool) -> FixupResult {
        precondition(isHeld(.mmap), "fixup_user_fault without mmap_lock")
        var unlocked = false
        while true {
            guard let vma = find(address), vma.allows(write: write) else {
                return FixupResult(error: .EFAULT, unlocked: unlocked)
            }
            if signals.fatal { return FixupResult(error: .EINTR, unlocked: unlocked) }
            let outcome = handleFault(vma, address, write ? .write : .read)
            switch outcome {
            case .done: return FixupResult(error: nil, unlocked: unlocked)
            case .failed(.outOfMemory):
                mmapLock.unlockRead()
                let hasRoom = host.makeRoom()
                mmapLock.lockForRead()
                // Linux reclaims under the lock. Whoever fails for good must not say `unlocked`, which means: try again.
                guard hasRoom else { return FixupResult(error: .ENOMEM, unlocked: unlocked) }
                unlocked = true
            case .failed: return FixupResult(error: .EFAULT, unlocked: unlocked)
            case .waitForPage, .waitForSwap, .waitForUser, .waitForDriver:
                mmapLock.unlockRead()
                unlocked = true
                outcome.wait()
                mmapLock.lockForRead()
            }
        }
    }

    /// How large a page the primary table maps `address` with: the most a stage-2 leaf may cover. 4 KiB where nothing
    /// is mapped. Lockless, each entry read once: the caller holds what keeps the answer true (`mmu_lock`, after the
    /// retry check). Kernel: `host_pfn_mapping_level`.
    public func mappingLevel(of address: UserAddress) -> PageLevel {
        leafLevel(address)
    }

    /// What stands in the primary table; nil where nothing is present. Lockless.
    public func translate(_ address: UserAddress) -> HostTranslation? {
        guard let leaf = leaf(address), leaf.entry.isPresent else { return nil }
        return HostTranslation(
            frame: leaf.frame(of: address), writable: leaf.entry.isWritable, accessed: leaf.entry.isAccessed,
            dirty: leaf.entry.isDirty, special: leaf.entry.isSpecial, level: leaf.level)
    }

    // MARK: For drivers

    /// Makes a special entry for `frame`, one that the driver has claimed; no count of any page changes. An entry that stands already stays, but that
    /// `makeWritable` widens the one for this very frame. Called with `mmapLock` held, from `DriverMapping.fault` or
    /// `mapped`. Kernel: `vmf_insert_pfn`, `vmf_insert_pfn_pmd`, `vmf_insert_mixed_mkwrite`.
    /// - Parameter level: `.page2M` only from `hugeFault`; address and frame must fit, and the mapping be shared.
    public func insertFrame(
        _ frame: HostFrame, at address: UserAddress, in vma: VMAInfo, level: PageLevel = .page4K,
        makeWritable: Bool = false
    ) -> DriverFault {
        precondition(isHeld(.mmap), "vmf_insert_pfn without mmap_lock")
        guard let area = find(vma.range.lowerBound), case .driver(let driver, _, _) = area.backing else {
            return .busError
        }
        guard area.flags.pfnMap || area.flags.mixedMap else {
            driver.breach("makes a special entry in a mapping of counted pages", frame, memory)
            return .busError
        }
        let frames = frame..<frame.advanced(by: Int(level.frames))
        guard driver.mayMap(frames, at: address, in: area, level, memory) else { return .busError }
        var entry = HostEntry.leaf(frame, area.flags, writable: area.entriesAreWritable, special: true)
        if makeWritable, area.flags.write, area.flags.shared { entry = entry.setting(Self.written) }
        let large = level == .page2M
        if large { entry = entry.setting(HostEntry.large) }
        guard let middle = makeMiddleEntry(address) else { return .outOfMemory }
        if large {
            place(entry, middle.word, address, level)
            return .inserted
        }
        let last = makeLastEntry(address, in: middle.word)
        if last.isLeaf { return .inserted }
        guard let word = last.word else { return .outOfMemory }
        place(entry, word, address, .page4K)
        return .inserted
    }

    private func place(_ entry: HostEntry, _ word: AtomicWord, _ address: UserAddress, _ level: PageLevel) {
        pageTableLock.lock()
        defer { pageTableLock.unlock() }
        let old = HostEntry(word.load())
        if old.bits == 0 { return setLeaf(word, entry, address, level) }
        let widens = old.isPresent && old.isSpecial && old.frame == entry.frame && entry.isWritable
        if widens, !old.isWritable { setLeaf(word, old.setting(Self.written), address, level) }
    }

    /// Maps a counted page of the driver's, in a mixed map or one of counted pages alone; the entry owns a reference of
    /// its own. An entry that stands already stays. Locks as for `insertFrame`.
    /// - Parameter makeWritable: though the driver wants write notifications: it has heard of this one.
    /// Kernel: `vm_insert_page`, `vmf_insert_page_mkwrite`.
    public func insertPage(
        _ frame: HostFrame, at address: UserAddress, in vma: VMAInfo, makeWritable: Bool = false
    ) -> DriverFault {
        precondition(isHeld(.mmap), "vm_insert_page without mmap_lock")
        guard let area = find(vma.range.lowerBound), case .driver(let driver, _, _) = area.backing else {
            return .busError
        }
        guard !area.flags.pfnMap, memory.hasPageFrame(frame) else {
            driver.breach("maps a page by reference where none is counted", frame, memory)
            return .busError
        }
        let frames = frame..<frame.advanced(by: 1)
        guard driver.mayMap(frames, at: address, in: area, .page4K, memory) else { return .busError }
        let page = memory.page(frame)
        guard !memory.isAnonymous(page), memory.tryGet(page) else { return .busError }
        guard let middle = makeMiddleEntry(address), let word = makeLastEntry(address, in: middle.word).word else {
            memory.put(page)
            return .outOfMemory
        }
        var entry = HostEntry.leaf(frame, area.flags, writable: area.entriesAreWritable)
        if makeWritable, area.flags.write, area.flags.shared { entry = entry.setting(Self.written) }
        pageTableLock.lock()
        let won = word.load() == 0
        if won {
            page.pointee.mapCount.add(1, ordering: .relaxed)
            setLeaf(word, entry, address)
        }
        pageTableLock.unlock()
        if !won { memory.put(page) }
        return .inserted
    }
}
