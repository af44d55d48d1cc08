import Frames
import Synchrony

/// A graphics driver's buffer object, as TTM keeps it: plain blocks of system memory, or device memory; mapped by
/// frame number (VM_PFNMAP, VM_IO), filled by faults. Kernel: `ttm_buffer_object`.
///
/// Places, and how a buffer comes there:
/// 1. *system*: blocks from the pool; where a buffer starts.
/// 2. *device memory*: `move`; frames without page frames.
/// 3. *swapped out*: `evict` from system memory, or a device that needs room; the next use brings it back to 1.
/// 4. *freed*: for good; every fault is a SIGBUS.
///
/// Each change of place happens under the reservation lock: unmap everywhere (notifiers hear it), copy the bytes, switch.
/// A fault takes that lock too, so none comes in between.
public final class GraphicsBuffer: DriverMapping, @unchecked Sendable {
    // Unchecked: `store` and `room` are touched only under `reservation`.
    public enum Place: Sendable, Equatable { case system, deviceMemory, swappedOut, freed }

    private enum Store {
        case system([HostFrame])
        case device(Range<HostFrame>)
        case swap(MemoryObject)
        case none
    }

    public let host: Host
    public let pool: GraphicsPool
    /// Who limits what it may take; nil: nobody.
    public let device: GraphicsDevice?
    /// Size, in pages.
    public let pages: Int
    /// The order of its blocks.
    public let order: Int
    /// Kernel: `dma_resv`.
    public let reservation = SleepingLock(.buffer)
    private var store: Store = .none
    /// What a fault found that could not bring the buffer back.
    private enum Room { case unknown, wanted, none }
    private var room = Room.unknown

    /// Neighbours that one fault maps at most. Kernel: `TTM_BO_VM_NUM_PREFAULT`.
    public static let prefault = 16

    /// Nil: no memory.
    public convenience init?(pool: GraphicsPool, pages: Int, order: Int) {
        self.init(pool, nil, pages: pages, order: order)
    }

    /// A buffer of `device`, which may move it out to make room for others. It lives until it is freed. Nil: no memory,
    /// even if all others go to swap.
    public convenience init?(device: GraphicsDevice, pages: Int, order: Int) {
        self.init(device.pool, device, pages: pages, order: order)
        device.note(self, .system)
    }

    private init?(_ pool: GraphicsPool, _ device: GraphicsDevice?, pages: Int, order: Int) {
        precondition(pages > 0 && order >= 0 && order <= PhysicalMemory.largestOrder)
        host = pool.host
        self.pool = pool
        self.device = device
        self.pages = pages
        self.order = order
        super.init(name: "graphics buffer", flags: .framesOfDevice)
        var blocks = takeBlocks()
        while blocks == nil, let device, device.swapOutOne(except: self) { blocks = takeBlocks() }
        guard let blocks else { return nil }
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
        return placeLocked
    }

