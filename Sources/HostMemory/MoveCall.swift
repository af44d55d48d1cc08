import Audit
import Frames
import Synchronization
import Synchrony

/// mremap.
extension AddressSpace {
    /// Makes the mapping of `range` `length` bytes long, and moves it to `target` if that is given, where it replaces what is
    /// there. The entries move with their pages, between the notifier's start and end for the old place.
    ///
    /// Without `target` a mapping grows only at its end, into free space. Kernel: `mremap` with `MREMAP_MAYMOVE|MREMAP_FIXED`,
    /// or without flags. Errors: EINVAL for what is not page-aligned, empty, or a target that overlaps `range`; EFAULT if
    /// `range` is not in one VMA; ENOMEM where it can't grow, or without memory for tables.
    public func remap(_ range: Range<UserAddress>, length: UInt64, to target: UserAddress? = nil) throws(Errno) {
        guard Self.isUsable(range), length > 0, length & (pageSize - 1) == 0 else { throw .EINVAL }
        mmapLock.lockForWrite()
        defer { mmapLock.unlockWrite() }
        let (range, length) = try wholeHugePages(range, length, target)
        if let target {
            try move(range, length, target)
        } else {
            try resize(range, length)
        }
    }

    /// Where `range` begins in huge pages of a pool, it and the length are such pages, the last of each as a whole. Errors:
    /// EINVAL in the middle of one, and for a mapping that is to grow. Kernel: `check_prep_vma`.
    private func wholeHugePages(
        _ range: Range<UserAddress>, _ length: UInt64, _ target: UserAddress?
    ) throws(Errno) -> (Range<UserAddress>, UInt64) {
        guard let level = find(range.lowerBound)?.hugeFile?.level else { return (range, length) }
        let inside = level.bytes - 1
        let old = (range.upperBound.value - range.lowerBound.value + inside) & ~inside
        let new = (length + inside) & ~inside
        let isAligned = (range.lowerBound.value | (target?.value ?? 0)) & inside == 0
        guard isAligned, new <= old, range.lowerBound.value + old <= UserAddress.end.value else { throw .EINVAL }
        return (range.lowerBound..<range.lowerBound + old, new)
    }

    private func resize(_ range: Range<UserAddress>, _ length: UInt64) throws(Errno) {
        guard let vma = find(range.lowerBound) else { throw .EFAULT }
        let old = range.upperBound.value - range.lowerBound.value
        if length == old { return }
        if length < old {
            let cut = (range.lowerBound + length)..<range.upperBound
            guard maySplit(cut) else { throw .EINVAL }
            return remove(cut)
        }
        guard range.upperBound <= vma.range.upperBound, !vma.refusesGrowth else { throw .EFAULT }
        let (end, overflow) = range.lowerBound.value.addingReportingOverflow(length)
        guard range.upperBound == vma.range.upperBound, !overflow, UserAddress(end) <= UserAddress.end else {
            throw .ENOMEM
        }
        let index = firstIndex(endingAfter: range.lowerBound)
        if index + 1 < vmas.count, vmas[index + 1].range.lowerBound.value < end { throw .ENOMEM }
        // What can't be merged with its new part is not made longer in place. Kernel: `VM_SPECIAL`.
        if vma.flags.mixedMap { throw .ENOMEM }
        let list = vma.mappings
        list?.lock.lock()
        vma.range = vma.range.lowerBound..<UserAddress(end)
        list?.lock.unlock()
        mergeGrown(at: index)
    }

    private func move(_ range: Range<UserAddress>, _ length: UInt64, _ target: UserAddress) throws(Errno) {
        let (end, overflow) = target.value.addingReportingOverflow(length)
        guard !overflow, Self.isUsable(target..<UserAddress(end)) else { throw .EINVAL }
        let place = target..<UserAddress(end)
        guard Self.overlap(place, range) == nil else { throw .EINVAL }
        guard let first = find(range.lowerBound) else { throw .EFAULT }
        let grows = length > range.upperBound.value - range.lowerBound.value
        if grows, first.refusesGrowth { throw .EFAULT }
        let isSame = length == range.upperBound.value - range.lowerBound.value
        // Only what moves must be in one VMA.
        guard isSame || min(range.lowerBound + length, range.upperBound) <= first.range.upperBound else {
            throw .EFAULT
        }
        if isSame { return try moveEach(range, target) }
        guard maySplit(place) else { throw .EINVAL }
        // What is at the target is gone also if what is to come there may not be cut out.
        remove(place)
        guard maySplit(range) else { throw .EINVAL }
        var source = range
        if length < range.upperBound.value - range.lowerBound.value {
            source = range.lowerBound..<(range.lowerBound + length)
            guard maySplit(source.upperBound..<range.upperBound) else { throw .EINVAL }
            remove(source.upperBound..<range.upperBound)
            // What was cut off is charged once more, as if the mapping grew by it. Kernel: `vrm_calc_charge`, of 6.18.
            let cut = range.upperBound.value - source.upperBound.value
            guard !first.flags.accounted || mayCommit(cut) else { throw .ENOMEM }
        }
        guard makeTables(first, from: source, to: target) else { throw .ENOMEM }
        moveVMA(source, place)
    }

    /// A move that changes no length takes every VMA of the range, one after the other; what is at the target of a hole
    /// stays. Kernel: `remap_move`, since Linux 6.17.
    private func moveEach(_ range: Range<UserAddress>, _ target: UserAddress) throws(Errno) {
        var address = range.lowerBound
        while address < range.upperBound {
            let index = firstIndex(endingAfter: address)
            guard index < vmas.count, let part = Self.overlap(vmas[index].range, address..<range.upperBound) else {
                return
            }
            let low = target + (part.lowerBound.value - range.lowerBound.value)
            if let level = vmas[index].hugeFile?.level, low.aligned(to: level) != low { throw .EINVAL }
            let place = low..<(low + (part.upperBound.value - part.lowerBound.value))
            guard maySplit(place) else { throw .EINVAL }
            remove(place)
            guard maySplit(part) else { throw .EINVAL }
            guard makeTables(vmas[firstIndex(endingAfter: address)], from: part, to: low) else { throw .ENOMEM }
            moveVMA(part, place)
            address = part.upperBound
        }
    }

