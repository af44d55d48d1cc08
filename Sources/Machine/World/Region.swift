import Frames
import HostMemory

/// A region of the plan, mapped, with the object or driver behind it.
struct Region {
    let plan: RegionPlan
    let behind: Behind

    enum Behind {
        case nothing
        case object(MemoryObject)
        case graphics(GraphicsBuffer)
        case device(DeviceBAR)
        case reserved(ReservedMemory)
        case counted(CountedPagesByFrame)
        case ring(EventRing)
        case mixed(MixedBuffer)
        case file(DAXFile)
        case pinned(Udmabuf)
        case window(BlobWindow)
        case huge(HugePageFile)
    }

    /// - Parameter graphics: who makes room for graphics buffers, if there is a limit.
    init(
        _ plan: RegionPlan, _ host: Host, _ graphics: GraphicsDevice?, _ pools: [HugePagePool], earlier: [Region],
        addressSpace: AddressSpace
    ) throws(Errno) {
        self.plan = plan
        if plan.kind == .blobWindow {
            let idle = Protection(read: plan.read, write: plan.write)
            behind = .window(try BlobWindow(in: addressSpace, at: plan.address, size: plan.size, idle: idle))
            return
        }
        if plan.kind == .udmabuf {
            let pinned = try Self.pin(plan, earlier)
            behind = .pinned(pinned)
            try addressSpace.map(
                at: plan.address, length: plan.size, protection: Protection(read: plan.read, write: plan.write),
                backing: .driver(pinned))
            return
        }
        guard let behind = Self.make(plan, host, graphics, pools) else { throw .ENOMEM }
        self.behind = behind
        try addressSpace.map(
            at: plan.address, length: plan.size, protection: Protection(read: plan.read, write: plan.write),
            backing: Self.backing(plan, behind))
        if plan.hugePages { try addressSpace.advise(plan.address..<(plan.address + plan.size), .hugePage) }
    }

    /// The memfd is sealed for it, as whoever gives it to udmabuf must.
    private static func pin(_ plan: RegionPlan, _ earlier: [Region]) throws(Errno) -> Udmabuf {
        guard let source = plan.source, earlier.indices.contains(source),
            case .object(let object) = earlier[source].behind
        else { throw .EINVAL }
        object.seal(.shrink)
        return try Udmabuf(object, pages: 0..<Int(plan.size >> pageShift))
    }

    private static func make(
        _ plan: RegionPlan, _ host: Host, _ graphics: GraphicsDevice?, _ pools: [HugePagePool]
    ) -> Behind? {
        let pages = Int(plan.size >> pageShift)
        switch plan.kind {
        case .anonymous: return .nothing
        case .sharedMemory, .privateObject: return .object(MemoryObject(host: host, pages: pages, slow: plan.slow))
        case .secretMemory: return .object(MemoryObject(host: host, pages: pages, secret: true))
        case .file, .privateFile:
            return .object(MemoryObject(host: host, file: Disk(pages: pages, slow: plan.slow), bytes: Int(plan.size)))
        case .graphicsBuffer:
            let buffer =
                graphics.map { GraphicsBuffer(device: $0, pages: pages, order: plan.order) }
                ?? GraphicsBuffer(host, pages: pages, order: plan.order)
            return buffer.map { .graphics($0) }
        case .deviceBAR: return DeviceBAR(host, pages: pages, filling: .byFault).map { .device($0) }
        case .reservedMemory: return ReservedMemory(host, pages: pages).map { .reserved($0) }
        case .countedPFNMap: return CountedPagesByFrame(host, pages: pages).map { .counted($0) }
        case .writeNotifyPFNMap: return EventRing(host, dataPages: pages - 1).map { .ring($0) }
        case .mixedMap: return MixedBuffer(host, pages: pages).map { .mixed($0) }
        case .daxFile: return DAXFile(host, pages: pages).map { .file($0) }
        case .hugeShared, .hugePrivate:
            guard let pool = pools.first(where: { $0.level == plan.pageLevel }) else { return nil }
            return .huge(HugePageFile(pool, pages: Int(plan.size / plan.pageLevel.bytes)))
        case .udmabuf, .blobWindow: return nil
        }
    }

    private static func backing(_ plan: RegionPlan, _ behind: Behind) -> Backing {
        switch behind {
        case .nothing, .window: .anonymous
        case .object(let object):
            .object(object, firstPage: 0, shared: plan.kind != .privateObject && plan.kind != .privateFile)
        case .graphics(let driver): .driver(driver)
        case .device(let driver): .driver(driver)
        case .reserved(let driver): .driver(driver)
        case .counted(let driver): .driver(driver)
        case .ring(let driver): .driver(driver)
        case .mixed(let driver): .driver(driver)
        case .file(let driver): .driver(driver)
        case .pinned(let driver): .driver(driver)
        case .huge(let file): .huge(file, firstPage: 0, shared: plan.kind == .hugeShared)
        }
    }

    // MARK: What a driver does on its own. EINVAL: this kind of memory can't.

    private func graphics() throws(Errno) -> GraphicsBuffer {
        guard case .graphics(let buffer) = behind else { throw .EINVAL }
        return buffer
    }

