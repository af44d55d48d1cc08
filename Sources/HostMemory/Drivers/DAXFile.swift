import Audit
import Frames
import Synchronization
import Synchrony

/// A file on persistent memory, mapped without a page cache: the device's own pages, which have page frames and counts.
/// Kernel: fsdax as of 6.18 (since 6.15 its pages are counted like any others, and its mappings have neither VM_MIXEDMAP nor
/// special entries: get-user-pages takes ordinary references). Linux counts from 0, which an idle page has; here the
/// device's own reference makes that 1, so that the buddy allocator never gets a page before the device goes.
///
/// A page that loses its place in the file (truncate, punch) must be idle first: unmapped everywhere and held by nobody, or
/// a DMA would go on writing to what is another file's block. Kernel: `dax_break_layout`.
///
/// In shared mappings the first write to each page is heard of, and makes it dirty; `writeBack` cleans the page and takes
/// the right to write from every entry again, so that the next write is heard of too.
public final class DAXFile: DriverMapping, @unchecked Sendable {
    // Unchecked: `count` and `dirty` are touched only under `layout`.
    /// Who waits for a page to become idle.
    public enum Waiting: Sendable {
        /// EBUSY instead. Kernel: the caller of `break_layout` that may not sleep.
        case never
        case untilIdle
    }

    public let host: Host
    private let device: DriverPages
    /// Faults hold it over the look at the file and the insertion; so do those who change the file. Kernel: the mapping's
    /// `invalidate_lock`.
    private let layout = SleepingLock(.buffer)
    /// Pages of the file; the device has as many as it began with.
    private var count: Int
    /// Kernel: `PAGECACHE_TAG_DIRTY`.
    private var dirty: [Bool]

    /// A file of zeros. Nil: no memory.
    public init?(_ host: Host, pages: Int) {
        guard pages > 0, let device = DriverPages(host, count: pages, areOfFile: true) else { return nil }
        self.host = host
        self.device = device
        count = pages
        dirty = Array(repeating: false, count: pages)
        super.init(name: "DAX file", flags: VMAFlags(), wantsWriteNotification: true)
        claim(device)
    }

    /// Its size.
    public var pages: Int {
        layout.lock()
        defer { layout.unlock() }
        return count
    }

    /// Frames that stay with the device until it goes.
    public var deviceFrames: [HostFrame] { device.frames }

    /// Pages that were written since the last `writeBack`, ascending.
    public var dirtyPages: [Int] {
        layout.lock()
        defer { layout.unlock() }
        return dirty.indices.filter { dirty[$0] }
    }

    // MARK: Faults

    /// Beyond the end: SIGBUS. A write in a shared mapping is heard of here, so its entry is born writable.
    /// Kernel: `dax_iomap_fault`.
    public override func fault(
        _ space: AddressSpace, _ vma: VMAInfo, _ address: UserAddress, write: Bool
    ) -> DriverFault {
        layout.lock()
        defer { layout.unlock() }
        let page = vma.backingPage(of: address)
        guard page < count else { return .busError }
        let dirties = write && vma.flags.shared
        if dirties { dirty[page] = true }
        return space.insertPage(device.frames[page], at: address, in: vma, makeWritable: dirties)
    }

    /// The entry is widened here, under `layout`: a `writeBack` between this answer and the core's own widening would clean
    /// a page that is then written unheard. Kernel: `dax_pfn_mkwrite`, `vmf_insert_page_mkwrite`.
    public override func makeWritable(_ space: AddressSpace, _ vma: VMAInfo, _ address: UserAddress) -> DriverFault {
        layout.lock()
        defer { layout.unlock() }
        let page = vma.backingPage(of: address)
        guard page < count else { return .busError }
        dirty[page] = true
        space.widen(address, device.frames[page])
        return .handled
    }

    // MARK: The file's calls

    /// Makes the file shorter, or longer again, up to the device's size; what comes anew is zeros. Errors: EINVAL, ENOSPC
    /// past the device; EBUSY. Kernel: `ftruncate`.
    public func truncate(toPages new: Int, _ waiting: Waiting = .untilIdle) throws(Errno) {
        guard new >= 0 else { throw .EINVAL }
        guard new <= device.frames.count else { throw .ENOSPC }
        try withIdle(new..<max(device.frames.count, new), waiting) {
            count = new
        }
    }

