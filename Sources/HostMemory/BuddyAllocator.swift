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

    /// Gives all of `range` to the free lists, largest aligned blocks first. Only while nobody else runs.
    func freeAtStart(_ from: Int, _ to: Int) {
        var i = from
        while i < to {
            var order = min(Self.largestOrder, i.trailingZeroBitCount)
            while i + (1 << order) > to { order -= 1 }
            push(UInt32(i), order)
            i += 1 << order
        }
        freeCount = to - from
    }

    private func push(_ index: UInt32, _ order: Int) {
        let page = frames + Int(index)
        page.pointee.order = UInt8(order)
        page.pointee.next = freeHeads[order]
        page.pointee.previous = .max
        touched = max(touched, Int(index) + 1)
        if freeHeads[order] != .max {
            frames[Int(freeHeads[order])].previous = index
            touched = max(touched, Int(freeHeads[order]) + 1)
        }
        freeHeads[order] = index
        page.pointee.flags.bitwiseOr(PageFlags.free, ordering: .relaxed)
    }

    private func unlink(_ index: UInt32, _ order: Int) {
        let page = frames + Int(index)
        touched = max(touched, Int(index) + 1 << order)
        if page.pointee.previous == .max {
            freeHeads[order] = page.pointee.next
        } else {
            frames[Int(page.pointee.previous)].next = page.pointee.next
            touched = max(touched, Int(page.pointee.previous) + 1)
        }
        if page.pointee.next != .max {
            frames[Int(page.pointee.next)].previous = page.pointee.previous
            touched = max(touched, Int(page.pointee.next) + 1)
        }
        page.pointee.next = .max
        page.pointee.previous = .max
        page.pointee.flags.bitwiseAnd(~PageFlags.free, ordering: .relaxed)
    }

    /// Takes 2^order frames, naturally aligned. The first frame's count becomes 1. Nil when no block is left.
    func allocatePages(order: Int, shape: Shape = .compound) -> HostFrame? {
        precondition(order >= 0 && order <= Self.largestOrder)
        zone.lock()
        if failingAllocation > 0 {
            failingAllocation -= 1
            if failingAllocation == 0 {
                zone.unlock()
                return nil
            }
        }
        var found = order
        while found <= Self.largestOrder, freeHeads[found] == .max { found += 1 }
        guard found <= Self.largestOrder else {
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
        first.pointee.headDistance = 0
        for i in 0..<(1 << order) {
            let page = first + i
            var flags = page.pointee.flags.load(ordering: .relaxed) & PageFlags.knownZero
            page.pointee.headDistance = 0
            if shape == .compound, order > 0 {
                flags |= i == 0 ? PageFlags.head : PageFlags.tail
                page.pointee.headDistance = UInt32(i)
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
            page.pointee.headDistance = 0
            page.pointee.flags.store(flags & PageFlags.knownZero, ordering: .relaxed)
        }
        zone.lock()
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

    /// Frames in the free lists.
    public var freeFrames: Int {
        zone.lock()
        defer { zone.unlock() }
        return freeCount
    }

    /// Makes the bytes of `count` frames zero, touching only those not known to be.
    func clear(_ frame: HostFrame, count: Int) {
        for i in 0..<count {
            let page = frames + Int(frame.number) + i
            if page.pointee.flags.load(ordering: .relaxed) & PageFlags.knownZero == 0 {
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
            if page.pointee.flags.load(ordering: .relaxed) & PageFlags.knownZero != 0 {
                page.pointee.flags.bitwiseAnd(~PageFlags.knownZero, ordering: .relaxed)
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
