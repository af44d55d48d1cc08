import Frames
import Synchronization
import Synchrony

/// The pages that reclaim may take, oldest last: active and inactive, anonymous and of objects.
/// Kernel: `struct lruvec`, one for the host.
///
/// A page joins when it becomes somebody's, at the head of its inactive list, and leaves when it is freed. Whoever works
/// on a page takes it off its list first, with a reference: nobody else finds it there meanwhile.
final class PageLists: @unchecked Sendable {
    // Unchecked: all is touched only under `lock`; so are the links of the listed pages.
    enum List: Int, CaseIterable {
        case inactiveAnonymous, activeAnonymous, inactiveObject, activeObject
    }

    let lock = SpinLock(.pageLists)
    private let memory: Unmanaged<PhysicalMemory>
    /// Frame numbers of first and last, 0 for none, and the number of frames.
    private var first = [UInt32](repeating: 0, count: List.allCases.count)
    private var last = [UInt32](repeating: 0, count: List.allCases.count)
    private var counts = [Int](repeating: 0, count: List.allCases.count)

    init(_ memory: PhysicalMemory) { self.memory = Unmanaged.passUnretained(memory) }

    func count(_ list: List) -> Int {
        lock.lock()
        defer { lock.unlock() }
        return counts[list.rawValue]
    }

    /// Puts a page that is on no list on the one that its flags say, first in line or last.
    func add(_ page: UnsafeMutablePointer<PageFrame>, last atEnd: Bool = false) {
        lock.lock()
        defer { lock.unlock() }
        let flags = page.pointee.flags.load(ordering: .relaxed)
        precondition(flags & PageFlags.listed == 0, "a page is listed twice")
        link(page, last: atEnd)
    }

    /// `lock` held.
    private func link(_ page: UnsafeMutablePointer<PageFrame>, last atEnd: Bool) {
        let flags = page.pointee.flags.load(ordering: .relaxed)
        let list = Self.list(flags).rawValue
        let index = index(of: page)
        let other = atEnd ? last[list] : first[list]
        page.pointee.next = atEnd ? 0 : other
        page.pointee.previous = atEnd ? other : 0
        if other == 0 {
            first[list] = index
            last[list] = index
        } else if atEnd {
            frame(other).pointee.next = index
            last[list] = index
        } else {
            frame(other).pointee.previous = index
            first[list] = index
        }
        counts[list] += 1
        page.pointee.flags.bitwiseOr(PageFlags.listed, ordering: .relaxed)
    }

    /// Takes a page off its list, if it is on one.
    func remove(_ page: UnsafeMutablePointer<PageFrame>) {
        lock.lock()
        unlink(page)
        lock.unlock()
    }

    /// `lock` held.
    private func unlink(_ page: UnsafeMutablePointer<PageFrame>) {
        let flags = page.pointee.flags.load(ordering: .relaxed)
        guard flags & PageFlags.listed != 0 else { return }
        let list = Self.list(flags).rawValue
        let (next, previous) = (page.pointee.next, page.pointee.previous)
        if previous == 0 { first[list] = next } else { frame(previous).pointee.next = next }
        if next == 0 { last[list] = previous } else { frame(next).pointee.previous = previous }
        page.pointee.next = 0
        page.pointee.previous = 0
        counts[list] -= 1
        page.pointee.flags.bitwiseAnd(~PageFlags.listed, ordering: .relaxed)
    }

    /// Takes this page off its list, with a reference. False: it is on none, or is being freed.
    /// Kernel: `folio_isolate_lru`.
    func isolate(_ page: UnsafeMutablePointer<PageFrame>) -> Bool {
        lock.lock()
        defer { lock.unlock() }
        guard page.pointee.flags.load(ordering: .relaxed) & PageFlags.listed != 0 else { return false }
        return take(page)
    }

    /// The oldest page of a list. Nil: it is empty.
    func isolateOldest(_ list: List) -> UnsafeMutablePointer<PageFrame>? {
        lock.lock()
        defer { lock.unlock() }
        var index = last[list.rawValue]
        while index != 0 {
            let page = frame(index)
            index = page.pointee.previous
            if take(page) { return page }
        }
        return nil
    }

    /// `lock` held.
    private func take(_ page: UnsafeMutablePointer<PageFrame>) -> Bool {
        guard memory._withUnsafeGuaranteedRef({ $0.tryGetListed(page) }) else { return false }
        unlink(page)
        return true
    }

