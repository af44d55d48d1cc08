import Frames
import Synchronization
import Synchrony

/// Where pages go that memory has no room for: slots of one page each, and the cache of those that are in memory as well.
/// Kernel: `struct swap_info_struct`, the swap cache.
///
/// A slot is used by each entry or object page that names it, and given up with the last. A page in the cache has one
/// reference of the cache's own.
public final class SwapDevice: @unchecked Sendable {
    // Unchecked: all mutable state is touched only under `lock`, but for the bytes of a slot, which belong to whoever
    // writes it out before it is in any entry, and don't change afterwards.
    public let slots: Int
    /// Reading must be waited for: a fault gives up the mmap lock for it. Kernel: without `SWP_SYNCHRONOUS_IO`.
    public let slow: Bool
    private let lock = SpinLock(.swap)
    private let store: UnsafeMutableRawPointer
    /// Entries and object pages that name each slot; nil-like -1: free.
    private var uses: [Int32]
    /// The frame that the cache holds for each slot; 0: none.
    private var cached: [UInt64]
    private var written: [Bool]
    private var unreadable: [Bool]
    /// The page in the cache was read without waiting for the only entry that names the slot. The kernel leaves the cache out
    /// then, so that the page is not dirty afterwards.
    private var passesBy: [Bool]
    private var next = 0
    private var inUse = 0
    private var failures = TransferFailures()

    /// - Parameter slots: its size, in pages.
    public init(slots: Int, slow: Bool = false) {
        precondition(slots > 0)
        self.slots = slots
        self.slow = slow
        store = .allocate(byteCount: slots << Int(pageShift), alignment: Int(pageSize))
        uses = Array(repeating: -1, count: slots)
        cached = Array(repeating: 0, count: slots)
        written = Array(repeating: false, count: slots)
        unreadable = Array(repeating: false, count: slots)
        passesBy = Array(repeating: false, count: slots)
    }

    deinit { store.deallocate() }

    /// Slots that hold something.
    public var usedSlots: Int { locked { inUse } }

    /// The next `reads` and `writes` come back with an I/O error.
    public func failNext(reads: Int = 0, writes: Int = 0) {
        lock.lock()
        failures.add(reads: reads, writes: writes)
        lock.unlock()
    }

    private func locked<R>(_ body: () -> R) -> R {
        lock.lock()
        defer { lock.unlock() }
        return body()
    }

    // MARK: Slots

    /// The slot of a page that is to be evicted, a new one if it has none. Until the caller's `release` nobody gives it up,
    /// though no entry names it yet. Nil: the device is full. Kernel: `folio_alloc_swap`, under the folio's lock.
    func hold(_ page: UnsafeMutablePointer<PageFrame>, _ memory: PhysicalMemory) -> Int? {
        lock.lock()
        defer { lock.unlock() }
        if page.pointee.flags.load(ordering: .relaxed) & PageFlags.swapCache != 0 {
            let slot = Int(page.pointee.word1)
            uses[slot] += 1
            return slot
        }
        guard let slot = freeSlot() else { return nil }
        uses[slot] = 1
        written[slot] = false
        inUse += 1
        enter(page, slot, memory)
        return slot
    }

    private func enter(_ page: UnsafeMutablePointer<PageFrame>, _ slot: Int, _ memory: PhysicalMemory) {
        memory.get(page)
        page.pointee.word1 = UInt64(slot)
        page.pointee.flags.bitwiseOr(PageFlags.swapCache, ordering: .relaxed)
        cached[slot] = memory.frame(of: page).number
    }

    /// A slot for one object page, named once. Nil: full.
    func reserve() -> Int? {
        lock.lock()
        defer { lock.unlock() }
        guard let slot = freeSlot() else { return nil }
        uses[slot] = 1
        written[slot] = false
        inUse += 1
        return slot
    }

    private func freeSlot() -> Int? {
        guard inUse < slots else { return nil }
        while uses[next] >= 0 { next = (next + 1) % slots }
        return next
    }

    /// One entry more names `slot`. Kernel: `swap_duplicate`.
    func use(_ slot: Int) {
        lock.lock()
        uses[slot] += 1
        lock.unlock()
    }

    /// One entry less names `slot`; with the last it is free, and the cache forgets its page. Kernel: `swap_free`,
    /// `free_swap_and_cache`. No lock ranked past `.swap` held.
    func release(_ slot: Int, _ memory: PhysicalMemory) {
        lock.lock()
        uses[slot] -= 1
        precondition(uses[slot] >= 0, "a swap slot that nothing names is released")
        let page = uses[slot] == 0 ? vacate(slot, memory) : nil
        lock.unlock()
        if let page { memory.put(page) }
    }

