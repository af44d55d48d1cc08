import Audit
import Frames
import Synchronization
import Synchrony

/// A file whose memory no page table of the host ever maps: its page cache, folio by folio. Kernel: the inode of a
/// guest_memfd, an `address_space` with `AS_INACCESSIBLE`. Spec: generic 2.15.
///
/// The file owns one reference on each of its pages. They are in no list of reclaim, so they are neither evicted nor
/// moved; only the owner's `removePages` and `evict` take them away.
///
/// Locks: a folio's lock (sleeping) covers making it, preparing it and taking it out. The kernel has one in each folio;
/// here a folio shares its lock with every eighth, and a task holds one at a time. `indexLock` covers the index.
open class InaccessibleFile: @unchecked Sendable {
    // Unchecked: `blocks` is touched only under `indexLock`. What is not `open` is `final`, as in `SecondaryMMU`.
    public final let host: Host
    /// The size in pages, fixed.
    public final let pageCount: UInt64
    private final let folioLocks: [SleepingLock]
    private final let indexLock = SpinLock(.objectIndex)
    /// Ascending by number; each has at least one page. Kernel: `i_pages`.
    private final var blocks: [Block] = []

    private struct Block {
        /// The index of its first page, in blocks.
        let number: UInt64
        /// Frame numbers, 0 for none.
        var frames: [UInt32]
        var used = 0

        static let pages: UInt64 = 512
        init(number: UInt64) {
            self.number = number
            frames = Array(repeating: 0, count: Int(Self.pages))
        }
    }

    /// The file stays known to its host until `evict`.
    public init(host: Host, pageCount: UInt64) {
        self.host = host
        self.pageCount = pageCount
        folioLocks = (0..<8).map { _ in SleepingLock(.objectPages) }
        host.enter(self)
    }

    /// The page at `index` has an uncorrectable error. It is marked already; whoever maps it must let it go. No lock
    /// held. Kernel: `error_remove_folio`.
    open func pageFailed(_ index: UInt64) {}

    // MARK: Folios

    /// The folio at `index`, made if it is absent, locked, with a reference for `holder`. May sleep. ENOMEM.
    /// Kernel: `__filemap_get_folio` with `FGP_LOCK | FGP_CREAT`.
    public final func lockFolio(_ index: UInt64, holder: Holder) throws(Errno) -> LockedFolio {
        precondition(index < pageCount, "a page beyond the end of the file")
        mightSleep()
        let memory = host.memory
        folioLock(index).lock()
        if let frame = frame(of: index) {
            let page = memory.page(frame)
            memory.get(page)
            return LockedFolio(self, index, page, holder)
        }
        guard let frame = memory.allocatePages(order: 0) else {
            folioLock(index).unlock()
            throw .ENOMEM
        }
        let page = memory.page(frame)
        page.pointee.flags.bitwiseOr(PageFlags.inaccessible, ordering: .relaxed)
        page.pointee.word0 = index
        memory.get(page)
        replace(index, by: frame)
        return LockedFolio(self, index, page, holder)
    }

    final func folioLock(_ index: UInt64) -> SleepingLock { folioLocks[Int(index & 7)] }

    /// The frame of a page that is there. For reports and checks.
    public final func frame(of index: UInt64) -> HostFrame? {
        indexLock.lock()
        defer { indexLock.unlock() }
        let place = place(of: index / Block.pages)
        guard place < blocks.count, blocks[place].number == index / Block.pages else { return nil }
        let number = blocks[place].frames[Int(index % Block.pages)]
        return number == 0 ? nil : HostFrame(UInt64(number))
    }

    /// Whether `frame` is a page of the file. For checks, at rest.
    public final func holds(_ frame: HostFrame) -> Bool {
        guard host.memory.hasPageFrame(frame) else { return false }
        let page = host.memory.page(frame)
        guard page.pointee.flags.load(ordering: .relaxed) & PageFlags.inaccessible != 0 else { return false }
        return self.frame(of: page.pointee.word0) == frame
    }

    /// Pages that are there.
    public final var presentPages: Int {
        indexLock.lock()
        defer { indexLock.unlock() }
        return blocks.reduce(0) { $0 + $1.used }
    }

    /// Takes the pages in `range` out of the file; each is freed with its last reference. Caller keeps new users away,
    /// or does not mind them. May sleep. Kernel: `truncate_inode_pages_range`.
    public final func removePages(_ range: Range<UInt64>) {
        for index in presentIndices(in: range) {
            folioLock(index).lock()
            if let frame = frame(of: index) {
                replace(index, by: nil)
                let page = host.memory.page(frame)
                page.pointee.flags.bitwiseAnd(~(PageFlags.inaccessible | PageFlags.prepared), ordering: .relaxed)
                host.memory.put(page)
            }
            folioLock(index).unlock()
        }
    }

