import Audit
import Frames
import Synchronization
import Synchrony

/// The buddy allocator. Kernel: `alloc_pages`, `__free_pages`. Lock: the zone lock, innermost but the journal's.
extension PhysicalMemory {
    /// How an allocation of order > 0 keeps its counts.
    public enum Shape: Sendable {
        /// One folio: the head counts for all. Kernel: `__GFP_COMP`.
        case compound
        /// The first frame has count 1, every other 0: graphics drivers' pools.
        case plain
    }

    /// Moves never-used memory into the free lists, one naturally aligned block after another, the largest that fits,
    /// until one has 2^order frames; returns that one's order. Nil: there is none left. The zone lock held.
    ///
    /// Only called when no list has such a block: low frames are used first, and memory that was used before fresh one.
    /// Two blocks that are carved whole are never each other's buddies (the lower one's is the stretch with frame 0, or
    /// ends past RAM, or the order is the largest), so nothing merges here.
    private func carve(_ order: Int) -> Int? {
        while virgin < ceiling {
            var size = min(Self.largestOrder, virgin.trailingZeroBitCount)
            while virgin + (1 << size) > ceiling { size -= 1 }
            let first = virgin
            virgin += 1 << size
            if !arenaIsZero {
                for i in first..<virgin { frames[i].flags.store(PageFlags.written, ordering: .relaxed) }
            }
            push(UInt32(first), size)
            if size >= order { return size }
        }
        return nil
    }

    private func push(_ index: UInt32, _ order: Int) {
        let page = frames + Int(index)
        page.pointee.order = UInt8(order)
        page.pointee.next = freeHeads[order]
        page.pointee.previous = 0
        if freeHeads[order] != 0 { frames[Int(freeHeads[order])].previous = index }
        freeHeads[order] = index
        page.pointee.flags.bitwiseOr(PageFlags.free, ordering: .relaxed)
    }

    private func unlink(_ index: UInt32, _ order: Int) {
        let page = frames + Int(index)
        if page.pointee.previous == 0 {
            freeHeads[order] = page.pointee.next
        } else {
            frames[Int(page.pointee.previous)].next = page.pointee.next
        }
        if page.pointee.next != 0 { frames[Int(page.pointee.next)].previous = page.pointee.previous }
        page.pointee.next = 0
        page.pointee.previous = 0
        page.pointee.flags.bitwiseAnd(~PageFlags.free, ordering: .relaxed)
    }

    /// The smallest order of a free block with at least 2^order frames. Nil: there is none. The zone lock held.
    private func smallestFree(_ order: Int) -> Int? {
        for size in order...Self.largestOrder where freeHeads[size] != 0 { return size }
        return carve(order)
    }

    /// Takes 2^order frames, naturally aligned. The first frame's count becomes 1. Nil when no block is left.
    func allocatePages(order: Int, shape: Shape = .compound) -> HostFrame? {
        precondition(order >= 0 && order <= Self.largestOrder)
        zone.lock()
        if isToFail() {
            zone.unlock()
            return nil
        }
        guard var found = smallestFree(order) else {
            zone.unlock()
            return nil
        }
        let index = freeHeads[found]
        unlink(index, found)
        while found > order {
            found -= 1
            push(index + (1 << UInt32(found)), found)
        }
        freeCount -= 1 << order
        zone.unlock()

        let first = frames + Int(index)
        first.pointee.order = UInt8(order)
        first.pointee.headDistance.store(0, ordering: .relaxed)
        for i in 0..<(1 << order) {
            let page = first + i
            var flags = page.pointee.flags.load(ordering: .relaxed) & PageFlags.written
            page.pointee.headDistance.store(0, ordering: .relaxed)
            if shape == .compound, order > 0 {
                flags |= i == 0 ? PageFlags.head : PageFlags.tail
                page.pointee.headDistance.store(UInt32(i), ordering: .relaxed)
            }
            page.pointee.flags.store(flags, ordering: .relaxed)
            page.pointee.mapCount.store(0, ordering: .relaxed)
            page.pointee.pinCount.store(0, ordering: .relaxed)
            page.pointee.word0 = 0
            page.pointee.word1 = 0
        }
        first.pointee.referenceCount.store(1, ordering: .releasing)
        let frame = HostFrame(UInt64(index))
        schedulingNote(.pageAllocate, frame.physicalAddress)
        record(Event(.pageAllocated, frame: frame, value: UInt64(order)))
        return frame
    }

    /// Counts an allocation and says whether it is the one to fail. Caller holds `zone`.
    private func isToFail() -> Bool {
        guard failingAllocation > 0 else { return false }
        failingAllocation -= 1
        return failingAllocation == 0
    }

