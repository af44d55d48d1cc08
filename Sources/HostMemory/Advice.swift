import Audit
import Frames
import Synchrony

/// madvise. Each advice takes `mmapLock` as the kernel's does.
extension AddressSpace {
    /// Kernel: `madvise`. Errors: EINVAL for a bad range, and for what the advice is not for: `dontNeed`, `cold` and
    /// `pageOut` on a PFN map, `free` on anything but private anonymous memory, guards on a driver's, most of them on secret
    /// memory; ENOMEM for a hole, after the rest was done; of `populateRead`, `populateWrite` and `remove` those of `populate` and `removePages`.
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

    /// Calls `body` with each area that has pages of `range`, and those pages, `mmapLock` held for read. Errors: ENOMEM for a
    /// hole, after the rest was done; what `body` throws, at once. Kernel: `madvise_walk_vmas`.
    func forEachPart(
        of range: Range<UserAddress>, _ body: (VMA, Range<UserAddress>) throws(Errno) -> Void
    ) throws(Errno) {
        mmapLock.lockForRead()
        defer { mmapLock.unlockRead() }
        var reached = range.lowerBound
        var hasHole = false
        while reached < range.upperBound {
            let index = firstIndex(endingAfter: reached)
            guard index < vmas.count, let part = Self.overlap(vmas[index].range, reached..<range.upperBound) else {
                throw .ENOMEM
            }
            if part.lowerBound > reached { hasHole = true }
            try body(vmas[index], part)
            reached = part.upperBound
        }
        if hasHole { throw .ENOMEM }
    }

    /// Of the huge pages of a pool only those go that lie in `range` as a whole. Kernel: `madvise_dontneed_single_vma`.
    private func dontNeed(_ range: Range<UserAddress>) throws(Errno) {
        try forEachPart(of: range) { (vma, part) throws(Errno) in
            guard !vma.flags.pfnMap, !vma.flags.locked else { throw .EINVAL }
            let level = vma.hugeFile?.level ?? .page4K
            let end = part.upperBound.aligned(to: level)
            guard part.lowerBound.aligned(to: level) == part.lowerBound else { throw .EINVAL }
            if part.lowerBound < end { zapNotified(part.lowerBound..<end) }
        }
    }

    /// Sets or takes back marks of the areas in `range`. Errors: EINVAL where one would change inside a huge page of a pool;
    /// ENOMEM for a hole, after the rest was done; what `change` throws, at once.
    private func mark(
        _ range: Range<UserAddress>, _ change: (VMA, inout VMAFlags) throws(Errno) -> Void
    ) throws(Errno) {
        mmapLock.lockForWrite()
        defer { mmapLock.unlockWrite() }
        let hole = hasHole(range)
        try changeEach(range) { (vma) throws(Errno) in
            var flags = vma.flags
            try change(vma, &flags)
            return flags
        } then: { _ in
        }
        if hole { throw .ENOMEM }
    }

    /// Kernel: `ksm_madvise`: what can't be merged is left as it is.
    private func setMergeable(_ range: Range<UserAddress>) throws(Errno) {
        try mark(range) { vma, flags in
            let isSpecial = flags.pfnMap || flags.mixedMap || flags.io
            if !isSpecial, !flags.shared, vma.hugeFile == nil { flags.mergeable = true }
        }
    }

    /// Each merged page gets a copy of its own. Error: ENOMEM also without memory for that.
    private func setUnmergeable(_ range: Range<UserAddress>) throws(Errno) {
        try mark(range) { (vma, flags) throws(Errno) in
            guard flags.mergeable, let part = Self.overlap(vma.range, range) else { return }
            try unmerge(vma, part)
            flags.mergeable = false
        }
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
        try mark(range) { _, flags in
            flags.hugePage = wanted
            flags.noHugePage = !wanted
        }
    }
}
