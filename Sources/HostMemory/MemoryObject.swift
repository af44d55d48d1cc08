import Audit
import Frames
import Synchronization
import Synchrony

/// Memory with a name: pages that any number of processes may map. Kernel: an inode and its page cache; a memfd's, or,
/// with a disk behind it, a file's.
///
/// The object owns one reference on each of its pages; each entry that maps one owns another. A page that is not in memory
/// is nothing yet (zeros), on the swap device, or on the file's disk.
public final class MemoryObject: @unchecked Sendable {
    // Unchecked: `frames`, `size` and `failedWrites` are touched only under `indexLock`.
    public let host: Host
    /// An absent page must be read from a slow device first: a fault on it has to wait.
    public let slow: Bool
    let mappings = MappingList()
    /// What nobody may do to it any more: see `seal`.
    let seals = Atomic<UInt32>(0)
    /// One task at a time makes pages or takes them away.
    let pagesLock = SleepingLock(.objectPages)
    let indexLock = SpinLock(.objectIndex)
    /// Where the bytes of a file are that are not in memory. Nil: a memfd.
    public let disk: Disk?
    /// Nobody but the processes that map it may reach it: get-user-pages refuses it, and it is never reclaimed.
    /// Kernel: `memfd_secret`.
    public let isSecret: Bool
    /// For each page a frame number, a slot of the swap device, or nothing.
    var frames: [ObjectPage]
    /// Bytes; the last page may be used in part. Kernel: `i_size`.
    private var size: Int
    /// A page could not be written out since somebody last asked. Kernel: `AS_EIO`.
    var failedWrites = false
    /// Tasks of the host that came here from one of its pages.
    let workers = Atomic<Int>(0)
    let workersIdentity = ObjectIdentity()
    /// No task may come any more. Under the lock of the host's lists.
    var isDying = false

    /// A memfd. - Parameter slow: an absent page must be waited for.
    public init(host: Host, pages: Int, slow: Bool = false, secret: Bool = false) {
        self.host = host
        self.slow = slow
        isSecret = secret
        disk = nil
        frames = Array(repeating: .absent, count: pages)
        size = pages * Int(pageSize)
    }

    /// A file: what is not in memory is read from `disk`, what is written comes there by `writeBack`.
    public init(host: Host, file disk: Disk, bytes: Int) {
        self.host = host
        slow = disk.slow
        isSecret = false
        self.disk = disk
        frames = Array(repeating: .absent, count: (bytes + Int(pageSize) - 1) / Int(pageSize))
        size = bytes
    }

    deinit {
        host.memory.lists?.close(self)
        discard(frames)
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
        return frames.indices.contains(page) ? frames[page].frame : nil
    }

    enum Taken {
        /// With a reference for the caller.
        case page(UnsafeMutablePointer<PageFrame>)
        case mustWait, beyondEnd, outOfMemory, poisoned
        /// The disk or the swap device gave an error.
        case unreadable
    }

    /// The page at `index`, made if it is absent and needs no waiting. Kernel: `shmem_get_folio`, `filemap_fault`.
    func take(_ index: Int) -> Taken {
        pagesLock.lock()
        defer { pagesLock.unlock() }
        switch takePresent(index) {
        case .taken(let found): return found
        case .absent: return slow ? .mustWait : make(index, from: .absent)
        case .swapped(let slot): return host.swap?.slow ?? false ? .mustWait : make(index, from: .swapped(slot))
        }
    }

    /// The page at `index`, with a reference, if it is there and sound. Any spinning lock but the index's may be held.
    func takeIfPresent(_ index: Int) -> UnsafeMutablePointer<PageFrame>? {
        if case .taken(.page(let page)) = takePresent(index) { page } else { nil }
    }

    private enum Present {
        case taken(Taken)
        case absent
        case swapped(Int)
    }

    private func takePresent(_ index: Int) -> Present {
        indexLock.lock()
        defer { indexLock.unlock() }
        guard frames.indices.contains(index) else { return .taken(.beyondEnd) }
        if let slot = frames[index].slot { return .swapped(slot) }
        guard let frame = frames[index].frame else { return .absent }
        let page = host.memory.page(frame)
        if host.memory.isPoisoned(page) { return .taken(.poisoned) }
        host.memory.get(page)
        return .taken(.page(page))
    }

    /// A new page with what stands in the place of the absent one. `pagesLock` held.
    private func make(_ index: Int, from source: ObjectPage) -> Taken {
        let memory = host.memory
        guard let frame = memory.allocatePages(order: 0) else { return .outOfMemory }
        let page = memory.page(frame)
        guard fill(frame, index, from: source) else {
            memory.put(page)
            return .unreadable
        }
        memory.get(page)
        memory.lists?.own(page, self, index)
        replace(index, by: .frame(frame))
        if let slot = source.slot {
            // What was only on the swap device must go there again before the page may be dropped.
            memory.mark(page, PageFlags.dirty(.driver))
            host.swap?.release(slot, memory)
        }
        if isSecret {
            page.pointee.flags.bitwiseOr(PageFlags.secret, ordering: .relaxed)
        } else {
            memory.lists?.add(page)
        }
        return .page(page)
    }

