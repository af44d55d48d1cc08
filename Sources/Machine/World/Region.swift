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
    }

    init(_ plan: RegionPlan, host: Host, addressSpace: AddressSpace) throws(Errno) {
        self.plan = plan
        guard let behind = Self.make(plan, host) else { throw .ENOMEM }
        self.behind = behind
        try addressSpace.map(
            at: plan.address, length: plan.size, protection: Protection(read: plan.read, write: plan.write),
            backing: Self.backing(plan, behind))
        if plan.hugePages { try addressSpace.advise(plan.address..<(plan.address + plan.size), .hugePage) }
    }

    private static func make(_ plan: RegionPlan, _ host: Host) -> Behind? {
        let pages = Int(plan.size >> pageShift)
        switch plan.kind {
        case .anonymous: return .nothing
        case .sharedMemory, .privateObject: return .object(MemoryObject(host: host, pages: pages))
        case .graphicsBuffer: return GraphicsBuffer(host, pages: pages, order: plan.order).map { .graphics($0) }
        case .deviceBAR: return DeviceBAR(host, pages: pages, filling: .byFault).map { .device($0) }
        case .reservedMemory: return ReservedMemory(host, pages: pages).map { .reserved($0) }
        case .countedPFNMap: return CountedPagesByFrame(host, pages: pages).map { .counted($0) }
        case .writeNotifyPFNMap: return EventRing(host, dataPages: pages - 1).map { .ring($0) }
        case .mixedMap: return MixedBuffer(host, pages: pages).map { .mixed($0) }
        }
    }

    private static func backing(_ plan: RegionPlan, _ behind: Behind) -> Backing {
        switch behind {
        case .nothing: .anonymous
        case .object(let object): .object(object, firstPage: 0, shared: plan.kind == .sharedMemory)
        case .graphics(let driver): .driver(driver)
        case .device(let driver): .driver(driver)
        case .reserved(let driver): .driver(driver)
        case .counted(let driver): .driver(driver)
        case .ring(let driver): .driver(driver)
        case .mixed(let driver): .driver(driver)
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

    func driverStore(_ offset: UInt64, _ value: UInt64) throws(Errno) {
        let (page, byte) = (Int(offset >> pageShift), Int(offset & (pageSize - 1)))
        switch behind {
        case .graphics(let buffer): try buffer.write(page: page, offset: byte, value)
        case .device(let device): device.write(page: page, offset: byte, value)
        case .object(let object): try object.write(page: page, offset: byte, value)
        default: throw .EINVAL
        }
    }

    func driverLoad(_ offset: UInt64) throws(Errno) -> UInt64 {
        let (page, byte) = (Int(offset >> pageShift), Int(offset & (pageSize - 1)))
        switch behind {
        case .graphics(let buffer): return try buffer.read(page: page, offset: byte)
        case .device(let device): return device.read(page: page, offset: byte)
        case .object(let object): return try object.read(page: page, offset: byte)
        default: throw .EINVAL
        }
    }

    /// Gives back what can be given back; the number of frames that the driver keeps until it is gone itself.
    func release() -> Int {
        switch behind {
        case .nothing, .device: return 0
        case .object(let object):
            object.truncate(to: 0)
            return 0
        case .graphics(let buffer):
            buffer.free()
            buffer.pool.shrink()
            return 0
        case .reserved(let driver): return driver.frames.count
        case .counted(let driver): return driver.frames.count
        case .ring(let driver): return driver.frames.count
        case .mixed(let driver): return driver.ownedFrames
        }
    }
}
