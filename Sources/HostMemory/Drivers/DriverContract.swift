import Audit
import Frames
import Synchronization
import Synchrony

/// What a driver must keep to, and what happens if it doesn't: where a journal listens, a finding D-1 that names the
/// driver, and the core does the harmless thing, so that the run goes on; elsewhere the end, as for any broken rule.
///
/// 1. It maps only frames that it has claimed, which are in use and hold no page table: else SIGBUS.
/// 2. It maps them inside the VMA that it was asked for, a huge leaf where one fits: else SIGBUS.
/// 3. `.inserted` means that something was inserted, `.handled` that something was widened. Several answers in a row that
///    changed nothing: SIGBUS.
/// 4. It lets a process write only frames of its own: else SIGBUS.
/// 5. It gives back only what it has claimed, after it has unmapped it: else nothing is given, or the core unmaps it.
///
/// The kernel checks next to nothing of this; a breach corrupts memory.
extension DriverMapping {
    /// Such answers in a row that changed nothing, at which a fault ends as a SIGBUS. One may be innocent: a
    /// zap came between.
    static let toleratedEmptyAnswers = 8

    /// Says that the driver broke its contract. A driver in this module or outside may call it for rules of its own.
    func breach(_ reason: StaticReason, _ frame: HostFrame?, _ memory: PhysicalMemory) {
        guard let journal = memory.journal else { preconditionFailure("a driver broke its contract") }
        journal.add(Finding(.d1, reason, frame: frame, driver: StaticReason(name)))
    }

    /// Whether an entry for `frames` may stand at `address`.
    func mayMap(
        _ frames: Range<HostFrame>, at address: UserAddress, in vma: VMA, _ level: PageLevel, _ memory: PhysicalMemory
    ) -> Bool {
        let first = frames.lowerBound
        let low = address.aligned(to: level)
        guard vma.range.lowerBound <= low, low < vma.range.upperBound,
            low.value + level.bytes <= vma.range.upperBound.value
        else {
            breach("inserts outside of the mapping that it was asked for", first, memory)
            return false
        }
        guard level == .page4K || (level == .page2M && low == address && first.isAligned(to: level) && vma.flags.shared)
        else {
            breach("inserts a huge entry where none fits", first, memory)
            return false
        }
        return mayMap(frames, memory)
    }

    func mayMap(_ frames: Range<HostFrame>, _ memory: PhysicalMemory) -> Bool {
        let first = frames.lowerBound
        guard memory.exists(frames.upperBound.advanced(by: -1)), owned.contains(frames) else {
            breach("maps a frame that is not its own", first, memory)
            return false
        }
        // What it has claimed may still never have been its to claim.
        for frame in frames where memory.hasPageFrame(frame) {
            let flags = memory.page(frame).pointee.flags.load(ordering: .relaxed)
            guard flags & (PageFlags.free | PageFlags.table) == 0 else {
                breach("maps a frame that is free or a page table", frame, memory)
                return false
            }
        }
        return true
    }

    /// These frames are the driver's, and it may map them from now on: device memory, pages that it allocated, pages of
    /// another object that it pinned. Frames of `DriverPages` and of a `GraphicsPool` are claimed when they are taken.
    public final func claim(_ frames: Range<HostFrame>) { owned.add(frames) }

    /// The driver is done with `frames`, which nothing maps any more. May sleep; locks as for `unmapMappings`.
    ///
    /// If an entry still maps one of them, that is a finding, and the core unmaps it: in the kernel the process would go
    /// on writing to a page that is somebody else's. False: they were not the driver's to give, and must not be given.
    public final func relinquish(_ frames: Range<HostFrame>, of host: Host) -> Bool {
        guard owned.remove(frames) else {
            breach("gives back a frame that is not its own", frames.lowerBound, host.memory)
            return false
        }
        guard host.memory.journal != nil, let mapped = mappings.firstMapped(of: frames) else { return true }
        breach("gives back a frame that is still mapped", mapped, host.memory)
        mappings.unmapAll()
        return true
    }
}

// MARK: Asking a driver