    private var placeLocked: Place {
        switch store {
        case .system: .system
        case .device: .deviceMemory
        case .swap: .swappedOut
        case .none: .freed
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

    /// Kernel: `ttm_bo_vm_fault`. If another task holds the reservation, or other buffers must make room first, `mmapLock`
    /// is dropped and the fault retried.
    public override func fault(
        _ space: AddressSpace, _ vma: VMAInfo, _ address: UserAddress, write: Bool
    ) -> DriverFault {
        guard reservation.tryLock() else { return .retry }
        defer { reservation.unlock() }
        let first = vma.backingPage(of: address)
        guard first < pages else { return .busError }
        if case .none = store { return .busError }
        guard bringBack() else { return waitForRoom() }
        device?.note(self, placeLocked)
        let mapped = Int(vma.range.upperBound.page - address.page)
        for i in 0..<min(Self.prefault, pages - first, mapped) {
            guard let frame = frameLocked(first + i) else { return .busError }
            let result = space.insertFrame(frame, at: address + UInt64(i) * pageSize, in: vma)
            // Only the page that was asked for must succeed.
            if result != .inserted { return i == 0 ? result : .inserted }
        }
        return .inserted
    }

    /// Nothing here may be waited for with `mmapLock` and the reservation held: once others have been asked, and had
    /// nothing to give, it's out of memory. `reservation` held.
    private func waitForRoom() -> DriverFault {
        let asked = room == .none
        room = asked ? .unknown : .wanted
        return device == nil || asked ? .outOfMemory : .retry
    }

    public override func waitForRetry() {
        reservation.lock()
        let wanted = room == .wanted
        room = .unknown
        reservation.unlock()
        guard wanted, let device, !device.swapOutOne(except: self) else { return }
        reservation.lock()
        room = .none
        reservation.unlock()
    }

    /// Runs `step` with the reservation held. While it finds no memory, the reservation is dropped, and others make room.
    /// Kernel: `ttm_tt_populate` at its limit.
    private func reserving<Result>(_ step: () throws(Errno) -> Result) throws(Errno) -> Result {
        while true {
            reservation.lock()
            do throws(Errno) {
                let result = try step()
                device?.note(self, placeLocked)
                reservation.unlock()
                return result
            } catch {
                reservation.unlock()
                guard error == .ENOMEM, let device, device.swapOutOne(except: self) else { throw error }
            }
        }
    }

    // MARK: Moving

    /// Moves the buffer; its bytes come along. Where there is no room, others of its device make it. Errors: ENOMEM (no
    /// room there all the same: it stays), EINVAL for a freed buffer or a place that one can't move to.
    /// Kernel: `ttm_bo_validate`, `ttm_bo_handle_move_mem`.
    public func move(to place: Place) throws(Errno) {
        switch place {
        case .system: try reserving { () throws(Errno) in try moveToSystem() }
        case .deviceMemory: try moveToDeviceMemory()
        case .swappedOut, .freed: throw .EINVAL
        }
    }

    /// `reservation` held.
    private func moveToSystem() throws(Errno) {
        if case .none = store { throw .EINVAL }
        guard bringBack() else { throw .ENOMEM }
        guard case .device = store else { return }
        guard let blocks = takeBlocks() else { throw .ENOMEM }
        relocate(to: .system(blocks))
    }

    private func moveToDeviceMemory() throws(Errno) {
        switch place {
        case .freed: throw .EINVAL
        case .deviceMemory: return
        case .system, .swappedOut: try device?.takeDeviceMemory(pages, for: self)
        }
        do throws(Errno) {
            let moved = try reserving { () throws(Errno) in try takeDeviceFrames() }
            if !moved { device?.returnDeviceMemory(pages) }
        } catch {
            device?.returnDeviceMemory(pages)
            throw error == .ENOSPC ? .ENOMEM : error
        }
    }

    /// False: it is there already. Error: ENOSPC where no other buffer's going would help. `reservation` held.
    private func takeDeviceFrames() throws(Errno) -> Bool {
        if case .none = store { throw .EINVAL }
        if case .device = store { return false }
        guard bringBack() else { throw .ENOMEM }
        guard let range = host.memory.allocateDeviceFrames(pages) else { throw .ENOSPC }
        claim(range)
        relocate(to: .device(range))
        return true
    }

    /// Goes to system memory for another's sake. False: it wasn't in device memory any more. Error: ENOMEM.
    func leaveDeviceMemory() throws(Errno) -> Bool {
        try reserving { () throws(Errno) in
            guard case .device = store else { return false }
            try moveToSystem()
            return true
        }
    }

    /// Goes to swap for another's sake. False: it wasn't in system memory any more, or there is no swap.
    func leaveSystemMemory() -> Bool {
        reservation.lock()
        defer { reservation.unlock() }
        guard case .system = store else { return false }
        do throws(Errno) {
            try swapOut()
        } catch {
            return false
        }
        device?.note(self, .swappedOut)
        return true
    }

    /// Makes room: device memory is left for system memory, system memory for swap; a swapped-out buffer stays there.
    /// Errors: ENOMEM, EINVAL for a freed buffer. Kernel: `ttm_bo_evict`, `ttm_bo_swapout`.
    public func evict() throws(Errno) {
        try reserving { () throws(Errno) in
            switch store {
            case .none: throw .EINVAL
            case .swap: return
            case .device: try moveToSystem()
            case .system: try swapOut()
            }
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
        device?.note(self, .freed)
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
            guard let block = pool.takeBlock(order: order, for: self) else {
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
                pool.giveBlock(block, order: order, from: self)
            }
        case .device(let range):
            host.memory.noteGivenBack(range.lowerBound, count: pages)
            if relinquish(range, of: host) { device?.returnDeviceMemory(pages) }
        case .swap, .none: break
        }
    }

    // MARK: The driver's own access

    /// Reads 8 bytes as the device or its driver would. Errors: EINVAL outside the buffer or freed, ENOMEM.
    public func read(page: Int, offset: Int) throws(Errno) -> UInt64 {
        try reserving { () throws(Errno) in try word(page, offset).loadData() }
    }

    public func write(page: Int, offset: Int, _ value: UInt64) throws(Errno) {
        try reserving { () throws(Errno) in try word(page, offset).storeData(value) }
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
