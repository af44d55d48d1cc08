import Frames
import Synchronization
import Synchrony

/// Guards: pages of a mapping that nobody may touch, without areas of their own. Kernel: `madvise_guard_install`.
extension AddressSpace {
    /// What was there goes; every access is SIGSEGV from then on. Errors: EINVAL for a driver's mapping and for secret memory; ENOMEM for a hole,
    /// after the rest was done, and without memory.
    func installGuards(_ range: Range<UserAddress>) throws(Errno) {
        try forEachGuardable(range) { (vma, part) throws(Errno) in
            if vma.flags.locked { throw .EINVAL }
            if case .anonymous = vma.backing { prepareAnonymous(vma) }
            vma.mayHoldGuards.store(true, ordering: .releasing)
            // What is in the way goes, with all else.
            while try !placeGuards(part) { zapNotified(part) }
        }
    }

    /// False: something other than a guard was met. Kernel: `madvise_guard_install`.
    private func placeGuards(_ part: Range<UserAddress>) throws(Errno) -> Bool {
        for page in part.lowerBound.page..<part.upperBound.page {
            let address = UserAddress(page << pageShift)
            guard let middle = makeMiddleEntry(address) else { throw .ENOMEM }
            let last = makeLastEntry(address, in: middle.word)
            if last.isLeaf { return false }
            guard let word = last.word else { throw .ENOMEM }
            pageTableLock.lock()
            let seen = HostEntry(word.load())
            let isFree = seen.bits == 0 || seen.isGuard
            if isFree { word.store(HostEntry.guarding) }
            pageTableLock.unlock()
            if !isFree { return false }
        }
        return true
    }

    /// The next access finds new memory. Errors as `installGuards`, but for secret memory, in which there is nothing to do.
    func removeGuards(_ range: Range<UserAddress>) throws(Errno) {
        try forEachGuardable(range) { (_, part) throws(Errno) in
            forEachSmall(in: part) { word, _ in
                if HostEntry(word.peek()).isGuard { word.store(0) }
            }
        }
    }

    /// Calls `body` for each area's part of `range`, `mmapLock` held for read. Kernel: `is_valid_guard_vma`.
    private func forEachGuardable(
        _ range: Range<UserAddress>, _ body: (VMA, Range<UserAddress>) throws(Errno) -> Void
    ) throws(Errno) {
        try forEachPart(of: range) { (vma, part) throws(Errno) in
            let flags = vma.flags
            if flags.pfnMap || flags.mixedMap || flags.io || vma.hugeFile != nil { throw .EINVAL }
            try body(vma, part)
        }
    }
}
