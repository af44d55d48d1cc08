import Audit
import Frames
import Synchronization
import Synchrony

/// Everybody who maps one object or one driver's memory. Kernel: `address_space.i_mmap` and `i_mmap_rwsem`.
final class MappingList: @unchecked Sendable {
    // Unchecked: `areas` is touched only under `lock`.
    let lock = SleepingLock(.mapping)
    private var areas: [VMA] = []

    func add(_ vma: VMA) {
        lock.lock()
        addLocked(vma)
        lock.unlock()
    }

    func addLocked(_ vma: VMA) { areas.append(vma) }

    func remove(_ vma: VMA) {
        lock.lock()
        areas.removeAll { $0 === vma }
        lock.unlock()
    }

    func removeLocked(_ vma: VMA) { areas.removeAll { $0 === vma } }

    var isEmpty: Bool {
        lock.lock()
        defer { lock.unlock() }
        return areas.isEmpty
    }

    /// Removes every entry for `pages`, in every address space, each between its notifier's start and end. The list's
    /// lock keeps the address spaces alive. Kernel: `unmap_mapping_range`.
    func unmap(_ pages: Range<Int>, keepAnonymous: Bool) {
        forEach(pages) { space, range in space.zapNotified(range, keepAnonymous: keepAnonymous) }
    }

    /// Calls `body` with each stretch of an address space that shows `pages`, the list's lock held.
    /// Kernel: `vma_interval_tree_foreach`.
    func forEach(_ pages: Range<Int>, _ body: (AddressSpace, Range<UserAddress>) -> Void) {
        lock.lock()
        defer { lock.unlock() }
        for vma in areas {
            let count = Int(vma.range.upperBound.page - vma.range.lowerBound.page)
            let shown = pages.clamped(to: vma.firstPage..<(vma.firstPage + count))
            guard !shown.isEmpty else { continue }
            let low = vma.range.lowerBound + UInt64(shown.lowerBound - vma.firstPage) * pageSize
            body(vma.space.takeUnretainedValue(), low..<(low + UInt64(shown.count) * pageSize))
        }
    }

    func unmapAll() { unmap(0..<Int.max, keepAnonymous: false) }

    /// The first of `frames` that a special entry maps anywhere.
    func firstMapped(of frames: Range<HostFrame>) -> HostFrame? {
        var found: HostFrame?
        forEach(0..<Int.max) { space, range in
            if found == nil { found = space.firstSpecial(of: frames, in: range) }
        }
        return found
    }
}

/// Memory with a name: pages that any number of processes may map. Kernel: a memfd's inode and its page cache.
///
/// The object owns one reference on each of its pages; each entry that maps one owns another.
public final class MemoryObject: @unchecked Sendable {
    // Unchecked: `frames` is touched only under `indexLock`.
    public let host: Host
    /// An absent page must be read from a slow device first: a fault on it has to wait.
    public let slow: Bool
    let mappings = MappingList()
    /// What nobody may do to it any more: see `seal`.
    let seals = Atomic<UInt32>(0)
    /// One task at a time makes pages or takes them away.
    private let pagesLock = SleepingLock(.objectPages)
    private let indexLock = SpinLock(.objectIndex)
    /// Frame numbers; 0 where no page is.
    private var frames: [UInt64]
    /// Bytes; the last page may be used in part. Kernel: `i_size`.
    private var size: Int

    public init(host: Host, pages: Int, slow: Bool = false) {
        self.host = host
        self.slow = slow
        frames = Array(repeating: 0, count: pages)
        size = pages * Int(pageSize)
    }

    deinit {
        for frame in frames where frame != 0 { host.memory.put(host.memory.page(HostFrame(frame))) }
    }

    /// The size in bytes. Kernel: `i_size_read`.
    public var sizeInBytes: Int {
        indexLock.lock()
        defer { indexLock.unlock() }
        return size
    }

    /// The size, in pages, the last one perhaps in part.
    public var pages: Int {
        indexLock.lock()
        defer { indexLock.unlock() }
        return frames.count
    }

    /// The frame of a page that is there. For reports.
    public func frame(of page: Int) -> HostFrame? {
        indexLock.lock()
        defer { indexLock.unlock() }
        guard frames.indices.contains(page), frames[page] != 0 else { return nil }
        return HostFrame(frames[page])
    }

    enum Taken {
        /// With a reference for the caller.
        case page(UnsafeMutablePointer<PageFrame>)
        case mustWait, beyondEnd, outOfMemory, poisoned
    }

    /// The page at `index`, made if it is absent and needs no waiting. Kernel: `shmem_get_folio`.
    func take(_ index: Int) -> Taken {
        pagesLock.lock()
        defer { pagesLock.unlock() }
        if let found = takePresent(index) { return found }
        return slow ? .mustWait : makeLocked(index)
    }

    /// The page at `index`, with a reference, if it is there and sound. Any spinning lock but the index's may be held.
    func takeIfPresent(_ index: Int) -> UnsafeMutablePointer<PageFrame>? {
        if case .page(let page) = takePresent(index) { page } else { nil }
    }

    /// Nil: within the object, but absent.
    private func takePresent(_ index: Int) -> Taken? {
        indexLock.lock()
        defer { indexLock.unlock() }
        guard frames.indices.contains(index) else { return .beyondEnd }
        guard frames[index] != 0 else { return nil }
        let page = host.memory.page(HostFrame(frames[index]))
        if host.memory.isPoisoned(page) { return .poisoned }
        host.memory.get(page)
        return .page(page)
    }