extension AddressSpace {
    /// Kernel: `vma->vm_ops->fault`.
    func ask(_ driver: DriverMapping, _ vma: VMA, _ address: UserAddress, write: Bool) -> FaultOutcome {
        settle(driver.forced.next() ?? driver.fault(self, vma.info, address, write: write), driver, address)
    }

    /// What a driver's answer comes to. `.inserted` without an entry is looked at again by the caller, but not for ever.
    func settle(_ answer: DriverFault, _ driver: DriverMapping, _ address: UserAddress) -> FaultOutcome {
        guard answer == .inserted || answer == .handled else { return outcome(answer, driver) }
        return again(driver, changed: peek(address) != nil, "says that it has inserted an entry, and there is none")
    }

    /// The caller is to look again, unless the driver has sent it back too often with nothing `changed`.
    private func again(_ driver: DriverMapping, changed: Bool, _ reason: StaticReason) -> FaultOutcome {
        if changed {
            if driver.emptyAnswers.load(ordering: .relaxed) != 0 { driver.emptyAnswers.store(0, ordering: .relaxed) }
            return .done
        }
        let count = driver.emptyAnswers.add(1, ordering: .relaxed).newValue
        guard count >= DriverMapping.toleratedEmptyAnswers else { return .done }
        driver.emptyAnswers.store(0, ordering: .relaxed)
        driver.breach(reason, nil, memory)
        return .failed(.bus)
    }

    /// Asks whether the entry `seen` may become writable. Nil: it may. Kernel: `pfn_mkwrite`, `page_mkwrite`.
    func askToWrite(
        _ driver: DriverMapping, _ vma: VMA, _ address: UserAddress, _ seen: HostEntry, _ level: PageLevel = .page4K
    ) -> FaultOutcome? {
        // Kernel: VM_FAULT_NOPAGE says here that the driver has widened the entry, not that it may be widened.
        let forced = driver.forced.next().map { $0 == .inserted ? .handled : $0 }
        let answer = forced ?? driver.makeWritable(self, vma.info, address)
        if answer == .handled {
            return again(
                driver, changed: peek(address) != seen, "says that it has made an entry writable, and it is not")
        }
        guard answer == .inserted else { return outcome(answer, driver) }
        let frames = seen.frame..<seen.frame.advanced(by: Int(level.frames))
        if driver.owned.contains(frames) { return nil }
        // The frame may have gone, and its entry with it, while the driver was asked.
        guard let now = peek(address), now.frame == seen.frame else { return .done }
        driver.breach("lets a process write a frame that is not its own", seen.frame, memory)
        return .failed(.bus)
    }

    /// The leaf entry of `address`, if it is not empty; without scheduling points, for checks: what it finds decides
    /// nothing for who keeps the rules.
    private func peek(_ address: UserAddress) -> HostEntry? {
        let top = root.load(ordering: .acquiring)
        guard top != 0 else { return nil }
        var entry = HostEntry(HostEntry.table(HostFrame(top)))
        var level: UInt64 = 4
        while level > 0 {
            entry = HostEntry(memory.entry(Self.index(address, level), of: entry.frame).peek())
            if entry.bits == 0 { return nil }
            if level == 2, entry.isLargeLeaf { return entry }
            level -= 1
        }
        return entry
    }

    /// The first of `frames` that a special entry in `range` maps. A counted entry holds a reference of its own: its
    /// frame may be given back. No scheduling points.
    func firstSpecial(of frames: Range<HostFrame>, in range: Range<UserAddress>) -> HostFrame? {
        var address = range.lowerBound
        while address < range.upperBound {
            let entry = peek(address)
            let level: PageLevel = entry?.isLargeLeaf == true ? .page2M : .page4K
            if let entry, entry.mapsFrame, entry.isSpecial {
                let mapped = entry.frame..<entry.frame.advanced(by: Int(level.frames))
                if mapped.overlaps(frames) { return max(mapped.lowerBound, frames.lowerBound) }
            }
            address = address.aligned(to: level) + level.bytes
        }
        return nil
    }
}
