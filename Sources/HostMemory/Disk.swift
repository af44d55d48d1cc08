import Frames
import Synchronization
import Synchrony

/// The bytes of a file while they are not in memory. Kernel: a file system's blocks.
public final class Disk: @unchecked Sendable {
    // Unchecked: the counters are touched only under `lock`; the bytes of a page only by whoever holds the lock of the
    // object's pages.
    public let pages: Int
    /// Reading must be waited for: a fault gives up the mmap lock for it.
    public let slow: Bool
    /// Bytes that a file may have. Kernel: the file system's `s_maxbytes`.
    public let largestFile: UInt64
    private let store: UnsafeMutableRawPointer
    private let lock = SpinLock(.swap)
    private var failures = TransferFailures()

    /// A disk of zeros. - Parameter pages: its size.
    public init(pages: Int, slow: Bool = false, largestFile: UInt64 = UInt64(Int64.max)) {
        precondition(pages > 0)
        self.pages = pages
        self.slow = slow
        self.largestFile = largestFile
        store = .allocate(byteCount: pages << Int(pageShift), alignment: Int(pageSize))
        store.initializeMemory(as: UInt64.self, repeating: 0, count: pages * Int(pageSize / 8))
    }

    deinit { store.deallocate() }

    /// The next `reads` and `writes` come back with an I/O error.
    public func failNext(reads: Int = 0, writes: Int = 0) {
        lock.lock()
        failures.add(reads: reads, writes: writes)
        lock.unlock()
    }

    /// The 8 bytes at an aligned offset, as they would be after a crash. For tests and reports, while nothing is written.
    public func word(page: Int, offset: Int) -> UInt64 {
        (store + page << Int(pageShift) + offset).load(as: UInt64.self)
    }

    private func readFails() -> Bool {
        lock.lock()
        defer { lock.unlock() }
        return failures.takeRead()
    }

    private func writeFails() -> Bool {
        lock.lock()
        defer { lock.unlock() }
        return failures.takeWrite()
    }

    /// False: an I/O error.
    func read(_ page: Int, into frame: HostFrame, _ memory: PhysicalMemory) -> Bool {
        if readFails() { return false }
        guard page < pages else {
            memory.clear(frame, count: 1)
            return true
        }
        memory.willWrite(frame)
        memory.bytes(of: frame).copyMemory(from: store + page << Int(pageShift), byteCount: Int(pageSize))
        return true
    }

    /// False: an I/O error, or no room.
    func write(_ page: Int, from frame: HostFrame, _ memory: PhysicalMemory) -> Bool {
        if writeFails() || page >= pages { return false }
        (store + page << Int(pageShift)).copyMemory(from: memory.bytes(of: frame), byteCount: Int(pageSize))
        return true
    }

    /// What is cut off or punched out reads as zeros later.
    func clear(_ range: Range<Int>) {
        let range = range.clamped(to: 0..<pages)
        (store + range.lowerBound << Int(pageShift)).initializeMemory(
            as: UInt64.self, repeating: 0, count: range.count * Int(pageSize / 8))
    }
}
