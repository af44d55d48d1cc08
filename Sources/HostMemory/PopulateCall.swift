import Frames
import Synchrony

/// The advices that make pages and take them out of their object.
extension AddressSpace {
    /// Faults in each page of `range` as a read or a write would, from low to high, and ends at the first that can't be.
    /// Kernel: `madvise_populate`. Errors: ENOMEM for a hole and without memory; EINVAL where the mapping does not allow the
    /// access, for PFN maps and for secret memory; EFAULT where an access would get SIGBUS; EHWPOISON.
    func populate(_ range: Range<UserAddress>, write: Bool) throws(Errno) {
        var address = range.lowerBound
        while address < range.upperBound {
            mmapLock.lockForRead()
            guard let vma = find(address) else {
                mmapLock.unlockRead()
                throw .ENOMEM
            }
            // Not what an access asks: a mapping that may only be written is not for reading here.
            guard !vma.flags.pfnMap, !vma.flags.io, !vma.isSecret, write ? vma.flags.write : vma.flags.read else {
                mmapLock.unlockRead()
                throw .EINVAL
            }
            if touchPresent(address, write: write) {
                mmapLock.unlockRead()
                address = address + pageSize
                continue
            }
            let outcome = handleFault(vma, address, write ? .write : .read)
            mmapLock.unlockRead()
            if case .failed(let error) = outcome {
                if case .outOfMemory = error, host.makeRoom() { continue }
                throw error.errno
            }
            outcome.wait()
        }
    }

    /// Whether the page is there with these rights: then it counts as used, as get-user-pages does it. `mmapLock` held.
    private func touchPresent(_ address: UserAddress, write: Bool) -> Bool {
        pageTableLock.lock()
        defer { pageTableLock.unlock() }
        guard let leaf = leaf(address), leaf.entry.isPresent, !write || leaf.entry.isWritable else { return false }
        if !leaf.entry.isSpecial { touch(memory.page(leaf.frame(of: address)), leaf, write: write) }
        return true
    }

    /// Takes the pages that `range` shows out of their objects, for everybody. Kernel: `madvise_remove`. Errors, at the first
    /// VMA that is none: EINVAL for private anonymous memory, drivers' mappings and secret memory (EOPNOTSUPP in a child, where it isn't
    /// locked), EACCES for a private mapping of an object;
    /// ENOMEM for a hole, after the rest was done.
    func removePages(_ range: Range<UserAddress>) throws(Errno) {
        let hole = try forEachSharedPart(range) { backing, pages throws(Errno) in
            switch backing {
            case .object(let object, _, _):
                if object.isSecret { throw .EOPNOTSUPP }
                if let disk = object.disk, UInt64(pages.upperBound) > disk.largestFile >> pageShift { throw .EFBIG }
                object.punchHole(pages)
            case .huge(let file, _, _): file.punchHole(smallPages: pages)
            case .anonymous, .anonymousShared: throw .EINVAL
            case .driver: throw .ENODEV
            }
        }
        if hole { throw .ENOMEM }
    }

    /// Calls `body` with each backing in `range` and the pages of it that are shown. Error: EACCES for a private mapping of
    /// memory with a name. Whether there was a hole. The lock is dropped around each call: it comes after the object's.
    private func forEachSharedPart(
        _ range: Range<UserAddress>, _ body: (Backing, Range<Int>) throws(Errno) -> Void
    ) throws(Errno) -> Bool {
        var address = range.lowerBound
        var hole = false
        while address < range.upperBound {
            mmapLock.lockForRead()
            let index = firstIndex(endingAfter: address)
            guard index < vmas.count, let part = Self.overlap(vmas[index].range, address..<range.upperBound) else {
                mmapLock.unlockRead()
                return true
            }
            if part.lowerBound > address { hole = true }
            let vma = vmas[index]
            let (backing, shared, first) = (vma.backing, vma.flags.shared, vma.backingPage(of: part.lowerBound))
            let isLocked = vma.flags.locked
            mmapLock.unlockRead()
            if isLocked { throw .EINVAL }
            if !shared, backing.hasName { throw .EACCES }
            try body(backing, first..<first + Int(part.upperBound.page - part.lowerBound.page))
            address = part.upperBound
        }
        return hole
    }
}

extension Backing {
    /// Kernel: `vma->vm_file` of shmem or hugetlbfs.
    fileprivate var hasName: Bool {
        switch self {
        case .object, .huge: true
        case .anonymous, .anonymousShared, .driver: false
        }
    }
}
