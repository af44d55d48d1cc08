import Frames
import Synchronization
import Synchrony

/// Blocks of pages for graphics buffers, kept for reuse when a buffer gives them back. Kernel: `ttm_pool`.
///
/// A block of order n is *not* a compound page: its first frame has count 1, every other has count 0. Nobody outside
/// can hold one of those by reference; that is what made KVM refuse such buffers (`seeds/`, Spec: I-5).
public final class GraphicsPool: @unchecked Sendable {
    // Unchecked: `idle` and `inUse` are touched only under `lock`.
    public let host: Host
    private let lock = SpinLock(.objectIndex)
    /// Blocks waiting for reuse, by order.
    private var idle: [[HostFrame]]
    /// Frames in buffers.
    private var inUse = 0
    /// Frames that buffers may have together. Kernel: TTM's `ttm_pages_limit`.
    public let limit: Int

    public init(host: Host, limit: Int = .max) {
        self.host = host
        self.limit = limit
        idle = Array(repeating: [], count: PhysicalMemory.largestOrder + 1)
    }

    deinit { shrink() }

    /// A block of 2^order frames of zeros, which `driver` may map. Nil: no memory, or the limit is reached.
    /// Kernel: `ttm_pool_alloc_page`.
    public func takeBlock(order: Int, for driver: DriverMapping) -> HostFrame? {
        lock.lock()
        guard limit - inUse >= 1 << order else {
            lock.unlock()
            return nil
        }
        inUse += 1 << order
        let reused = idle[order].popLast()
        lock.unlock()
        let memory = host.memory
        guard let block = reused ?? memory.allocatePages(order: order, shape: .plain) else {
            noteUnused(order)
            return nil
        }
        for i in 0..<(1 << order) {
            memory.page(block.advanced(by: i)).pointee.flags.bitwiseOr(PageFlags.driver, ordering: .relaxed)
        }
        memory.clear(block, count: 1 << order)
        driver.claim(block..<block.advanced(by: 1 << order))
        return block
    }

    private func noteUnused(_ order: Int) {
        lock.lock()
        inUse -= 1 << order
        lock.unlock()
    }

    /// Takes a block back for reuse; `driver` has unmapped it. Kernel: `ttm_pool_type_give`.
    public func giveBlock(_ block: HostFrame, order: Int, from driver: DriverMapping) {
        guard driver.relinquish(block..<block.advanced(by: 1 << order), of: host) else { return }
        lock.lock()
        inUse -= 1 << order
        idle[order].append(block)
        lock.unlock()
    }

    /// Gives every idle block back to the host. Kernel: `ttm_pool_shrink`.
    public func shrink() {
        for order in idle.indices {
            while let block = takeIdle(order) { host.memory.freePlain(block, order: order) }
        }
    }

    private func takeIdle(_ order: Int) -> HostFrame? {
        lock.lock()
        defer { lock.unlock() }
        return idle[order].popLast()
    }

    /// Frames in blocks that wait for reuse.
    public var idleFrames: Int {
        lock.lock()
        defer { lock.unlock() }
        var count = 0
        for order in idle.indices { count += idle[order].count << order }
        return count
    }
}

extension PhysicalMemory {
    /// Frees a plain block through its first frame's reference. If somebody else holds that frame, only the others are
    /// freed now, and it follows when it is put: that is what the kernel's `__free_pages` does.
    func freePlain(_ first: HostFrame, order: Int) {
        let head = page(first)
        let old = head.pointee.referenceCount.subtract(1, ordering: .acquiringAndReleasing).oldValue
        precondition(old > 0, "a block with count 0 is freed")
        guard old > 1 else { return freePages(first, order: order) }
        for part in 0..<order { freePages(first.advanced(by: 1 << part), order: part) }
    }
}