    func move(toDeviceMemory: Bool) throws(Errno) {
        try graphics().move(to: toDeviceMemory ? .deviceMemory : .system)
    }
    func evict() throws(Errno) { try graphics().evict() }
    func free() throws(Errno) { try graphics().free() }

    func disable() throws(Errno) {
        guard case .device(let device) = behind else { throw .EINVAL }
        device.disable()
    }

    func reset() throws(Errno) {
        guard case .device(let device) = behind else { throw .EINVAL }
        device.reset()
    }

    private var driver: DriverMapping? {
        switch behind {
        case .nothing, .object, .window, .huge: nil
        case .graphics(let driver): driver
        case .device(let driver): driver
        case .reserved(let driver): driver
        case .counted(let driver): driver
        case .ring(let driver): driver
        case .mixed(let driver): driver
        case .file(let driver): driver
        case .pinned(let driver): driver
        }
    }

    func failFaults(_ answer: DriverAnswer, count: Int) throws(Errno) {
        guard let driver else { throw .EINVAL }
        driver.forced.set(answer.fault, count: UInt32(clamping: count))
    }

    func mapBlob(_ resource: Region, at offset: UInt64) throws(Errno) {
        guard case .window(let window) = behind else { throw .EINVAL }
        switch resource.behind {
        case .graphics(let buffer): try window.map(.buffer(buffer), at: offset)
        case .object(let object): try window.map(.shared(object), at: offset)
        default: throw .EINVAL
        }
    }

    func unmapBlob(at offset: UInt64) throws(Errno) {
        guard case .window(let window) = behind else { throw .EINVAL }
        try window.unmap(at: offset)
    }

    /// Nobody waits for a page here: what would wait is EBUSY, since one task runs the steps.
    func truncate(to size: UInt64) throws(Errno) {
        guard size <= UInt64(Int32.max) << pageShift else { throw .EINVAL }
        let bytes = Int(size)
        switch behind {
        case .object(let object): try object.setSize(bytes)
        case .file(let file): try file.truncate(toPages: (bytes + Int(pageSize) - 1) >> Int(pageShift), .never)
        default: throw .EINVAL
        }
    }

    func punchHole(_ offset: UInt64, _ length: UInt64) throws(Errno) {
        let (end, overflow) = offset.addingReportingOverflow(length)
        guard !overflow else { throw .EINVAL }
        let pages = Int(offset >> pageShift)..<Int(end >> pageShift)
        switch behind {
        case .object(let object):
            if object.isSecret { throw .EOPNOTSUPP }
            object.punchHole(pages)
        case .file(let file): try file.punchHole(pages, .never)
        case .huge(let file): file.punchHole(smallPages: pages)
        default: throw .EINVAL
        }
    }

    func writeBack() throws(Errno) {
        if case .object(let object) = behind { return try object.writeBack() }
        guard case .file(let file) = behind else { throw .EINVAL }
        file.writeBack()
    }

    func driverStore(_ offset: UInt64, _ value: UInt64) throws(Errno) {
        let (page, byte) = (Int(offset >> pageShift), Int(offset & (pageSize - 1)))
        switch behind {
        case .graphics(let buffer): try buffer.write(page: page, offset: byte, value)
        case .device(let device): device.write(page: page, offset: byte, value)
        case .object(let object): try object.write(page: page, offset: byte, value)
        case .file(let file): try file.write(page: page, offset: byte, value)
        case .pinned(let buffer): buffer.write(page: page, offset: byte, value)
        default: throw .EINVAL
        }
    }

    func driverLoad(_ offset: UInt64) throws(Errno) -> UInt64 {
        let (page, byte) = (Int(offset >> pageShift), Int(offset & (pageSize - 1)))
        switch behind {
        case .graphics(let buffer): return try buffer.read(page: page, offset: byte)
        case .device(let device): return device.read(page: page, offset: byte)
        case .object(let object): return try object.read(page: page, offset: byte)
        case .file(let file): return try file.read(page: page, offset: byte)
        case .pinned(let buffer): return buffer.read(page: page, offset: byte)
        default: throw .EINVAL
        }
    }

    /// Gives back what can be given back; the number of frames that the driver keeps until it is gone itself.
    func release() -> Int {
        switch behind {
        case .nothing, .device, .window: return 0
        case .object(let object):
            object.truncate(to: 0)
            return 0
        case .huge(let file):
            file.free()
            return 0
        case .graphics(let buffer):
            buffer.free()
            buffer.pool.shrink()
            return 0
        case .reserved(let driver): return driver.frames.count
        case .counted(let driver): return driver.frames.count
        case .ring(let driver): return driver.frames.count
        case .mixed(let driver): return driver.ownedFrames
        case .file(let driver): return driver.deviceFrames.count
        case .pinned(let driver):
            driver.free()
            return 0
        }
    }
}

extension DriverAnswer {
    var fault: DriverFault {
        switch self {
        case .busError: .busError
        case .outOfMemory: .outOfMemory
        case .poisoned: .poisoned
        case .retry: .retry
        case .nothingInserted: .inserted
        }
    }
}
