import Frames
import Synchronization
import Synchrony

/// mmap and munmap. Each takes `mmapLock` for write itself.
extension AddressSpace {
    /// Maps `length` bytes of `backing` at `address`; the mapping is never moved elsewhere.
    /// Kernel: `mmap(MAP_FIXED_NOREPLACE)`; with `replacing` `mmap(MAP_FIXED)`: what is there goes first, and stays away if
    /// the driver then refuses.
    ///
    /// Errors: EINVAL for what is not page-aligned, empty, or outside user space, and for a private mapping of secret memory;
    /// EPERM for such a one that may execute, and for a driver's that may not; EEXIST for an overlap; ENOMEM; what the
    /// driver answers.
    public func map(
        at address: UserAddress, length: UInt64, protection: Protection, backing: Backing, replacing: Bool = false,
        accounted: Bool = false
    ) throws(Errno) {
        let (end, overflow) = address.value.addingReportingOverflow(length)
        guard length > 0, !overflow else { throw .EINVAL }
        let range = address..<UserAddress(end)
        guard Self.isUsable(range), Self.firstPage(of: backing) >= 0 else { throw .EINVAL }
        mmapLock.lockForWrite()
        defer { mmapLock.unlockWrite() }
        guard !hasExited else { throw .EINVAL }
        guard !replacing || maySplit(range) else { throw .EINVAL }
        // Private memory is accounted for before what is there goes; shared memory with its object, after that.
        if accounted, !mayCommit(length) {
            // What was cut by then stays so. Kernel: `vms_gather_munmap_vmas`, `reattach_vmas`.
            if replacing {
                splitVMA(at: range.lowerBound)
                splitVMA(at: range.upperBound)
            }
            throw .ENOMEM
        }
        if replacing { remove(range) }
        let index = firstIndex(endingAfter: address)
        if index < vmas.count, vmas[index].range.lowerBound < range.upperBound { throw .EEXIST }
        if case .anonymousShared = backing, !mayCommit(length) { throw .ENOMEM }
        let vma = makeVMA(range, protection, backing)
        if protection.execute, vma.driver?.refusals.contains(.execution) == true { throw .EPERM }
        if vma.isSecret {
            // Kernel: `path_noexec`, `secretmem_mmap_prepare`.
            if protection.execute { throw .EPERM }
            if !vma.flags.shared { throw .EINVAL }
        }
        if case .huge(let file, _, let shared) = vma.backing {
            guard address.aligned(to: file.level) == address, length & (file.level.bytes - 1) == 0 else {
                throw .EINVAL
            }
            let count = Int(length / file.level.bytes)
            if shared {
                let first = vma.firstPage / Int(file.level.frames)
                try file.reserve(first..<first + count)
            } else {
                guard file.pool.reserve(count) else { throw .ENOMEM }
                vma.promises.store(count, ordering: .relaxed)
            }
        }
        vmas.insert(vma, at: index)
        vma.mappings?.add(vma)
        guard case .driver(let driver, _, _) = vma.backing else { return merge(at: index) }
        guard let error = driver.mapped(self, vma.info) else { return }
        remove(range)
        throw error
    }

    /// Whether `length` bytes fit into memory and swap, were they empty. Asked for shared anonymous memory, whose object is as
    /// large as its mapping, and by `SystemCalls` for private memory. Kernel: `__vm_enough_memory`, the heuristic.
    func mayCommit(_ length: UInt64) -> Bool {
        length >> pageShift <= UInt64(memory.ram.count + (host.swap?.slots ?? 0))
    }

    /// Whether something is mapped in `range`.
    func overlapsArea(_ range: Range<UserAddress>) -> Bool {
        mmapLock.lockForRead()
        defer { mmapLock.unlockRead() }
        let index = firstIndex(endingAfter: range.lowerBound)
        return index < vmas.count && vmas[index].range.lowerBound < range.upperBound
    }

    func area(containing address: UserAddress) -> Range<UserAddress>? {
        mmapLock.lockForRead()
        defer { mmapLock.unlockRead() }
        return find(address)?.range
    }

    private static func firstPage(of backing: Backing) -> Int {
        switch backing {
        case .anonymous, .anonymousShared: 0
        case .object(_, let first, _), .driver(_, let first, _): first
        case .huge(let file, let first, _): first * Int(file.level.frames)
        }
    }

