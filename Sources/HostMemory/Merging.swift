import Frames
import Synchronization
import Synchrony

/// Neighbours that could be one VMA become one. Kernel: `vma_merge_new_range`, `vma_merge_existing_range`.
///
/// What a process can see of it: a fault maps neighbours up to the VMA's end, and fork copies a VMA's entries whole or not
/// at all.
extension AddressSpace {
    /// Gives each VMA of `range`, split at its ends, the flags that `wanted` says. One whose flags change becomes one with
    /// its neighbours where it can, and then `then` hears of its part. Holes are passed over. `mmapLock` held for write.
    /// Errors, which end it: EINVAL at the first that would have to be split inside a huge page of a pool; those of `wanted`.
    func changeEach(
        _ range: Range<UserAddress>, _ wanted: (VMA) throws(Errno) -> VMAFlags,
        then: (Range<UserAddress>) -> Void
    ) throws(Errno) {
        var address = range.lowerBound
        while address < range.upperBound {
            let index = firstIndex(endingAfter: address)
            guard index < vmas.count, let part = Self.overlap(vmas[index].range, address..<range.upperBound) else {
                return
            }
            address = part.upperBound
            let flags = try wanted(vmas[index])
            guard flags != vmas[index].flags else { continue }
            guard maySplit(part) else { throw .EINVAL }
            splitVMA(at: part.lowerBound)
            splitVMA(at: part.upperBound)
            let changed = firstIndex(endingAfter: part.lowerBound)
            let vma = vmas[changed]
            vma.mappings?.lock.lock()
            vma.flags = flags
            vma.mappings?.lock.unlock()
            merge(at: changed)
            then(part)
        }
    }

    /// Joins the VMA at `index` with the one before and the one after, where it can. `mmapLock` held for write.
    func merge(at index: Int) {
        // The one before goes first: with both it can be one only if they can be one with each other.
        var place = index
        if index > 0, join(index - 1) { place = index - 1 }
        if place + 1 < vmas.count { join(place) }
    }

    /// Joins the VMA at `index`, which has grown at its end, with the one that it meets there, where it can. A parent that may
    /// find its private pages does not keep it from one that never had any. Kernel: `vma_merge_extend`.
    func mergeGrown(at index: Int) {
        guard index + 1 < vmas.count else { return }
        join(index, hasGrown: true)
    }

    /// Joins the VMAs at `index` and behind it, if they are one. Whether they were.
    @discardableResult private func join(_ index: Int, hasGrown: Bool = false) -> Bool {
        let (lower, upper) = (vmas[index], vmas[index + 1])
        guard lower.continues(in: upper), lower.flags == upper.flags,
            UserFaultRegistration.isSame(lower.userFaults, upper.userFaults),
            anonymousFits(lower, upper, hasGrown: hasGrown)
        else { return false }
        let guarded = lower.mayHoldGuards.load(ordering: .relaxed) || upper.mayHoldGuards.load(ordering: .relaxed)
        if !lower.mayHoldAnonymous { lower.inheritAnonymous(from: upper) }
        lower.mayHoldGuards.store(guarded, ordering: .relaxed)
        // Until the entries are found by the longer VMA they must be by the other.
        let list = lower.mappings
        list?.lock.lock()
        lower.range = lower.range.lowerBound..<upper.range.upperBound
        list?.removeLocked(upper)
        list?.lock.unlock()
        vmas.remove(at: index + 1)
        return true
    }

    /// Kernel: `is_mergeable_anon_vma`.
    private func anonymousFits(_ lower: VMA, _ upper: VMA, hasGrown: Bool) -> Bool {
        switch (lower.mayHoldAnonymous, upper.mayHoldAnonymous) {
        case (false, false): true
        case (true, false): hasGrown || !lower.hasInheritedAnonymous
        case (false, true): !upper.hasInheritedAnonymous
        case (true, true):
            lower.anonymous.load(ordering: .relaxed) == upper.anonymous.load(ordering: .relaxed)
        }
    }

    /// Says that private pages may come into `vma`. It takes over what a neighbour has, if they could be one but for their
    /// rights, so that they can when the rights are equal. `mmapLock` held, for read at least.
    /// Kernel: `anon_vma_prepare`, `find_mergeable_anon_vma`.
    func prepareAnonymous(_ vma: VMA) {
        guard !vma.mayHoldAnonymous else { return }
        let identity = neighbourAnonymous(vma) ?? host.newAnonymousIdentity()
        _ = vma.anonymous.compareExchange(expected: 0, desired: identity, ordering: .acquiringAndReleasing)
    }

    private func neighbourAnonymous(_ vma: VMA) -> UInt64? {
        let index = firstIndex(endingAfter: vma.range.lowerBound)
        guard index < vmas.count, vmas[index] === vma else { return nil }
        if index + 1 < vmas.count, let found = lend(vmas[index + 1], to: vma, vma.continues(in: vmas[index + 1])) {
            return found
        }
        if index > 0 { return lend(vmas[index - 1], to: vma, vmas[index - 1].continues(in: vma)) }
        return nil
    }

    private func lend(_ neighbour: VMA, to vma: VMA, _ adjacent: Bool) -> UInt64? {
        var flags = neighbour.flags
        flags.protection = vma.flags.protection
        guard adjacent, flags == vma.flags, neighbour.mayHoldAnonymous, !neighbour.hasInheritedAnonymous else {
            return nil
        }
        return neighbour.anonymous.load(ordering: .acquiring)
    }
}

extension VMA {
    /// The same possible finders of private pages as `other`, and what else a part of it has. Kernel: `anon_vma_clone`.
    func inheritAnonymous(from other: VMA) {
        anonymous.store(other.anonymous.load(ordering: .acquiring), ordering: .releasing)
        hasInheritedAnonymous = other.hasInheritedAnonymous
        mayHoldGuards.store(other.mayHoldGuards.load(ordering: .acquiring), ordering: .releasing)
    }

    /// Whether `other` begins where this one ends, in the address space and in the backing. A driver's never do.
    func continues(in other: VMA) -> Bool {
        guard range.upperBound == other.range.lowerBound else { return false }
        switch (backing, other.backing) {
        case (.anonymous, .anonymous): return backingPage(of: range.upperBound) == other.firstPage
        case (.object(let object, _, _), .object(let another, _, _)):
            return object === another && backingPage(of: range.upperBound) == other.firstPage
        default: return false
        }
    }
}
