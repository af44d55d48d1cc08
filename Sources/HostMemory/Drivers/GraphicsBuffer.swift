import Frames
import Synchrony

/// A graphics driver's buffer object, as TTM keeps it: plain blocks of system memory, or device memory; mapped by
/// frame number (VM_PFNMAP, VM_IO), filled by faults. Kernel: `ttm_buffer_object`.
///
/// Places, and how a buffer comes there:
/// 1. *system*: blocks from the pool; where a buffer starts.
/// 2. *device memory*: `move`; frames without page frames.
/// 3. *swapped out*: `evict` from system memory; the next use brings it back to 1.
/// 4. *freed*: for good; every fault is a SIGBUS.
///
/// Each change of place happens under the reservation lock: unmap everywhere (notifiers hear it), copy the bytes, switch.
/// A fault takes that lock too, so none comes in between.
public final class GraphicsBuffer: DriverMapping, @unchecked Sendable {
    // Unchecked: `store` is touched only under `reservation`.
    public enum Place: Sendable, Equatable { case system, deviceMemory, swappedOut, freed }

    private enum Store {
        case system([HostFrame])
        case device(Range<HostFrame>)
        case swap(MemoryObject)
        case none
    }

    public let host: Host
    public let pool: GraphicsPool
    /// Size, in pages.
    public let pages: Int
    /// The order of its blocks.
    public let order: Int
    /// Kernel: `dma_resv`.
    public let reservation = SleepingLock(.buffer)
    private var store: Store = .none

    /// Neighbours that one fault maps at most. Kernel: `TTM_BO_VM_NUM_PREFAULT`.
    public static let prefault = 16

    /// Nil: no memory.
    public init?(pool: GraphicsPool, pages: Int, order: Int) {
        precondition(pages > 0 && order >= 0 && order <= PhysicalMemory.largestOrder)
        host = pool.host
        self.pool = pool
        self.pages = pages
        self.order = order
        super.init(flags: .framesOfDevice)
        guard let blocks = takeBlocks() else { return nil }
        store = .system(blocks)
    }

    /// With a pool of its own.
    public convenience init?(_ host: Host, pages: Int, order: Int) {
        self.init(pool: GraphicsPool(host: host), pages: pages, order: order)
    }

    deinit { giveBack(store) }

    public var place: Place {
        reservation.lock()
        defer { reservation.unlock() }
        switch store {
        case .system: return .system
        case .device: return .deviceMemory
        case .swap: return .swappedOut
        case .none: return .freed
        }
    }

    /// Where a page is now; nil if it is swapped out or freed.
    public func frame(of page: Int) -> HostFrame? {
        reservation.lock()
        defer { reservation.unlock() }
        return frameLocked(page)
    }

    private func frameLocked(_ page: Int) -> HostFrame? {
        switch store {
        case .system(let blocks): blocks[page >> order].advanced(by: page & ((1 << order) - 1))
        case .device(let range): range.lowerBound.advanced(by: page)
        case .swap, .none: nil
        }
    }

    // MARK: Faults

    /// Kernel: `ttm_bo_vm_fault`. If another task holds the reservation, `mmapLock` is dropped and the fault retried.
    public override func fault(
        _ space: AddressSpace, _ vma: VMAInfo, _ address: UserAddress, write: Bool
    ) -> DriverFault {
        guard reservation.tryLock() else { return .retry }
        defer { reservation.unlock() }
        let first = vma.backingPage(of: address)
        guard first < pages else { return .busError }
        if case .none = store { return .busError }
        guard bringBack() else { return .outOfMemory }
        let mapped = Int(vma.range.upperBound.page - address.page)
        for i in 0..<min(Self.prefault, pages - first, mapped) {
            guard let frame = frameLocked(first + i) else { return .busError }
            let result = space.insertFrame(frame, at: address + UInt64(i) * pageSize, in: vma)
            // Only the page that was asked for must succeed.
            if result != .inserted { return i == 0 ? result : .inserted }
        }
        return .inserted
    }

    public override func waitForRetry() {
        reservation.lock()
        reservation.unlock()
    }

    // MARK: Moving

    /// Moves the buffer; its bytes come along. Errors: ENOMEM (no room there: it stays), EINVAL for a freed buffer or a
    /// place that one can't move to. Kernel: `ttm_bo_validate`, `ttm_bo_handle_move_mem`.
    public func move(to place: Place) throws(Errno) {
        reservation.lock()
        defer { reservation.unlock() }
        guard place == .system || place == .deviceMemory else { throw .EINVAL }
        if case .none = store { throw .EINVAL }
        guard bringBack() else { throw .ENOMEM }
        switch (store, place) {
        case (.system, .system), (.device, .deviceMemory): return
        case (_, .system):
            guard let blocks = takeBlocks() else { throw .ENOMEM }
            relocate(to: .system(blocks))
        default:
            guard let range = host.memory.allocateDeviceFrames(pages) else { throw .ENOMEM }
            relocate(to: .device(range))
        }
    }