    private func makeVMA(_ range: Range<UserAddress>, _ protection: Protection, _ backing: Backing) -> VMA {
        var flags = VMAFlags()
        var backing = backing
        switch backing {
        case .anonymous: break
        case .anonymousShared:
            // As the kernel does it: an unnamed file in memory, so that it stays shared over fork.
            let pages = Int(range.upperBound.page - range.lowerBound.page)
            backing = .object(MemoryObject(host: host, pages: pages), firstPage: 0, shared: true)
            flags.shared = true
        case .object(let object, _, let shared):
            flags.shared = shared
            flags.locked = object.isSecret
        case .huge(_, _, let shared): flags.shared = shared
        case .driver(let driver, _, let shared):
            flags = driver.flags
            flags.shared = shared
        }
        flags.protection = protection
        flags.accounted = flags.write && !flags.shared
        // Anonymous memory counts its pages by address, so that neighbours continue each other.
        var firstPage = Self.firstPage(of: backing)
        if case .anonymous = backing { firstPage = Int(range.lowerBound.page) }
        return VMA(
            self, identity: newIdentity(), range: range, firstPage: firstPage, flags: flags, backing: backing)
    }

    /// Kernel: `munmap`. Holes are no error. Errors: EINVAL for a range that is not page-aligned, empty, or outside
    /// user space.
    public func unmap(_ range: Range<UserAddress>) throws(Errno) {
        guard Self.isUsable(range) else { throw .EINVAL }
        mmapLock.lockForWrite()
        defer { mmapLock.unlockWrite() }
        guard maySplit(range) else { throw .EINVAL }
        remove(range)
    }

    /// Removes the VMAs of `range` and their entries, in one pair of notifier calls for all of it (recorded on 6.18). The VMAs leave
    /// their backings' lists only when the entries are gone: until then whoever takes a page away must find them.
    func remove(_ range: Range<UserAddress>) {
        let indices = splitting(range)
        guard !indices.isEmpty else { return }
        var gather = Gather()
        notifyStart(range)
        for vma in vmas[indices] { zap(vma.range, &gather, dropGuards: true) }
        notifyEnd(range)
        for vma in vmas[indices] {
            vma.mappings?.remove(vma)
            vma.hugeFile?.pool.unreserve(vma.promises.exchange(0, ordering: .relaxed))
        }
        vmas.removeSubrange(indices)
        gather.flush(memory)
    }

    /// Makes `address` a border between two VMAs if it lies inside one; a huge leaf across it is split first. The notifiers
    /// hear of its 2 MiB even if there is only a table. `mmapLock` held for write. Kernel: `split_vma`,
    /// `vma_adjust_trans_huge`, `split_huge_pmd_if_needed`; a recording of 6.18 has such ranges.
    func splitVMA(at address: UserAddress) {
        let index = firstIndex(endingAfter: address)
        guard index < vmas.count, vmas[index].range.lowerBound < address else { return }
        let vma = vmas[index]
        let block = address.aligned(to: .page2M)
        if block != address, vma.range.lowerBound <= block, block + PageLevel.page2M.bytes <= vma.range.upperBound,
            case .present(let word, let table) = middleEntry(address), HostEntry(word.load()).isPresent
        {
            splitHuge(address, word, table)
        }
        // The promise stays with the lower part, whose faults are as likely.
        let upper = VMA(
            self, identity: newIdentity(), range: address..<vma.range.upperBound,
            firstPage: vma.backingPage(of: address), flags: vma.flags, backing: vma.backing)
        upper.inheritAnonymous(from: vma)
        upper.userFaults = vma.userFaults
        let list = vma.mappings
        list?.lock.lock()
        vma.range = vma.range.lowerBound..<address
        list?.addLocked(upper)
        list?.lock.unlock()
        vmas.insert(upper, at: index + 1)
    }

    /// Where the first hole in `range` begins; its end if there is none. `mmapLock` held.
    func endOfMapped(_ range: Range<UserAddress>) -> UserAddress {
        var reached = range.lowerBound
        var index = firstIndex(endingAfter: reached)
        while reached < range.upperBound, index < vmas.count, vmas[index].range.lowerBound <= reached {
            reached = vmas[index].range.upperBound
            index += 1
        }
        return min(reached, range.upperBound)
    }

    /// The VMAs of `range`, split at its ends. `mmapLock` held for write.
    func splitting(_ range: Range<UserAddress>) -> Range<Int> {
        splitVMA(at: range.lowerBound)
        splitVMA(at: range.upperBound)
        let first = firstIndex(endingAfter: range.lowerBound)
        var last = first
        while last < vmas.count, vmas[last].range.lowerBound < range.upperBound { last += 1 }
        return first..<last
    }

    /// Whether `range` has a hole. `mmapLock` held.
    func hasHole(_ range: Range<UserAddress>) -> Bool { endOfMapped(range) < range.upperBound }
}