    /// Maps what `address` shows a second time, `length` bytes of it from there on, at `target`, where it replaces what is
    /// there. Kernel: `mremap` of no bytes. Errors: EFAULT where nothing is mapped, or what may not grow; EINVAL for private
    /// memory, and where the target holds `address` or may not be cut; ENOMEM without a target, since nothing grows there.
    func mapAgain(_ address: UserAddress, length: UInt64, at target: UserAddress?) throws(Errno) {
        mmapLock.lockForWrite()
        defer { mmapLock.unlockWrite() }
        guard let vma = find(address) else { throw .EFAULT }
        // Huge pages of a pool: left out.
        guard vma.flags.shared, vma.hugeFile == nil else { throw .EINVAL }
        guard !vma.refusesGrowth else { throw .EFAULT }
        guard let target else { throw .ENOMEM }
        let place = target..<(target + length)
        guard maySplit(place) else { throw .EINVAL }
        remove(place)
        guard let vma = find(address) else { throw .EFAULT }
        guard maySplit(address..<address) else { throw .EINVAL }
        let new = VMA(
            self, identity: newIdentity(), range: place, firstPage: vma.backingPage(of: address), flags: vma.flags,
            backing: vma.backing)
        let index = firstIndex(endingAfter: target)
        vmas.insert(new, at: index)
        new.mappings?.add(new)
        merge(at: index)
    }

    /// Everything that may fail, done first: a table for each entry that will come.
    private func makeTables(_ vma: VMA, from source: Range<UserAddress>, to target: UserAddress) -> Bool {
        if let file = vma.hugeFile { return makeHugeTables(file, from: source, to: target) }
        var fits = true
        forEachMiddle(in: source) { part, word, table in
            if HostEntry(word.load()).isLargeLeaf { splitHuge(part.lowerBound, word, table) }
            var address = target + (part.lowerBound.value - source.lowerBound.value)
            let end = target + (part.upperBound.value - source.lowerBound.value)
            while fits, address < end {
                guard let middle = makeMiddleEntry(address), makeLastEntry(address, in: middle.word).word != nil else {
                    fits = false
                    return
                }
                address = address.aligned(to: .page2M) + PageLevel.page2M.bytes
            }
        }
        return fits
    }

    /// The new VMA is listed before the entries move and the old one afterwards no more, both under the list's lock: who
    /// takes a page away finds its entry in one of them.
    ///
    /// What has moved is unmapped at the old place like anything else, and the notifiers hear of it once more. Kernel:
    /// `copy_vma_and_data`, `unmap_source_vma`; a recording of 6.18 has the ranges in this order.
    private func moveVMA(_ source: Range<UserAddress>, _ place: Range<UserAddress>) {
        let whole = vmas[firstIndex(endingAfter: source.lowerBound)]
        var firstPage = whole.backingPage(of: source.lowerBound)
        if case .anonymous = whole.backing, !whole.mayHoldAnonymous { firstPage = Int(place.lowerBound.page) }
        let new = VMA(
            self, identity: newIdentity(), range: place, firstPage: firstPage, flags: whole.flags,
            backing: whole.backing)
        // Who serves the old place does not know the new one. Kernel: `mremap_userfaultfd_prep` without its event.
        new.inheritAnonymous(from: whole)
        let list = whole.mappings
        notifyStart(source)
        list?.lock.lock()
        list?.addLocked(new)
        if let file = whole.hugeFile {
            moveHugeEntries(file, source, place.lowerBound)
        } else {
            moveEntries(source, place.lowerBound)
        }
        list?.lock.unlock()
        notifyEnd(source)

        splitVMA(at: source.lowerBound)
        splitVMA(at: source.upperBound)
        let old = vmas[firstIndex(endingAfter: source.lowerBound)]
        new.promises.store(old.promises.exchange(0, ordering: .relaxed), ordering: .relaxed)
        notifyStart(source)
        notifyEnd(source)
        old.mappings?.remove(old)
        vmas.remove(at: firstIndex(endingAfter: source.lowerBound))
        let index = firstIndex(endingAfter: place.lowerBound)
        vmas.insert(new, at: index)
        merge(at: index)
    }

    /// Kernel: `move_page_tables`.
    private func moveEntries(_ source: Range<UserAddress>, _ target: UserAddress) {
        forEachMiddle(in: source) { part, middle, _ in
            let table = HostEntry(middle.load())
            guard table.isPresent, !table.isLargeLeaf else { return }
            pageTableLock.lock()
            defer { pageTableLock.unlock() }
            for page in part.lowerBound.page..<part.upperBound.page {
                let word = memory.entry(Int(page & 511), of: table.frame)
                guard word.peek() != 0 else { continue }
                let entry = HostEntry(word.exchange(0))
                memory.record(
                    Event(.hostEntryCleared, frame: entry.frame, guest: page, level: 1, value: entry.bits))
                let address = target + (page - source.lowerBound.page) * pageSize
                guard let new = leaf(address) else { preconditionFailure("the tables were made before") }
                setLeaf(new.word, entry, address)
            }
        }
    }
}

extension VMA {
    /// Kernel: `VM_DONTEXPAND | VM_PFNMAP`.
    fileprivate var refusesGrowth: Bool { flags.pfnMap || driver?.refusals.contains(.growth) == true }
}