    private func makeLocked(_ index: Int) -> Taken {
        let memory = host.memory
        guard let frame = memory.allocatePages(order: 0) else { return .outOfMemory }
        memory.clear(frame, count: 1)
        let page = memory.page(frame)
        memory.get(page)
        indexLock.lock()
        frames[index] = frame.number
        indexLock.unlock()
        return .page(page)
    }

    /// Whether `page` is still the object's at `index`. Asked under the page-table lock just before an entry is made:
    /// who takes the page away changes the index first and looks for entries afterwards. Kernel: `folio->mapping`.
    func holds(_ page: UnsafeMutablePointer<PageFrame>, at index: Int) -> Bool {
        indexLock.lock()
        defer { indexLock.unlock() }
        return frames.indices.contains(index) && frames[index] == host.memory.frame(of: page).number
    }

    /// Waits until the page is read in. No lock held. Without memory it stays absent: the next fault waits again.
    func waitForPage(_ index: Int) {
        if case .page(let page) = readIn(index) { host.memory.put(page) }
    }

    private func readIn(_ index: Int) -> Taken {
        pagesLock.lock()
        defer { pagesLock.unlock() }
        return takePresent(index) ?? makeLocked(index)
    }

    // MARK: Calls

    /// Changes the size. Pages beyond the end lose their entries everywhere, private copies too, and then go.
    /// Kernel: `ftruncate`.
    public func truncate(to count: Int) { truncate(toBytes: count * Int(pageSize)) }

    /// The same to any number of bytes. Of the page that the end then lies in, what is beyond becomes zero: it can be read
    /// and written through a mapping, and shows when the object grows again.
    public func truncate(toBytes bytes: Int) {
        precondition(bytes >= 0)
        let count = (bytes + Int(pageSize) - 1) / Int(pageSize)
        let old = pages
        guard bytes < sizeInBytes else { return resize(count, bytes) }
        let gone = detach(count..<max(old, count), resizeTo: bytes)
        mappings.unmap(count..<max(old, count), keepAnonymous: false)
        clearTail(of: bytes)
        release(gone)
    }

    /// Makes zero what lies between byte `end` and the end of its page, if the page is there.
    private func clearTail(of end: Int) {
        let inside = end % Int(pageSize)
        guard inside != 0, let page = takeIfPresent(end / Int(pageSize)) else { return }
        let frame = host.memory.frame(of: page)
        host.memory.willWrite(frame)
        let bytes = host.memory.bytes(of: frame)
        (bytes + inside).initializeMemory(as: UInt8.self, repeating: 0, count: Int(pageSize) - inside)
        host.memory.put(page)
    }

    /// Takes pages away; the next access finds new ones of zeros. Private copies stay.
    /// Kernel: `fallocate(FALLOC_FL_PUNCH_HOLE)`.
    public func punchHole(_ range: Range<Int>) {
        let hole = range.clamped(to: 0..<pages)
        let gone = detach(hole, resizeTo: nil)
        mappings.unmap(hole, keepAnonymous: true)
        release(gone)
    }

    private func resize(_ count: Int, _ bytes: Int) {
        indexLock.lock()
        while frames.count < count { frames.append(0) }
        size = max(size, bytes)
        indexLock.unlock()
    }

    private func detach(_ range: Range<Int>, resizeTo bytes: Int?) -> [HostFrame] {
        var gone: [HostFrame] = []
        pagesLock.lock()
        indexLock.lock()
        for index in range.clamped(to: 0..<frames.count) where frames[index] != 0 {
            gone.append(HostFrame(frames[index]))
            frames[index] = 0
        }
        if let bytes {
            size = bytes
            let count = (bytes + Int(pageSize) - 1) / Int(pageSize)
            if count < frames.count { frames.removeSubrange(count...) }
        }
        indexLock.unlock()
        pagesLock.unlock()
        return gone
    }

    private func release(_ gone: [HostFrame]) {
        for frame in gone { host.memory.put(host.memory.page(frame)) }
    }

    /// Reads 8 bytes at an aligned offset in a page. Errors: ENXIO beyond the end, ENOMEM, EHWPOISON. Kernel: `pread`.
    /// A page that was never written is zero and stays absent.
    public func read(page: Int, offset: Int) throws(Errno) -> UInt64 {
        if !slow, (0..<pages).contains(page), frame(of: page) == nil { return 0 }
        let (found, word) = try word(page, offset)
        let value = word.loadData()
        host.memory.put(found)
        return value
    }

    /// Writes 8 bytes at an aligned offset in a page. Errors as `read`. Kernel: `pwrite`.
    public func write(page: Int, offset: Int, _ value: UInt64) throws(Errno) {
        let (found, word) = try word(page, offset)
        host.memory.willWrite(host.memory.frame(of: found))
        word.storeData(value)
        host.memory.put(found)
    }

    private func word(_ index: Int, _ offset: Int) throws(Errno) -> (UnsafeMutablePointer<PageFrame>, AtomicWord) {
        precondition(offset >= 0 && offset < Int(pageSize) && offset & 7 == 0)
        switch readIn(index) {
        case .page(let page):
            let address = host.memory.frame(of: page).physicalAddress + UInt64(offset)
            return (page, host.memory.word(at: address))
        case .beyondEnd: throw .ENXIO
        case .outOfMemory, .mustWait: throw .ENOMEM
        case .poisoned: throw .EHWPOISON
        }
    }
}