    /// The inode dies: its pages go, the host forgets it. Nobody uses it any more. Kernel: `evict_inode`.
    public final func evict() {
        host.leave(self)
        removePages(0..<pageCount)
    }

    // MARK: The index. `indexLock` is taken inside.

    private final func presentIndices(in range: Range<UInt64>) -> [UInt64] {
        indexLock.lock()
        defer { indexLock.unlock() }
        var found: [UInt64] = []
        guard !range.isEmpty else { return found }
        var place = place(of: range.lowerBound / Block.pages)
        while place < blocks.count, blocks[place].number * Block.pages < range.upperBound {
            let first = blocks[place].number * Block.pages
            for i in 0..<Int(Block.pages) where blocks[place].frames[i] != 0 {
                if range.contains(first + UInt64(i)) { found.append(first + UInt64(i)) }
            }
            place += 1
        }
        return found
    }

    private final func replace(_ index: UInt64, by frame: HostFrame?) {
        indexLock.lock()
        defer { indexLock.unlock() }
        let number = index / Block.pages
        let place = place(of: number)
        if place == blocks.count || blocks[place].number != number { blocks.insert(Block(number: number), at: place) }
        let inside = Int(index % Block.pages)
        let old = blocks[place].frames[inside]
        blocks[place].frames[inside] = UInt32(frame?.number ?? 0)
        blocks[place].used += (frame == nil ? 0 : 1) - (old == 0 ? 0 : 1)
        if blocks[place].used == 0 { blocks.remove(at: place) }
    }

    /// Where the block `number` is, or belongs. `indexLock` held.
    private final func place(of number: UInt64) -> Int {
        var low = 0
        var high = blocks.count
        while low < high {
            let middle = (low + high) / 2
            if blocks[middle].number < number { low = middle + 1 } else { high = middle }
        }
        return low
    }
}

/// A folio of an `InaccessibleFile`, locked, with a reference: it ends in `unlock()`, which leaves the reference.
/// Kernel: a locked `struct folio`.
public struct LockedFolio: ~Copyable {
    private let file: InaccessibleFile
    private let index: UInt64
    private let page: UnsafeMutablePointer<PageFrame>
    private let reference: PageReference

    init(_ file: InaccessibleFile, _ index: UInt64, _ page: UnsafeMutablePointer<PageFrame>, _ holder: Holder) {
        self.file = file
        self.index = index
        self.page = page
        reference = PageReference(adopting: page, of: file.host.memory, holder: holder)
    }

    public var frame: HostFrame { file.host.memory.frame(of: page) }
    /// Kernel: `folio_test_hwpoison`.
    public var isPoisoned: Bool { file.host.memory.isPoisoned(page) }
    /// Whether its content is the guest's. Kernel: `folio_test_uptodate`, as guest_memfd uses it.
    public var isPrepared: Bool { page.pointee.flags.load(ordering: .relaxed) & PageFlags.prepared != 0 }
    /// Kernel: `folio_mark_uptodate`.
    public func markPrepared() {
        schedulingNote(.pageFlags, frame.physicalAddress)
        page.pointee.flags.bitwiseOr(PageFlags.prepared, ordering: .releasing)
    }
    /// Makes its bytes zero. Kernel: `clear_highpage`.
    public func clear() {
        file.host.memory.clear(frame, count: 1)
        file.host.memory.willWrite(frame)
    }
    /// Its bytes, for who fills it before the guest sees it.
    public var bytes: UnsafeMutableRawPointer {
        file.host.memory.willWrite(frame)
        return file.host.memory.bytes(of: frame)
    }

    /// Kernel: `folio_unlock`.
    public consuming func unlock() -> PageReference {
        file.folioLock(index).unlock()
        return reference
    }
}

extension Host {
    func enter(_ file: InaccessibleFile) {
        registry.lock()
        inaccessibleFiles.append(file)
        registry.unlock()
    }

    func leave(_ file: InaccessibleFile) {
        registry.lock()
        inaccessibleFiles.removeAll { $0 === file }
        registry.unlock()
    }

    /// Tells the file that owns the page, if it still does. No lock held. Kernel: `memory_failure` by way of
    /// `folio->mapping`.
    func tellFile(of page: UnsafeMutablePointer<PageFrame>) {
        let index = page.pointee.word0
        registry.lock()
        let files = inaccessibleFiles
        registry.unlock()
        let frame = memory.frame(of: page)
        for file in files where index < file.pageCount && file.frame(of: index) == frame { file.pageFailed(index) }
    }
}