    /// Moves a listed page to the end of its inactive list. Kernel: `folio_deactivate`.
    func deactivate(_ page: UnsafeMutablePointer<PageFrame>) {
        change(page, clear: PageFlags.active | PageFlags.referenced, set: 0, last: true)
    }

    /// A listed page's content may be thrown away. Kernel: `folio_mark_lazyfree`.
    func markLazilyFreed(_ page: UnsafeMutablePointer<PageFrame>) {
        change(page, clear: PageFlags.active | PageFlags.referenced, set: PageFlags.lazilyFreed, last: true)
    }

    private func change(_ page: UnsafeMutablePointer<PageFrame>, clear: UInt64, set: UInt64, last: Bool) {
        lock.lock()
        defer { lock.unlock() }
        guard page.pointee.flags.load(ordering: .relaxed) & PageFlags.listed != 0 else { return }
        unlink(page)
        page.pointee.flags.bitwiseAnd(~clear, ordering: .relaxed)
        page.pointee.flags.bitwiseOr(set, ordering: .relaxed)
        link(page, last: last)
    }

    /// Gives an isolated page back, to the list that its flags say now, and drops the reference.
    /// Kernel: `folio_putback_lru`.
    func putBack(_ page: UnsafeMutablePointer<PageFrame>, last atEnd: Bool = false) {
        add(page, last: atEnd)
        memory._withUnsafeGuaranteedRef { $0.put(page) }
    }

    /// A page became an object's.
    func own(_ page: UnsafeMutablePointer<PageFrame>, _ object: MemoryObject, _ index: Int) {
        lock.lock()
        page.pointee.word0 = UInt64(index)
        page.pointee.word1 = UInt64(UInt(bitPattern: Unmanaged.passUnretained(object).toOpaque()))
        page.pointee.flags.bitwiseOr(PageFlags.objectPage, ordering: .relaxed)
        lock.unlock()
    }

    /// The object of a page gave it up: nobody finds the way from one to the other any more.
    func disown(_ page: UnsafeMutablePointer<PageFrame>) {
        lock.lock()
        page.pointee.flags.bitwiseAnd(~PageFlags.objectPage, ordering: .relaxed)
        page.pointee.word1 = 0
        lock.unlock()
    }

    /// Does `body` with the object of a page and the page's index in it; the object can't go away meanwhile. Nil: the page
    /// is no object's (any more).
    func withObject<R>(of page: UnsafeMutablePointer<PageFrame>, _ body: (MemoryObject, Int) -> R) -> R? {
        lock.lock()
        guard page.pointee.flags.load(ordering: .relaxed) & PageFlags.objectPage != 0,
            let address = UnsafeRawPointer(bitPattern: UInt(page.pointee.word1)),
            !Unmanaged<MemoryObject>.fromOpaque(address)._withUnsafeGuaranteedRef({ $0.isDying })
        else {
            lock.unlock()
            return nil
        }
        let object = Unmanaged<MemoryObject>.fromOpaque(address)
        let index = Int(page.pointee.word0)
        object._withUnsafeGuaranteedRef { _ = $0.workers.add(1, ordering: .relaxed) }
        lock.unlock()
        return object._withUnsafeGuaranteedRef { object in
            let result = body(object, index)
            schedulingPoint(.atomicAccumulate, object.workersIdentity.value)
            object.workers.subtract(1, ordering: .releasing)
            return result
        }
    }

    /// The object goes away: nobody may come to it from a page any more. Waits for those who have.
    func close(_ object: MemoryObject) {
        lock.lock()
        object.isDying = true
        let isVisited = object.workers.load(ordering: .acquiring) != 0
        lock.unlock()
        guard isVisited else { return }
        spinUntil(object.workersIdentity.value) { object.workers.load(ordering: .acquiring) == 0 }
    }

    private static func list(_ flags: UInt64) -> List {
        let active = flags & PageFlags.active != 0
        // Pages that their owner gave up go before all others, with the objects'.
        let anonymous = flags & PageFlags.anonymous != 0 && flags & PageFlags.lazilyFreed == 0
        return anonymous ? (active ? .activeAnonymous : .inactiveAnonymous) : (active ? .activeObject : .inactiveObject)
    }

    private func frame(_ index: UInt32) -> UnsafeMutablePointer<PageFrame> {
        memory._withUnsafeGuaranteedRef { $0.frames + Int(index) }
    }
    private func index(of page: UnsafeMutablePointer<PageFrame>) -> UInt32 {
        UInt32(truncatingIfNeeded: memory._withUnsafeGuaranteedRef { $0.frame(of: page).number })
    }
}