    /// Whether the kernel gets memory for an object of its own (a slot, a bitmap). Such memory is not part of the model's
    /// frames; only the failure that `failAllocation` asks for is. Kernel: `kmalloc`.
    public func allowsObject() -> Bool {
        zone.lock()
        defer { zone.unlock() }
        return !isToFail()
    }

    /// Makes the allocation fail that comes `count`-th from now on (1: the next); 0: none. Kernel: `fail_page_alloc`.
    public func failAllocation(_ count: Int) {
        zone.lock()
        failingAllocation = count
        zone.unlock()
    }

    /// Whether the allocation that was to fail has not come yet.
    public var allocationIsToFail: Bool {
        zone.lock()
        defer { zone.unlock() }
        return failingAllocation > 0
    }

    /// Gives 2^order frames back and merges buddies. The caller has dropped the last reference.
    func freePages(_ frame: HostFrame, order: Int) {
        schedulingPoint(.pageFree, frame.physicalAddress)
        for i in 1..<max(1 << order, 1) where order > 0 {
            schedulingNote(.pageFree, frame.advanced(by: i).physicalAddress)
        }
        record(Event(.pageFreed, frame: frame, value: UInt64(order)))
        let first = frames + Int(frame.number)
        for i in 0..<(1 << order) {
            let page = first + i
            let flags = page.pointee.flags.load(ordering: .relaxed)
            if flags & PageFlags.free != 0 {
                guard let journal else { preconditionFailure("a free page is freed again") }
                return journal.add(Finding(.i2, "a free page is freed again", frame: frame))
            }
            if page.pointee.referenceCount.load(ordering: .relaxed) != 0 {
                guard let journal else { preconditionFailure("a page is freed while it is referenced") }
                journal.add(Finding(.i2, "a page is freed while it is referenced", frame: frame.advanced(by: i)))
                page.pointee.referenceCount.store(0, ordering: .relaxed)
            }
            page.pointee.headDistance.store(0, ordering: .relaxed)
            page.pointee.flags.store(flags & PageFlags.written, ordering: .relaxed)
        }
        zone.lock()
        precondition(Int(frame.number) + 1 << order <= virgin, "memory that was never handed out is freed")
        freeCount += 1 << order
        var index = UInt32(frame.number)
        var order = order
        while order < Self.largestOrder {
            let buddy = index ^ (1 << UInt32(order))
            guard Int(buddy) + (1 << order) <= ram.count,
                frames[Int(buddy)].flags.load(ordering: .relaxed) & PageFlags.free != 0,
                Int(frames[Int(buddy)].order) == order
            else { break }
            unlink(buddy, order)
            index = min(index, buddy)
            order += 1
        }
        push(index, order)
        zone.unlock()
    }

    /// A driver keeps the frames, but nobody may use them any more. For checks: it conflicts with their use as a free
    /// does.
    func noteGivenBack(_ frame: HostFrame, count: Int) {
        guard let observer = journal?.observer else { return }
        for i in 0..<count { schedulingNote(.pageFree, frame.advanced(by: i).physicalAddress) }
        observer.givenBack(frame.number, UInt64(count))
    }

    /// Frames in the free lists, and those never used.
    public var freeFrames: Int {
        zone.lock()
        defer { zone.unlock() }
        return freeCount
    }

    /// Makes the bytes of `count` frames zero, touching only those not known to be.
    func clear(_ frame: HostFrame, count: Int) {
        for i in 0..<count {
            let page = frames + Int(frame.number) + i
            if page.pointee.flags.load(ordering: .relaxed) & PageFlags.written != 0 {
                bytes(of: HostFrame(frame.number + UInt64(i))).initializeMemory(
                    as: UInt64.self, repeating: 0, count: Int(pageSize / 8))
            }
        }
    }

    /// Says that the frame's bytes may change from now on. Must be called before a frame becomes writable for anyone.
    public func willWrite(_ frame: HostFrame, count: Int = 1) {
        guard hasPageFrame(frame) else { return }
        for i in 0..<count {
            let page = frames + Int(frame.number) + i
            if page.pointee.flags.load(ordering: .relaxed) & PageFlags.written == 0 {
                page.pointee.flags.bitwiseOr(PageFlags.written, ordering: .relaxed)
            }
        }
    }

    /// Takes `count` frames of device memory, which have no page frames. Nil when the device range is used up.
    public func allocateDeviceFrames(_ count: Int, alignment: PageLevel = .page4K) -> Range<HostFrame>? {
        zone.lock()
        defer { zone.unlock() }
        let start = (deviceNext + alignment.frames - 1) & ~(alignment.frames - 1)
        guard start + UInt64(count) <= device.upperBound.number else { return nil }
        deviceNext = start + UInt64(count)
        return HostFrame(start)..<HostFrame(deviceNext)
    }
}
