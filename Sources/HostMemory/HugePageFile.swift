import Audit
import Frames
import Synchronization
import Synchrony

/// Memory with a name made of huge pages of a pool. Kernel: an inode of hugetlbfs, `memfd_create(MFD_HUGETLB)`; also what
/// is behind `MAP_HUGETLB` without a file.
///
/// A shared mapping shows the file's pages; a private one copies them on a write, and has pages of its own where the file
/// has none. The entries are leaves of the pool's size and are never split.
public final class HugePageFile: @unchecked Sendable {
    // Unchecked: `frames` and `promised` are touched only under `lock`.
    public let pool: HugePagePool
    /// Huge pages.
    public let pages: Int
    let mappings = MappingList()
    private let lock = SleepingLock(.objectPages)
    private var frames: [HostFrame?]
    /// Whether the pool has promised each page that is not there.
    private var promised: [Bool]

    public init(_ pool: HugePagePool, pages: Int) {
        self.pool = pool
        self.pages = pages
        frames = Array(repeating: nil, count: pages)
        promised = Array(repeating: false, count: pages)
    }

    deinit {
        let memory = pool.host.memory
        for case let frame? in frames { memory.put(memory.page(frame)) }
        pool.unreserve(promised.count { $0 })
    }

    var level: PageLevel { pool.level }

    /// A shared mapping of `range` begins: the pool promises what is not there. Error: ENOMEM. Kernel:
    /// `hugetlb_reserve_pages`.
    func reserve(_ range: Range<Int>) throws(Errno) {
        lock.lock()
        defer { lock.unlock() }
        let missing = range.clamped(to: 0..<pages).filter { frames[$0] == nil && !promised[$0] }
        guard pool.reserve(missing.count) else { throw .ENOMEM }
        for index in missing { promised[index] = true }
    }

    enum Taken {
        /// With a reference for the caller.
        case page(UnsafeMutablePointer<PageFrame>)
        case absent
        case beyondEnd, noPage, poisoned
    }

    /// The file's page. - Parameter makes: also if it is not there yet.
    func take(_ index: Int, makes: Bool) -> Taken {
        lock.lock()
        defer { lock.unlock() }
        let memory = pool.host.memory
        guard frames.indices.contains(index) else { return .beyondEnd }
        if let frame = frames[index] {
            let page = memory.page(frame)
            if memory.isPoisoned(page) { return .poisoned }
            memory.get(page)
            return .page(page)
        }
        guard makes else { return .absent }
        guard let page = pool.take(promised: promised[index]) else { return .noPage }
        promised[index] = false
        frames[index] = memory.frame(of: page)
        memory.get(page)
        return .page(page)
    }

    /// The last name of the file goes: all its pages, and what was promised to it. Kernel: `hugetlbfs_evict_inode`.
    public func free() {
        punchHole(0..<pages)
        lock.lock()
        pool.unreserve(promised.count { $0 })
        for index in promised.indices { promised[index] = false }
        lock.unlock()
    }

    /// Takes pages away from everybody. Kernel: `fallocate(FALLOC_FL_PUNCH_HOLE)` on hugetlbfs, `ftruncate`.
    public func punchHole(_ range: Range<Int>) {
        let hole = range.clamped(to: 0..<pages)
        lock.lock()
        let gone = hole.compactMap { frames[$0] }
        for index in hole { frames[index] = nil }
        lock.unlock()
        let small = Int(level.frames)
        mappings.unmap(hole.lowerBound * small..<hole.upperBound * small, keepAnonymous: true)
        let memory = pool.host.memory
        for frame in gone { memory.put(memory.page(frame)) }
    }
}

extension HugePageFile {
    /// The same for any stretch of it, in pages of 4 KiB: a huge page that is not in it as a whole stays, and that part is
    /// cleared. Kernel: `hugetlbfs_punch_hole`, `hugetlbfs_zero_partial_page`.
    public func punchHole(smallPages hole: Range<Int>) {
        let size = Int(level.frames)
        let whole =
            (hole.lowerBound + size - 1) / size..<max((hole.lowerBound + size - 1) / size, hole.upperBound / size)
        if !whole.isEmpty { punchHole(whole) }
        var low = hole.lowerBound
        while low < hole.upperBound {
            let high = min((low / size + 1) * size, hole.upperBound)
            if !whole.contains(low / size) { clear(low % size..<low % size + (high - low), ofPage: low / size) }
            low = high
        }
    }

    private func clear(_ part: Range<Int>, ofPage index: Int) {
        guard case .page(let page) = take(index, makes: false) else { return }
        let memory = pool.host.memory
        memory.clear(memory.frame(of: page).advanced(by: part.lowerBound), count: part.count)
        memory.put(page)
    }
}

// MARK: Faults

extension AddressSpace {
    /// Kernel: `hugetlb_fault`.
    func hugeFileFault(
        _ vma: VMA, _ file: HugePageFile, _ address: UserAddress, _ access: FaultAccess
    ) -> FaultOutcome {
        let low = address.aligned(to: file.level)
        guard let word = makeHugeEntry(low, file.level) else { return .failed(.outOfMemory) }
        let seen = HostEntry(word.load())
        if seen.bits == 0 { return fill(vma, file, low, word, access) }
        if seen.isPoison { return .failed(.poisoned) }
        if seen.isProtectNone {
            restoreHinted(vma, low, word, seen, file.level)
            return .done
        }
        guard access != .read, !seen.isWritable else { return .done }
        return breakSharing(vma, file, low, word, seen, access)
    }