    /// Frees a slot; the page that the cache held, whose reference is now the caller's. Its bytes are nowhere else from now
    /// on, so it is dirty. `lock` held. Kernel: `folio_free_swap`; `do_swap_page` where it leaves the cache out.
    private func vacate(_ slot: Int, _ memory: PhysicalMemory) -> UnsafeMutablePointer<PageFrame>? {
        uses[slot] = -1
        unreadable[slot] = false
        inUse -= 1
        guard cached[slot] != 0 else { return nil }
        let page = memory.page(HostFrame(cached[slot]))
        cached[slot] = 0
        page.pointee.flags.bitwiseAnd(~PageFlags.swapCache, ordering: .relaxed)
        if !passesBy[slot] { memory.mark(page, PageFlags.dirty(.driver)) }
        passesBy[slot] = false
        return page
    }

    /// Gives the slot of a page in the cache up, if nothing names it (any more). Kernel: `folio_free_swap`.
    func forget(_ page: UnsafeMutablePointer<PageFrame>, _ memory: PhysicalMemory) -> Bool {
        lock.lock()
        guard page.pointee.flags.load(ordering: .relaxed) & PageFlags.swapCache != 0 else {
            lock.unlock()
            return true
        }
        let slot = Int(page.pointee.word1)
        guard uses[slot] == 0 else {
            lock.unlock()
            return false
        }
        _ = vacate(slot, memory)
        lock.unlock()
        memory.put(page)
        return true
    }

    /// Takes a page that is in no entry out of memory for good: only the caller and the cache may hold it. The caller's
    /// reference is gone then too. False: somebody else has it. Kernel: `__remove_mapping`.
    func evict(_ page: UnsafeMutablePointer<PageFrame>, _ memory: PhysicalMemory) -> Bool {
        lock.lock()
        let isCached = page.pointee.flags.load(ordering: .relaxed) & PageFlags.swapCache != 0
        let expected: Int32 = isCached ? 2 : 1
        let (frozen, _) = page.pointee.referenceCount.compareExchange(
            expected: expected, desired: 0, ordering: .acquiringAndReleasing)
        guard frozen else {
            lock.unlock()
            return false
        }
        if isCached {
            let slot = Int(page.pointee.word1)
            if uses[slot] == 0 { _ = vacate(slot, memory) } else { cached[slot] = 0 }
        }
        lock.unlock()
        memory.freeFolio(page)
        return true
    }

    // MARK: Content

    /// Whether the slot's content is safe on the device.
    func isWritten(_ slot: Int) -> Bool { locked { written[slot] } }

    /// Writes a frame out. False: an I/O error. Kernel: `swap_writepage`.
    func write(_ slot: Int, from frame: HostFrame, _ memory: PhysicalMemory) -> Bool {
        mightSleep()
        guard !locked({ failures.takeWrite() }) else { return false }
        bytes(slot).copyMemory(from: memory.bytes(of: frame), byteCount: Int(pageSize))
        lock.lock()
        written[slot] = true
        lock.unlock()
        return true
    }

    /// Reads a slot into a frame that is the caller's alone. False: an I/O error. Kernel: `swap_read_folio`.
    func read(_ slot: Int, into frame: HostFrame, _ memory: PhysicalMemory) -> Bool {
        guard !locked({ failures.takeRead() }) else { return false }
        memory.willWrite(frame)
        memory.bytes(of: frame).copyMemory(from: bytes(slot), byteCount: Int(pageSize))
        return true
    }

    private func bytes(_ slot: Int) -> UnsafeMutableRawPointer { store + slot << Int(pageShift) }

    // MARK: The cache

    enum Cached {
        /// With a reference for the caller.
        case page(UnsafeMutablePointer<PageFrame>)
        case absent
        /// The last attempt to read it failed; the next one may try again.
        case unreadable
    }

    /// The page that stands for `slot` in memory. Kernel: `swap_cache_get_folio`.
    func lookUp(_ slot: Int, _ memory: PhysicalMemory) -> Cached {
        lock.lock()
        defer { lock.unlock() }
        if unreadable[slot] {
            unreadable[slot] = false
            return .unreadable
        }
        guard cached[slot] != 0 else { return .absent }
        let page = memory.page(HostFrame(cached[slot]))
        memory.get(page)
        passesBy[slot] = false
        return .page(page)
    }

    /// Whether the cache has `page` for `slot`.
    func holds(_ page: UnsafeMutablePointer<PageFrame>, _ slot: Int) -> Bool {
        locked {
            page.pointee.flags.load(ordering: .relaxed) & PageFlags.swapCache != 0 && page.pointee.word1 == UInt64(slot)
        }
    }

    /// Makes `page` the one that stands for `slot`, unless there is one, or nothing names the slot any more.
    func enterIfAbsent(_ page: UnsafeMutablePointer<PageFrame>, _ slot: Int, _ memory: PhysicalMemory) -> Bool {
        lock.lock()
        defer { lock.unlock() }
        guard uses[slot] > 0, cached[slot] == 0 else { return false }
        enter(page, slot, memory)
        passesBy[slot] = uses[slot] == 1 && !slow
        return true
    }

    /// A read failed: who waits for the page learns of it.
    func markUnreadable(_ slot: Int) {
        lock.lock()
        if uses[slot] > 0 { unreadable[slot] = true }
        lock.unlock()
    }
}
