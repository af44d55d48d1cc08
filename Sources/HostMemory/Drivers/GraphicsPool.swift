import Frames
import Synchronization
import Synchrony

/// Blocks of pages for graphics buffers, kept for reuse when a buffer gives them back. Kernel: `ttm_pool`.
///
/// A block of order n is *not* a compound page: its first frame has count 1, every other has count 0. Nobody outside
/// can hold one of those by reference; that is what made KVM refuse such buffers (`seeds/`, Spec: I-5).
public final class GraphicsPool: @unchecked Sendable {
    // Unchecked: `idle` is touched only under `lock`.
    public let host: Host
    private let lock = SpinLock(.objectIndex)
    /// Blocks waiting for reuse, by order.
    private var idle: [[HostFrame]]

    public init(host: Host) {
        self.host = host
        idle = Array(repeating: [], count: PhysicalMemory.largestOrder + 1)
    }

    deinit { shrink() }

    /// A block of 2^order frames of zeros. Nil: no memory. Kernel: `ttm_pool_alloc_page`.
    public func takeBlock(order: Int) -> HostFrame? {
        lock.lock()
        let reused = idle[order].popLast()
        lock.unlock()
        let memory = host.memory
        guard let block = reused ?? memory.allocatePages(order: order, shape: .plain) else { return nil }
        for i in 0..<(1 << order) {
            memory.page(block.advanced(by: i)).pointee.flags.bitwiseOr(PageFlags.driver, ordering: .relaxed)
        }
        memory.clear(block, count: 1 << order)
        return block
    }

    /// Takes a block back for reuse; nothing maps it any more. Kernel: `ttm_pool_type_give`.
    public func giveBlock(_ block: HostFrame, order: Int) {
        lock.lock()
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