    /// Makes room: device memory is left for system memory, system memory for swap; a swapped-out buffer stays there.
    /// Errors: ENOMEM, EINVAL for a freed buffer. Kernel: `ttm_bo_evict`, `ttm_bo_swapout`.
    public func evict() throws(Errno) {
        reservation.lock()
        defer { reservation.unlock() }
        switch store {
        case .none: throw .EINVAL
        case .swap: return
        case .device:
            guard let blocks = takeBlocks() else { throw .ENOMEM }
            relocate(to: .system(blocks))
        case .system: try swapOut()
        }
    }

    /// The driver is done with the buffer: unmapped everywhere, then given back. Kernel: `ttm_bo_release`.
    public func free() {
        reservation.lock()
        unmapMappings(pages: 0..<pages)
        let old = store
        store = .none
        giveBack(old)
        reservation.unlock()
    }

    /// Unmap, copy, switch, give back: in this order. `reservation` held.
    private func relocate(to target: Store) {
        unmapMappings(pages: 0..<pages)
        let old = store
        var sources: [HostFrame] = []
        for page in 0..<pages { if let frame = frameLocked(page) { sources.append(frame) } }
        store = target
        for page in sources.indices {
            if let frame = frameLocked(page) { host.memory.copy(sources[page], to: frame) }
        }
        giveBack(old)
    }

    private func swapOut() throws(Errno) {
        unmapMappings(pages: 0..<pages)
        let object = MemoryObject(host: host, pages: pages)
        for page in 0..<pages {
            guard let frame = frameLocked(page) else { continue }
            try object.fill(page, from: frame)
        }
        let old = store
        store = .swap(object)
        giveBack(old)
    }

    /// Brings a swapped-out buffer back to system memory. False: no memory. `reservation` held.
    private func bringBack() -> Bool {
        guard case .swap(let object) = store else { return true }
        guard let blocks = takeBlocks() else { return false }
        store = .system(blocks)
        for page in 0..<pages {
            if let source = object.frame(of: page), let frame = frameLocked(page) {
                host.memory.copy(source, to: frame)
            }
        }
        return true
    }

    private func takeBlocks() -> [HostFrame]? {
        var blocks: [HostFrame] = []
        for _ in 0..<((pages + (1 << order) - 1) >> order) {
            guard let block = pool.takeBlock(order: order) else {
                giveBack(.system(blocks))
                return nil
            }
            blocks.append(block)
        }
        return blocks
    }

    /// Device frames are not reused: a stale mapping of one shows.
    private func giveBack(_ store: Store) {
        switch store {
        case .system(let blocks):
            for block in blocks {
                host.memory.noteGivenBack(block, count: 1 << order)
                pool.giveBlock(block, order: order)
            }
        case .device(let range): host.memory.noteGivenBack(range.lowerBound, count: pages)
        case .swap, .none: break
        }
    }

    // MARK: The driver's own access

    /// Reads 8 bytes as the device or its driver would. Errors: EINVAL outside the buffer or freed, ENOMEM.
    public func read(page: Int, offset: Int) throws(Errno) -> UInt64 {
        reservation.lock()
        defer { reservation.unlock() }
        return try word(page, offset).loadData()
    }

    public func write(page: Int, offset: Int, _ value: UInt64) throws(Errno) {
        reservation.lock()
        defer { reservation.unlock() }
        try word(page, offset).storeData(value)
    }

    private func word(_ page: Int, _ offset: Int) throws(Errno) -> AtomicWord {
        guard page >= 0, page < pages, offset >= 0, offset < Int(pageSize), offset & 7 == 0 else { throw .EINVAL }
        guard bringBack() else { throw .ENOMEM }
        guard let frame = frameLocked(page) else { throw .EINVAL }
        host.memory.willWrite(frame)
        return host.memory.word(at: frame.physicalAddress + UInt64(offset))
    }
}

extension MemoryObject {
    /// Copies a whole frame into a page of the object. Error: ENOMEM.
    func fill(_ index: Int, from source: HostFrame) throws(Errno) {
        guard case .page(let page) = take(index) else { throw .ENOMEM }
        host.memory.copy(source, to: host.memory.frame(of: page))
        host.memory.put(page)
    }
}
