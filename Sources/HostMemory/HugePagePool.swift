import Frames
import Synchronization
import Synchrony

/// Huge pages that are set aside for whoever asks for them by name: 2 MiB or 1 GiB each, never split, never reclaimed.
/// Kernel: `struct hstate`, the pages of hugetlbfs.
///
/// They are taken from memory when the pool is made and stay with it. A mapping reserves what it may need, so that its
/// faults find a page; what is beyond that (copies after fork) may not, and then the fault is a SIGBUS.
public final class HugePagePool: @unchecked Sendable {
    // Unchecked: `free` and `reserved` are touched only under `lock`.
    public let host: Host
    public let level: PageLevel
    /// Pages that the pool has, in use or not.
    public let pages: Int
    private let lock = SpinLock(.objectIndex)
    private let heads: [HostFrame]
    private var free: [HostFrame] = []
    private var reserved = 0

    /// Nil: memory has not so many blocks of that size, or 1 GiB pages are wanted after the host began to use that memory.
    /// Kernel: `hugepages=` on the command line, `nr_hugepages`.
    public init?(_ host: Host, level: PageLevel, pages: Int) {
        precondition(level == .page2M || level == .page1G)
        self.host = host
        self.level = level
        self.pages = pages
        let memory = host.memory
        for _ in 0..<pages {
            let block = level == .page1G ? memory.takeGigantic() : memory.allocatePages(order: 9)
            guard let block else {
                for frame in free where level == .page2M {
                    memory.page(frame).pointee.referenceCount.store(1, ordering: .relaxed)
                    memory.put(memory.page(frame))
                }
                return nil
            }
            memory.page(block).pointee.referenceCount.store(0, ordering: .relaxed)
            free.append(block)
        }
        heads = free
        for frame in free { memory.page(frame).pointee.flags.bitwiseOr(PageFlags.hugeTLB, ordering: .relaxed) }
        memory.hugePools.append(self)
    }

    /// Pages that nobody uses; of them those that are promised. Kernel: `HugePages_Free`, `HugePages_Rsvd`.
    public var idle: (free: Int, reserved: Int) {
        lock.lock()
        defer { lock.unlock() }
        return (free.count, reserved)
    }

    /// Pages that are broken, and never come back.
    public var broken: Int { heads.count { host.memory.isPoisoned(host.memory.page($0)) } }

    /// Whether every page is back that can come back, and none is promised.
    public var isWhole: Bool { idle == (free: pages - broken, reserved: 0) }

    /// Whether `frame` is part of one of its pages, in use or not.
    public func contains(_ frame: HostFrame) -> Bool { heads.contains(frame.aligned(to: level)) }

    /// Promises `count` pages. False: there are not so many. Kernel: `hugetlb_acct_memory`.
    func reserve(_ count: Int) -> Bool {
        lock.lock()
        defer { lock.unlock() }
        guard free.count - reserved >= count else { return false }
        reserved += count
        return true
    }

    func unreserve(_ count: Int) {
        lock.lock()
        reserved -= count
        lock.unlock()
    }

    /// A page of zeros with one reference. - Parameter promised: one of those that were reserved. Nil: there is none left.
    func take(promised: Bool) -> UnsafeMutablePointer<PageFrame>? {
        lock.lock()
        guard promised || free.count > reserved, let frame = free.popLast() else {
            lock.unlock()
            return nil
        }
        if promised { reserved -= 1 }
        lock.unlock()
        let memory = host.memory
        let page = memory.page(frame)
        let kept = PageFlags.head | PageFlags.hugeTLB | PageFlags.written
        page.pointee.flags.bitwiseAnd(kept, ordering: .relaxed)
        page.pointee.mapCount.store(0, ordering: .relaxed)
        page.pointee.referenceCount.store(1, ordering: .releasing)
        memory.clear(frame, count: Int(level.frames))
        return page
    }

    /// A page's last reference is gone. Kernel: `free_huge_folio`.
    func give(_ page: UnsafeMutablePointer<PageFrame>) {
        lock.lock()
        free.append(host.memory.frame(of: page))
        lock.unlock()
    }
}

extension PhysicalMemory {
    /// 1 GiB at the upper end of memory, naturally aligned, as one folio. Nil: that memory is in use, or there is none.
    /// Kernel: `alloc_bootmem_huge_page`.
    func takeGigantic() -> HostFrame? {
        let count = Int(PageLevel.page1G.frames)
        zone.lock()
        let first = ((ceiling - count) / count) * count
        guard ceiling >= count, first >= virgin else {
            zone.unlock()
            return nil
        }
        // What lies between it and the old ceiling is lost to the allocator, as odd ends of memory are.
        freeCount -= ceiling - first
        ceiling = first
        zone.unlock()
        for i in 0..<count {
            let page = frames + first + i
            let written: UInt64 = arenaIsZero ? 0 : PageFlags.written
            page.pointee.flags.store((i == 0 ? PageFlags.head : PageFlags.tail) | written, ordering: .relaxed)
            page.pointee.headDistance.store(UInt32(i), ordering: .relaxed)
        }
        frames[first].order = 18
        return HostFrame(UInt64(first))
    }

    func isHugeTLB(_ entry: HostEntry) -> Bool {
        entry.mapsFrame && !entry.isSpecial && hasPageFrame(entry.frame)
            && page(entry.frame).pointee.flags.load(ordering: .relaxed) & PageFlags.hugeTLB != 0
    }
}