    /// Takes blocks out of the file; they read as zeros then. Errors: EBUSY; EINVAL for pages beyond the device.
    /// Kernel: `fallocate(FALLOC_FL_PUNCH_HOLE)`.
    public func punchHole(_ hole: Range<Int>, _ waiting: Waiting = .untilIdle) throws(Errno) {
        guard hole.lowerBound >= 0, hole.upperBound <= device.frames.count else { throw .EINVAL }
        try withIdle(hole, waiting) {}
    }

    /// Runs `change` while `pages` are mapped by nobody and held by nobody, and clears them. Kernel: `dax_break_layout`.
    private func withIdle(_ pages: Range<Int>, _ waiting: Waiting, _ change: () -> Void) throws(Errno) {
        while true {
            layout.lock()
            mappings.unmap(pages, keepAnonymous: false)
            guard let busy = firstBusy(pages) else { break }
            layout.unlock()
            if waiting == .never { throw .EBUSY }
            wait(for: busy)
        }
        change()
        for page in pages { discard(page) }
        layout.unlock()
    }

    private func firstBusy(_ pages: Range<Int>) -> HostFrame? {
        for page in pages where !isIdle(device.frames[page]) { return device.frames[page] }
        return nil
    }

    private func isIdle(_ frame: HostFrame) -> Bool {
        schedulingPoint(.pageUse, frame.physicalAddress)
        return host.memory.page(frame).pointee.referenceCount.load(ordering: .acquiring) == 1
    }

    /// Until nothing but entries holds the page: a fault may have mapped it again, since the lock is dropped, and the
    /// caller unmaps it anew. Kernel: `wait_page_idle`.
    private func wait(for frame: HostFrame) {
        mightSleep()
        let page = host.memory.page(frame)
        spinUntil(frame.physicalAddress) {
            let mapped = page.pointee.mapCount.load(ordering: .acquiring)
            return page.pointee.referenceCount.load(ordering: .acquiring) - mapped <= 1
        }
    }

    /// The block is no longer the file's: nobody may reach it, and what comes next are zeros. `layout` held.
    private func discard(_ page: Int) {
        let frame = device.frames[page]
        host.memory.noteGivenBack(frame, count: 1)
        host.memory.clear(frame, count: 1)
        dirty[page] = false
    }

    /// Flushes the processors' caches to the device: dirty pages become clean, and their entries read-only.
    /// Kernel: `dax_writeback_mapping_range`, as for fsync.
    public func writeBack() {
        layout.lock()
        for page in dirty.indices where dirty[page] {
            dirty[page] = false
            _ = mappings.clean(page..<(page + 1))
        }
        layout.unlock()
    }

    // MARK: Reads and writes of the file

    /// Reads 8 bytes at an aligned offset in a page. Error: ENXIO beyond the end. Kernel: `dax_iomap_rw`.
    public func read(page: Int, offset: Int) throws(Errno) -> UInt64 {
        layout.lock()
        defer { layout.unlock() }
        return try word(page, offset).loadData()
    }

    public func write(page: Int, offset: Int, _ value: UInt64) throws(Errno) {
        layout.lock()
        defer { layout.unlock() }
        let word = try word(page, offset)
        host.memory.willWrite(device.frames[page])
        word.storeData(value)
    }

    private func word(_ page: Int, _ offset: Int) throws(Errno) -> AtomicWord {
        precondition(offset >= 0 && offset < Int(pageSize) && offset & 7 == 0)
        guard (0..<count).contains(page) else { throw .ENXIO }
        return host.memory.word(at: device.frames[page].physicalAddress + UInt64(offset))
    }
}

extension AddressSpace {
    /// Makes the entry that maps `frame` at `address` writable and dirty; if it maps another now, or nothing, it stays.
    func widen(_ address: UserAddress, _ frame: HostFrame) {
        pageTableLock.lock()
        defer { pageTableLock.unlock() }
        guard let leaf = leaf(address), leaf.level == .page4K, leaf.entry.isPresent, leaf.entry.frame == frame else {
            return
        }
        setLeaf(leaf.word, leaf.entry.setting(Self.written), address)
    }
}