    private func fill(_ frame: HostFrame, _ index: Int, from source: ObjectPage) -> Bool {
        if let slot = source.slot { return host.swap?.read(slot, into: frame, host.memory) ?? false }
        if let disk { return disk.read(index, into: frame, host.memory) }
        host.memory.clear(frame, count: 1)
        return true
    }

    func replace(_ index: Int, by page: ObjectPage) {
        indexLock.lock()
        frames[index] = page
        indexLock.unlock()
    }

    /// Whether `page` is still the object's at `index`. Asked under the page-table lock just before an entry is made:
    /// who takes the page away changes the index first and looks for entries afterwards. Kernel: `folio->mapping`.
    func holds(_ page: UnsafeMutablePointer<PageFrame>, at index: Int) -> Bool {
        indexLock.lock()
        defer { indexLock.unlock() }
        return frames.indices.contains(index) && frames[index].frame == host.memory.frame(of: page)
    }

    /// Waits until the page is read in. No lock held. Without memory it stays absent: the next fault waits again.
    /// False: it can't be read.
    @discardableResult func waitForPage(_ index: Int) -> Bool {
        switch readIn(index) {
        case .page(let page): host.memory.put(page)
        case .unreadable: return false
        case .mustWait, .beyondEnd, .outOfMemory, .poisoned: break
        }
        return true
    }

    private func readIn(_ index: Int) -> Taken {
        pagesLock.lock()
        defer { pagesLock.unlock() }
        switch takePresent(index) {
        case .taken(let found): return found
        case .absent: return make(index, from: .absent)
        case .swapped(let slot): return make(index, from: .swapped(slot))
        }
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
        let isSame = bytes == sizeInBytes && disk != nil
        guard bytes < sizeInBytes || isSame else { return resize(count, bytes) }
        // A file's areas hear of all beyond the end, a memfd's only if a page is. Before the pages go, and again for what was
        // copied meanwhile. Kernel: `truncate_pagecache`, `shmem_setattr`; recorded on 6.18.
        func unmapBeyond() {
            if disk != nil || old > count { mappings.unmap(count..<Int.max, keepAnonymous: false) }
        }
        let gone = detach(count..<max(old, count), resizeTo: bytes)
        unmapBeyond()
        clearTail(of: bytes)
        discard(gone)
        unmapBeyond()
    }

    /// Makes zero what lies between byte `end` and the end of its page, for which a page that is elsewhere is brought into
    /// memory. Kernel: `shmem_get_partial_folio`.
    private func clearTail(of end: Int) {
        let inside = end % Int(pageSize)
        let index = end / Int(pageSize)
        guard inside != 0, disk != nil || !isHole(index), case .page(let page) = readIn(index) else { return }
        let frame = host.memory.frame(of: page)
        host.memory.willWrite(frame)
        let bytes = host.memory.bytes(of: frame)
        (bytes + inside).initializeMemory(as: UInt8.self, repeating: 0, count: Int(pageSize) - inside)
        host.memory.mark(page, PageFlags.dirty(.driver))
        host.memory.put(page)
    }

    /// Takes pages away; the next access finds new ones of zeros. Private copies stay.
    /// Kernel: `fallocate(FALLOC_FL_PUNCH_HOLE)`.
    public func punchHole(_ range: Range<Int>) {
        let hole = range.clamped(to: 0..<pages)
        let gone = detach(hole, resizeTo: nil)
        // Of a memfd whoever maps what lies beyond the end hears of it too. Recorded on 6.18.
        mappings.unmap(disk == nil ? range : hole, keepAnonymous: true)
        discard(gone)
    }

    private func resize(_ count: Int, _ bytes: Int) {
        indexLock.lock()
        while frames.count < count { frames.append(.absent) }
        size = max(size, bytes)
        indexLock.unlock()
    }

    private func detach(_ range: Range<Int>, resizeTo bytes: Int?) -> [ObjectPage] {
        var gone: [ObjectPage] = []
        pagesLock.lock()
        disk?.clear(range)
        indexLock.lock()
        for index in range.clamped(to: 0..<frames.count) where frames[index] != .absent {
            gone.append(frames[index])
            frames[index] = .absent
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

    func isHole(_ page: Int) -> Bool {
        indexLock.lock()
        defer { indexLock.unlock() }
        return frames.indices.contains(page) && frames[page] == .absent
    }

    /// Reads 8 bytes at an aligned offset in a page. Errors: ENXIO beyond the end, ENOMEM, EHWPOISON,
    /// EIO. Kernel: `pread`.
    /// A page that was never written is zero and stays absent.
    public func read(page: Int, offset: Int) throws(Errno) -> UInt64 {
        if !slow, disk == nil, isHole(page) { return 0 }
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
        // After the store: who writes the page out and cleans it meanwhile does so again.
        host.memory.mark(found, PageFlags.dirty(.driver))
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
        case .unreadable: throw .EIO
        }
    }
}
