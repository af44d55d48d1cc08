import Frames
import Synchrony

/// A graphics device: so much memory of its own, a pool of system memory, and the buffers in both, the least recently used
/// first. What is full makes room: from device memory buffers are evicted to system memory, from there to swap, and a
/// buffer comes back when it is used. Kernel: `ttm_device`, `ttm_resource_manager` and its LRU list.
///
/// A buffer is used when it is made, moves, serves a fault, or is read or written by the device. The specification is
/// silent about when TTM moves a buffer to the list's end; this is at least as often.
///
/// No two reservations are ever held at once: whoever needs room asks for it before he takes his buffer's (the kernel
/// holds both and may back out, `ww_mutex`). The device keeps its buffers until they are freed.
public final class GraphicsDevice: @unchecked Sendable {
    // Unchecked: `buffers`, `used` and the counters are touched only under `lock`.
    public let host: Host
    public let pool: GraphicsPool
    /// Pages of device memory that buffers may have together; its frames are never used twice, so that a stale mapping
    /// shows, and the host must have one for each page of each move.
    public let deviceMemoryPages: Int
    private let lock = SpinLock(.objectIndex)
    /// Pages of device memory in use or set aside.
    private var used = 0
    private struct Entry {
        let buffer: GraphicsBuffer
        var place: GraphicsBuffer.Place
    }
    /// Least recently used first.
    private var buffers: [Entry] = []
    private var evicted = 0
    private var swappedOut = 0

    /// - Parameter systemPages: pages of system memory that buffers may have together.
    public init(_ host: Host, deviceMemoryPages: Int, systemPages: Int = .max) {
        self.host = host
        self.deviceMemoryPages = deviceMemoryPages
        pool = GraphicsPool(host: host, limit: systemPages)
    }

    // MARK: The list

    /// `buffer` is at `place` and was used just now; a freed one leaves the list.
    func note(_ buffer: GraphicsBuffer, _ place: GraphicsBuffer.Place) {
        lock.lock()
        let index = buffers.firstIndex { $0.buffer === buffer }
        let gone = index.map { buffers.remove(at: $0) }
        if place != .freed { buffers.append(Entry(buffer: buffer, place: place)) }
        lock.unlock()
        // Whoever frees a buffer has it: this is not the last reference.
        _ = gone
    }

    /// Who asks for room is in use: he is the last to go for it.
    private func touch(_ buffer: GraphicsBuffer) {
        lock.lock()
        if let index = buffers.firstIndex(where: { $0.buffer === buffer }) { buffers.append(buffers.remove(at: index)) }
        lock.unlock()
    }

    private func leastRecentlyUsed(in place: GraphicsBuffer.Place, except buffer: GraphicsBuffer) -> [GraphicsBuffer] {
        lock.lock()
        defer { lock.unlock() }
        var found: [GraphicsBuffer] = []
        for entry in buffers where entry.place == place && entry.buffer !== buffer { found.append(entry.buffer) }
        return found
    }

    // MARK: Room

    /// Sets device memory aside for `buffer`, evicting others as long as there is too little. No reservation held.
    /// Error: ENOMEM, if it is more than there is, or nothing more can go. Kernel: `ttm_bo_mem_space`, `ttm_mem_evict_first`.
    func takeDeviceMemory(_ pages: Int, for buffer: GraphicsBuffer) throws(Errno) {
        guard pages <= deviceMemoryPages else { throw .ENOMEM }
        touch(buffer)
        while !tryTake(pages) {
            guard let victim = leastRecentlyUsed(in: .deviceMemory, except: buffer).first else { throw .ENOMEM }
            guard try victim.leaveDeviceMemory() else { continue }
            lock.lock()
            evicted += 1
            lock.unlock()
        }
    }

    private func tryTake(_ pages: Int) -> Bool {
        lock.lock()
        defer { lock.unlock() }
        guard pages <= deviceMemoryPages - used else { return false }
        used += pages
        return true
    }

    func returnDeviceMemory(_ pages: Int) {
        lock.lock()
        used -= pages
        lock.unlock()
    }

    /// Swaps out the least recently used buffer in system memory that can be. No reservation held. False: none.
    /// Kernel: `ttm_global_swapout`.
    func swapOutOne(except buffer: GraphicsBuffer) -> Bool {
        for victim in leastRecentlyUsed(in: .system, except: buffer) where victim.leaveSystemMemory() {
            lock.lock()
            swappedOut += 1
            lock.unlock()
            return true
        }
        return false
    }

    // MARK: For reports

    /// Pages of device memory in use.
    public var usedDeviceMemory: Int {
        lock.lock()
        defer { lock.unlock() }
        return used
    }
    /// Buffers that were evicted from device memory, and those swapped out, because others needed the room.
    public var evictions: (fromDeviceMemory: Int, toSwap: Int) {
        lock.lock()
        defer { lock.unlock() }
        return (evicted, swappedOut)
    }
}