    /// The entry of `level` for an address, its tables made. Nil: no memory. Kernel: `huge_pte_alloc`.
    func makeHugeEntry(_ address: UserAddress, _ level: PageLevel) -> AtomicWord? {
        level == .page1G ? makeUpperEntry(address) : makeMiddleEntry(address)?.word
    }

    /// Kernel: `hugetlb_no_page`.
    private func fill(
        _ vma: VMA, _ file: HugePageFile, _ low: UserAddress, _ word: AtomicWord, _ access: FaultAccess
    ) -> FaultOutcome {
        let index = vma.backingPage(of: low) / Int(file.level.frames)
        switch file.take(index, makes: vma.flags.shared) {
        case .page(let page):
            if vma.flags.shared || access == .read { return place(vma, page, low, word, file.level) }
            defer { memory.put(page) }
            return fillOwn(vma, file, low, word, from: page)
        case .absent: return fillOwn(vma, file, low, word, from: nil)
        case .beyondEnd, .noPage: return .failed(.bus)
        case .poisoned: return .failed(.poisoned)
        }
    }

    private func place(
        _ vma: VMA, _ page: UnsafeMutablePointer<PageFrame>, _ low: UserAddress, _ word: AtomicWord, _ level: PageLevel
    ) -> FaultOutcome {
        let entry = HostEntry.leaf(memory.frame(of: page), vma.flags, writable: vma.flags.shared && vma.flags.write)
        pageTableLock.lock()
        let won = word.load() == 0
        if won {
            page.pointee.mapCount.add(1, ordering: .relaxed)
            setLeaf(word, entry.setting(HostEntry.large), low, level)
        }
        pageTableLock.unlock()
        if !won { memory.put(page) }
        return .done
    }

    /// A page of the mapping's own, of zeros or with the bytes of `source`.
    private func fillOwn(
        _ vma: VMA, _ file: HugePageFile, _ low: UserAddress, _ word: AtomicWord,
        from source: UnsafeMutablePointer<PageFrame>?
    ) -> FaultOutcome {
        prepareAnonymous(vma)
        guard let page = newOwnPage(vma, file, from: source) else { return .failed(.bus) }
        let entry = HostEntry.leaf(memory.frame(of: page), vma.flags, writable: vma.flags.write)
        pageTableLock.lock()
        let won = word.load() == 0
        if won { setLeaf(word, entry.setting(HostEntry.large | HostEntry.dirty), low, file.level) }
        pageTableLock.unlock()
        if !won { memory.put(page) }
        return .done
    }

    /// Exclusive, counted as mapped once. What the mapping reserved is used first.
    private func newOwnPage(
        _ vma: VMA, _ file: HugePageFile, from source: UnsafeMutablePointer<PageFrame>?
    ) -> UnsafeMutablePointer<PageFrame>? {
        let isPromised = vma.takePromise()
        guard let page = file.pool.take(promised: isPromised) else { return nil }
        page.pointee.flags.bitwiseOr(PageFlags.anonymous | PageFlags.anonymousExclusive, ordering: .relaxed)
        page.pointee.mapCount.store(1, ordering: .relaxed)
        if let source { copyHuge(source, to: page, file.level) }
        return page
    }

    private func copyHuge(
        _ source: UnsafeMutablePointer<PageFrame>, to page: UnsafeMutablePointer<PageFrame>, _ level: PageLevel
    ) {
        for i in 0..<Int(level.frames) {
            memory.copy(memory.frame(of: source).advanced(by: i), to: memory.frame(of: page).advanced(by: i))
        }
    }

    /// Kernel: `hugetlb_wp`.
    private func breakSharing(
        _ vma: VMA, _ file: HugePageFile, _ low: UserAddress, _ word: AtomicWord, _ seen: HostEntry,
        _ access: FaultAccess
    ) -> FaultOutcome {
        let page = memory.page(seen.frame)
        pageTableLock.lock()
        guard word.load() == seen.bits else {
            pageTableLock.unlock()
            return .done
        }
        let isOwn =
            memory.isExclusivelyAnonymous(page)
            || (memory.isAnonymous(page) && page.pointee.referenceCount.load(ordering: .acquiring) == 1)
        if vma.flags.shared || isOwn {
            if isOwn { page.pointee.flags.bitwiseOr(PageFlags.anonymousExclusive, ordering: .relaxed) }
            if access == .write { setLeaf(word, seen.setting(Self.written), low, file.level) }
            pageTableLock.unlock()
            return .done
        }
        // Stays while it is copied, though nobody holds the lock.
        memory.get(page)
        pageTableLock.unlock()
        return copyShared(vma, file, low, word, seen, page, access)
    }

    private func copyShared(
        _ vma: VMA, _ file: HugePageFile, _ low: UserAddress, _ word: AtomicWord, _ seen: HostEntry,
        _ old: UnsafeMutablePointer<PageFrame>, _ access: FaultAccess
    ) -> FaultOutcome {
        prepareAnonymous(vma)
        guard let new = newOwnPage(vma, file, from: old) else {
            memory.put(old)
            return .failed(.bus)
        }
        let range = low..<(low + file.level.bytes)
        var entry = HostEntry.leaf(memory.frame(of: new), vma.flags, writable: false).setting(HostEntry.large)
        if access == .write { entry = entry.setting(Self.written) }
        notifyStart(range)
        pageTableLock.lock()
        let won = word.load() == seen.bits
        if won {
            clearForCopy(word, seen, entry, low)
            setLeaf(word, entry, low, file.level)
            old.pointee.mapCount.subtract(1, ordering: .relaxed)
        }
        pageTableLock.unlock()
        notifyEnd(range)
        if won { memory.put(old) } else { memory.put(new) }
        memory.put(old)
        return .done
    }
}
