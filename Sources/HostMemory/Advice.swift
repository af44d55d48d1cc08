import Audit
import Frames
import Synchrony

/// madvise. Each advice takes `mmapLock` as the kernel's does.
extension AddressSpace {
    /// Kernel: `madvise`. Errors: EINVAL for a bad range, and for what the advice is not for: `dontNeed`, `cold` and
    /// `pageOut` on a PFN map, `free` on anything but private anonymous memory, guards on a driver's; ENOMEM for a hole,
    /// after the rest was done; of `populateRead`, `populateWrite` and `remove` those of `populate` and `removePages`.
    ///
    /// `pageOut` takes what it can: pages that are shared, pinned, or have no place to go, stay.
    public func advise(_ range: Range<UserAddress>, _ advice: Advice) throws(Errno) {
        guard Self.isUsable(range) else { throw .EINVAL }
        switch advice {
        case .dontNeed: try dontNeed(range)
        case .hugePage: try setHugePages(range, wanted: true)
        case .noHugePage: try setHugePages(range, wanted: false)
        case .populateRead: try populate(range, write: false)
        case .populateWrite: try populate(range, write: true)
        case .remove: try removePages(range)
        case .cold: try forEachAgeable(range) { cool($1) }
        case .pageOut: try pageOut(range)
        case .free: try free(range)
        case .collapse: try collapse(range)
        case .mergeable: try setMergeable(range)
        case .unmergeable: try setUnmergeable(range)
        case .hardwarePoison: try poison(range)
        case .guardInstall: try installGuards(range)
        case .guardRemove: try removeGuards(range)
        }
    }

    /// Takes `mmapLock` for read only, as the kernel does. Kernel: `madvise_dontneed_single_vma`.
    private func dontNeed(_ range: Range<UserAddress>) throws(Errno) {
        mmapLock.lockForRead()
        defer { mmapLock.unlockRead() }
        var index = firstIndex(endingAfter: range.lowerBound)
        var reached = range.lowerBound
        var hole = false
        while index < vmas.count, let part = Self.overlap(vmas[index].range, range) {
            if vmas[index].flags.pfnMap { throw .EINVAL }
            if let file = vmas[index].hugeFile,
                part.lowerBound.aligned(to: file.level) != part.lowerBound
                    || part.upperBound.aligned(to: file.level) != part.upperBound
            {
                throw .EINVAL
            }
            if part.lowerBound > reached { hole = true }
            reached = part.upperBound
            zapNotified(part)
            index += 1
        }
        if hole || reached < range.upperBound { throw .ENOMEM }
    }

    /// Kernel: `ksm_madvise`: what can't be merged is left as it is.
    private func setMergeable(_ range: Range<UserAddress>) throws(Errno) {
        mmapLock.lockForWrite()
        defer { mmapLock.unlockWrite() }
        guard maySplit(range) else { throw .EINVAL }
        let hole = hasHole(range)
        changeEach(range) { vma in
            var flags = vma.flags
            let isSpecial = flags.pfnMap || flags.mixedMap || flags.io
            if !isSpecial, !flags.shared, vma.hugeFile == nil { flags.mergeable = true }
            return flags
        } then: { _ in
        }
        if hole { throw .ENOMEM }
    }

    /// Each merged page gets a copy of its own. Error: ENOMEM also without memory for that.
    private func setUnmergeable(_ range: Range<UserAddress>) throws(Errno) {
        mmapLock.lockForWrite()
        defer { mmapLock.unlockWrite() }
        guard maySplit(range) else { throw .EINVAL }
        let hole = hasHole(range)
        var failure: Errno?
        for vma in vmas[splitting(range)] where vma.flags.mergeable {
            do throws(Errno) { try unmerge(vma, vma.range) } catch { failure = error }
        }
        changeEach(range) { vma in
            var flags = vma.flags
            flags.mergeable = false
            return flags
        } then: { _ in
        }
        if let failure { throw failure }
        if hole { throw .ENOMEM }
    }

    /// Breaks the memory behind each page of `range`. Errors: EFAULT for a hole, EIO where no page can be had.
    /// Kernel: `madvise_inject_error`.
    private func poison(_ range: Range<UserAddress>) throws(Errno) {
        for page in range.lowerBound.page..<range.upperBound.page {
            let frame: HostFrame
            do throws(GetUserPagesError) {
                let page = try getUserPageUnlocked(
                    UserAddress(page << pageShift), LookupFlags(), holder: .getUserPages)
                frame = page.frame
                page.releaseUnused()
            } catch {
                throw .EFAULT
            }
            host.poison(frame)
        }
    }

    private func setHugePages(_ range: Range<UserAddress>, wanted: Bool) throws(Errno) {
        mmapLock.lockForWrite()
        defer { mmapLock.unlockWrite() }
        let hole = hasHole(range)
        guard maySplit(range) else { throw .EINVAL }
        changeEach(range) { vma in
            var flags = vma.flags
            flags.hugePage = wanted
            flags.noHugePage = !wanted
            return flags
        } then: { _ in
        }
        if hole { throw .ENOMEM }
    }
}
