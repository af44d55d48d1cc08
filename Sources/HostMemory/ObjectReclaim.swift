import Audit
import Frames
import Synchronization
import Synchrony

/// What the host does with an object's pages on its own.
extension MemoryObject {
    /// Gives up pages that are no longer in the index.
    func discard(_ gone: [ObjectPage]) {
        let memory = host.memory
        for page in gone {
            if let slot = page.slot { host.swap?.release(slot, memory) }
            guard let frame = page.frame else { continue }
            memory.lists?.disown(memory.page(frame))
            memory.put(memory.page(frame))
        }
    }

    /// Takes an isolated page out of memory; the caller's reference is gone then too. A clean one is dropped: the disk has
    /// its bytes, or, in a memfd, they are zeros that only were read. A memfd's dirty page goes to the swap device, a file's
    /// is left to `writeBack`. False: it stayed. Kernel: `shmem_writeout`, `__remove_mapping`.
    /// - Parameter isAsked: by a process, not for want of memory: without a swap device a memfd's page is unmapped all the
    ///   same, and dropped if it is clean.
    func evict(_ page: UnsafeMutablePointer<PageFrame>, _ index: Int, isAsked: Bool) -> Bool {
        let memory = host.memory
        if disk == nil, host.swap == nil, !isAsked { return false }
        mappings.unmap(index..<index + 1, keepAnonymous: true)
        pagesLock.lock()
        defer { pagesLock.unlock() }
        guard takeOut(page, index) else { return false }
        let isDirty = page.pointee.flags.load(ordering: .relaxed) & PageFlags.anyDirty != 0
        let replacement: ObjectPage? =
            if !isDirty { .absent } else if disk != nil { nil } else { swapOut(memory.frame(of: page)) }
        guard let replacement else {
            page.pointee.referenceCount.store(2, ordering: .releasing)
            replace(index, by: .frame(memory.frame(of: page)))
            return false
        }
        replace(index, by: replacement)
        memory.lists?.disown(page)
        memory.freeFolio(page)
        return true
    }

    /// Makes sure that nobody but the object and the caller holds the page, and that nobody can: its count is 0 then.
    private func takeOut(_ page: UnsafeMutablePointer<PageFrame>, _ index: Int) -> Bool {
        indexLock.lock()
        defer { indexLock.unlock() }
        guard frames.indices.contains(index), frames[index].frame == host.memory.frame(of: page),
            !host.memory.isPoisoned(page)
        else { return false }
        guard host.memory.freeze(page, at: 2) else { return false }
        frames[index] = .leaving
        return true
    }

    /// The slot that now has the frame's bytes. Nil: no room, or an I/O error.
    private func swapOut(_ frame: HostFrame) -> ObjectPage? {
        guard let swap = host.swap, let slot = swap.reserve() else { return nil }
        if swap.write(slot, from: frame, host.memory) { return .swapped(slot) }
        swap.release(slot, host.memory)
        return nil
    }

    /// Puts the content of an isolated page into another frame, which is the object's from then on. False: somebody holds
    /// the page. Kernel: `folio_migrate_mapping`.
    func migrate(
        _ page: UnsafeMutablePointer<PageFrame>, to new: UnsafeMutablePointer<PageFrame>, _ index: Int
    ) -> Bool {
        let memory = host.memory
        mappings.unmap(index..<index + 1, keepAnonymous: true)
        pagesLock.lock()
        defer { pagesLock.unlock() }
        guard takeOut(page, index) else { return false }
        memory.takeOver(page, new)
        memory.get(new)
        memory.lists?.own(new, self, index)
        memory.lists?.disown(page)
        replace(index, by: .frame(memory.frame(of: new)))
        return true
    }

    // MARK: Writeback

    /// Writes every dirty page to the disk. Each is write-protected and cleaned first in every address space, so that the
    /// next write to it is noticed. Error: EIO, once, if any page could not be written since the last call.
    /// Kernel: `fsync`, `folio_clear_dirty_for_io`, `folio_mkclean`.
    public func writeBack() throws(Errno) {
        guard let disk else { return }
        for index in 0..<pages where !writeBack(index, disk) {
            indexLock.lock()
            failedWrites = true
            indexLock.unlock()
        }
        indexLock.lock()
        let failed = failedWrites
        failedWrites = false
        indexLock.unlock()
        if failed { throw .EIO }
    }

    /// False: an I/O error.
    private func writeBack(_ index: Int, _ disk: Disk) -> Bool {
        guard let page = takeIfPresent(index) else { return true }
        defer { host.memory.put(page) }
        // The mark first: a write that comes after this makes the page dirty anew.
        let old = page.pointee.flags.bitwiseAnd(~PageFlags.anyDirty, ordering: .acquiringAndReleasing).oldValue
        let entryWasDirty = mappings.clean(index..<index + 1)
        guard entryWasDirty || old & PageFlags.anyDirty != 0 else { return true }
        pagesLock.lock()
        defer { pagesLock.unlock() }
        guard holds(page, at: index) else { return true }
        return disk.write(index, from: host.memory.frame(of: page), host.memory)
    }
}
