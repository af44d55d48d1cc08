import Audit
import Frames
import Synchronization
import Synchrony

/// Moving pages to other frames. Kernel: `migrate_pages`.
///
/// Every entry becomes a migration entry, so that nobody can reach the page; if then nobody else holds it, its bytes are
/// copied, and the entries become ones for the new frame. Whoever comes upon a migration entry waits.
extension Host {
    /// Moves an isolated page to `new`, a frame that is the caller's. His reference on the page is gone either way, that on
    /// the frame if the page moved. False: it stayed, since somebody holds it.
    func migrate(_ page: UnsafeMutablePointer<PageFrame>, to new: UnsafeMutablePointer<PageFrame>) -> Bool {
        guard let lists = memory.lists else { return false }
        let flags = page.pointee.flags.load(ordering: .relaxed)
        guard flags & (PageFlags.head | PageFlags.swapCache | PageFlags.poisoned) == 0 else {
            lists.putBack(page)
            return false
        }
        let moved = memory.isAnonymous(page) ? migrateAnonymous(page, new) : migrateObjectPage(page, new, lists)
        if moved {
            memory.freeFolio(page)
            lists.putBack(new)
        } else {
            lists.putBack(page)
        }
        return moved
    }

    private func migrateAnonymous(
        _ page: UnsafeMutablePointer<PageFrame>, _ new: UnsafeMutablePointer<PageFrame>
    ) -> Bool {
        let old = memory.frame(of: page)
        guard unmap(anonymous: page, leaving: .migration), memory.freeze(page, at: 1) else {
            replaceMigrationEntries(for: old, by: page)
            return false
        }
        memory.takeOver(page, new)
        replaceMigrationEntries(for: old, by: new)
        return true
    }

    /// Its entries are taken away; the next accesses find the new frame in the object. (The kernel uses migration entries
    /// here too.)
    private func migrateObjectPage(
        _ page: UnsafeMutablePointer<PageFrame>, _ new: UnsafeMutablePointer<PageFrame>, _ lists: PageLists
    ) -> Bool {
        lists.withObject(of: page) { object, index in object.migrate(page, to: new, index) } ?? false
    }

    /// Makes entries for `page` of the migration entries for `frame`. Kernel: `remove_migration_ptes`.
    func replaceMigrationEntries(for frame: HostFrame, by page: UnsafeMutablePointer<PageFrame>) {
        forEachArea(anonymous: page) { space, vma, address in
            space.replaceMigrationEntry(for: frame, by: page, vma, address)
            return true
        }
    }

    // MARK: Folios

    /// Makes small pages of an isolated large folio, which go to their lists. The caller's reference is gone either way.
    /// False: it stayed as it is, since somebody holds or pins it. Kernel: `split_folio`.
    @discardableResult
    func splitFolio(_ head: UnsafeMutablePointer<PageFrame>) -> Bool {
        guard let lists = memory.lists else { return false }
        let count = memory.pageCount(head)
        forEachArea(anonymous: head) { space, _, address in
            space.splitHugeLeaf(of: head, at: address)
            return true
        }
        var unmapped = true
        for i in 0..<count where unmapped { unmapped = unmap(anonymous: head + i, leaving: .migration) }
        guard unmapped, memory.freeze(head, at: 1) else {
            for i in 0..<count { replaceMigrationEntries(for: memory.frame(of: head + i), by: head + i) }
            head.pointee.flags.bitwiseOr(PageFlags.active, ordering: .relaxed)
            lists.putBack(head)
            return false
        }
        memory.dissolve(head, count)
        for i in 0..<count { replaceMigrationEntries(for: memory.frame(of: head + i), by: head + i) }
        for i in 0..<count { lists.putBack(head + i, last: true) }
        return true
    }

    // MARK: Compaction

    /// Moves pages together until a block of 2^order frames is free. False: it can't be had.
    /// Kernel: `compact_zone_order`.
    public func compact(order: Int) -> Bool {
        guard let lists = memory.lists, order <= PhysicalMemory.largestOrder else { return false }
        let size = 1 << order
        var first = 0
        while first + size <= memory.ram.count {
            if memory.hasFreeBlock(order: order) { return true }
            if memory.isMovable(HostFrame(UInt64(first)), count: size) { empty(first, size, lists) }
            first += size
        }
        return memory.hasFreeBlock(order: order)
    }

    /// Moves every page out of a block. Frames of the block itself that the allocator offers as targets are held back.
    private func empty(_ first: Int, _ size: Int, _ lists: PageLists) {
        var held: [HostFrame] = []
        for i in first..<(first + size) {
            let page = memory.page(HostFrame(UInt64(i)))
            guard lists.isolate(page) else { continue }
            guard let target = allocate(outside: first..<(first + size), &held) else {
                lists.putBack(page)
                break
            }
            if !migrate(page, to: memory.page(target)) { memory.put(memory.page(target)) }
        }
        for frame in held { memory.put(memory.page(frame)) }
    }

    private func allocate(outside block: Range<Int>, _ held: inout [HostFrame]) -> HostFrame? {
        while let frame = memory.allocatePages(order: 0) {
            if !block.contains(Int(frame.number)) { return frame }
            held.append(frame)
        }
        return nil
    }

    /// Moves the pages that `range` of an address space maps to other frames. Returns how many moved.
    /// Kernel: `move_pages`, without a change of node.
    @discardableResult
    public func migrate(_ space: AddressSpace, _ range: Range<UserAddress>) -> Int {
        guard let lists = memory.lists else { return 0 }
        var moved = 0
        for page in space.isolatePages(range, lists, mappedOnce: false) {
            guard let target = memory.allocatePages(order: 0) else {
                lists.putBack(page)
                continue
            }
            if migrate(page, to: memory.page(target)) { moved += 1 } else { memory.put(memory.page(target)) }
        }
        return moved
    }
}

extension AddressSpace {
    /// `mmapLock` held. No notifier: nothing was present.
    fileprivate func replaceMigrationEntry(
        for frame: HostFrame, by page: UnsafeMutablePointer<PageFrame>, _ vma: VMA, _ address: UserAddress
    ) {
        pageTableLock.lock()
        defer { pageTableLock.unlock() }
        guard let leaf = leaf(address), leaf.level == .page4K, leaf.entry.isMigrating, leaf.entry.frame == frame
        else { return }
        memory.get(page)
        page.pointee.mapCount.add(1, ordering: .relaxed)
        if leaf.entry.wasExclusive {
            page.pointee.flags.bitwiseOr(PageFlags.anonymousExclusive, ordering: .relaxed)
        }
        let writable = leaf.entry.wasWritable && vma.flags.write
        let entry = HostEntry.leaf(memory.frame(of: page), vma.flags, writable: writable)
        let kept = leaf.entry.bits & HostEntry.userProtected
        setLeaf(leaf.word, entry.clearing(HostEntry.accessed).setting(kept), address)
    }

    /// `mmapLock` held.
    fileprivate func splitHugeLeaf(of head: UnsafeMutablePointer<PageFrame>, at address: UserAddress) {
        guard case .present(let word, let table) = middleEntry(address) else { return }
        let seen = HostEntry(word.load())
        guard seen.isLargeLeaf, !seen.isSpecial, seen.frame == memory.frame(of: head) else { return }
        splitHuge(address, word, table)
    }

    /// Waits until the page that is on its way has arrived. `mmapLock` held for read. Kernel: `migration_entry_wait`.
    func waitForMigration(_ word: AtomicWord, _ seen: HostEntry) {
        spinUntil(word.identity) { word.peek() != seen.bits }
    }
}

extension PhysicalMemory {
    /// What moves with a page's content: whose it is, and how it was used. Both frames are the caller's alone; the old one
    /// has no count any more.
    func takeOver(_ old: UnsafeMutablePointer<PageFrame>, _ new: UnsafeMutablePointer<PageFrame>) {
        copy(frame(of: old), to: frame(of: new))
        let kept =
            PageFlags.anonymous | PageFlags.active | PageFlags.referenced | PageFlags.lazilyFreed | PageFlags.anyDirty
            | PageFlags.anyAccessed
        let flags = old.pointee.flags.load(ordering: .relaxed) & kept
        new.pointee.flags.bitwiseOr(flags, ordering: .relaxed)
        new.pointee.word0 = old.pointee.word0
    }

    /// Makes single pages of a folio that nobody holds: each gets one reference, the caller's.
    func dissolve(_ head: UnsafeMutablePointer<PageFrame>, _ count: Int) {
        let place = head.pointee.word0
        let kept = PageFlags.anonymous | PageFlags.anyDirty | PageFlags.anyAccessed | PageFlags.lazilyFreed
        let common = head.pointee.flags.load(ordering: .relaxed) & kept
        for i in 0..<count {
            let page = head + i
            let own = page.pointee.flags.load(ordering: .relaxed) & (PageFlags.written | PageFlags.poisoned)
            page.pointee.flags.store(common | own, ordering: .relaxed)
            page.pointee.headDistance.store(0, ordering: .relaxed)
            page.pointee.order = 0
            page.pointee.word0 = place + UInt64(i)
            page.pointee.referenceCount.store(1, ordering: .releasing)
        }
    }

    /// Whether a block of 2^order frames is free.
    func hasFreeBlock(order: Int) -> Bool {
        zone.lock()
        defer { zone.unlock() }
        for larger in order...Self.largestOrder where freeHeads[larger] != 0 { return true }
        let size = 1 << order
        let first = (virgin + size - 1) & ~(size - 1)
        return first + size <= ceiling
    }

    /// Whether every frame is free, or holds a page that can be moved.
    func isMovable(_ first: HostFrame, count: Int) -> Bool {
        for i in 0..<count {
            let flags = page(first.advanced(by: i)).pointee.flags.load(ordering: .relaxed)
            if flags & (PageFlags.free | PageFlags.listed) == 0, !isPartOfFreeBlock(first.advanced(by: i)) {
                return false
            }
        }
        return true
    }

    /// Only the first frame of a free block says so, and memory that was never used says nothing.
    private func isPartOfFreeBlock(_ frame: HostFrame) -> Bool {
        if Int(frame.number) >= virgin { return Int(frame.number) < ceiling }
        for order in 0...Self.largestOrder {
            let first = HostFrame(frame.number & ~((1 << UInt64(order)) - 1))
            let head = page(first)
            if head.pointee.flags.load(ordering: .relaxed) & PageFlags.free != 0, Int(head.pointee.order) >= order {
                return true
            }
        }
        return false
    }
}
