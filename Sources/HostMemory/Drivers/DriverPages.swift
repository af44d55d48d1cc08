import Frames
import Synchronization

/// Single pages that a driver allocated for itself, each with count 1. Kernel: `alloc_page` in a driver.
public final class DriverPages: @unchecked Sendable {
    // Unchecked: immutable after init, but for the atomic flag.
    let host: Host
    let memory: PhysicalMemory
    public let frames: [HostFrame]
    private let given = Atomic<Bool>(false)

    /// Pages of zeros. Nil: no memory.
    /// - Parameter areOfFile: a file's, which can be asked what they are.
    public init?(_ host: Host, count: Int, areOfFile: Bool = false) {
        self.host = host
        memory = host.memory
        var frames: [HostFrame] = []
        for _ in 0..<count {
            guard let frame = host.memory.allocatePages(order: 0) else {
                for taken in frames { host.memory.put(host.memory.page(taken)) }
                return nil
            }
            host.memory.clear(frame, count: 1)
            let flags = PageFlags.driver | (areOfFile ? 0 : PageFlags.withoutOwner)
            host.memory.page(frame).pointee.flags.bitwiseOr(flags, ordering: .relaxed)
            frames.append(frame)
        }
        self.frames = frames
    }

    /// Gives the pages back before the driver goes: it has unmapped them. Kernel: `__free_page`.
    /// - Parameter driver: who claimed them.
    public func free(from driver: DriverMapping) {
        for frame in frames where !driver.relinquish(frame..<frame.advanced(by: 1), of: host) { return }
        giveAll()
    }

    private func giveAll() {
        guard !given.exchange(true, ordering: .acquiringAndReleasing) else { return }
        for frame in frames { memory.put(memory.page(frame)) }
    }

    deinit { giveAll() }
}

extension DriverMapping {
    /// The driver maps these pages.
    public final func claim(_ pages: DriverPages) {
        for frame in pages.frames { claim(frame..<frame.advanced(by: 1)) }
    }
}

/// Ordinary counted pages mapped by frame number: the owner holds the only references, the entries none.
/// Kernel: a driver that gives `page_to_pfn(alloc_page())` to `vmf_insert_pfn`. Under the policy `guess` KVM takes
/// transient references on such pages; under `precise` their counts never move (Spec: generic 10.3).
public final class CountedPagesByFrame: DriverMapping, @unchecked Sendable {
    // Unchecked: immutable.
    private let pageFrames: DriverPages

    /// Nil: no memory.
    public init?(_ host: Host, pages: Int) {
        guard let owned = DriverPages(host, count: pages) else { return nil }
        pageFrames = owned
        super.init(name: "counted pages", flags: .frames)
        claim(owned)
    }

    public var frames: [HostFrame] { pageFrames.frames }

    public override func fault(
        _ space: AddressSpace, _ vma: VMAInfo, _ address: UserAddress, write: Bool
    ) -> DriverFault {
        let page = vma.backingPage(of: address)
        guard page < pageFrames.frames.count else { return .busError }
        return space.insertFrame(pageFrames.frames[page], at: address, in: vma)
    }
}

/// A ring whose entries are born read-only: page 0 becomes writable at the first write, the data pages never do.
/// Kernel: a perf_event ring (VM_PFNMAP | VM_IO, `pfn_mkwrite`). A guest that reads page 0 first and then writes it
/// never gets a writable entry (`spec/real-kvm.md`, the live finding).
public final class EventRing: DriverMapping, @unchecked Sendable {
    // Unchecked: immutable.
    /// When entries are made.
    public enum Filling: Sendable {
        /// One at each fault. Kernel: `perf_mmap_fault`, which later kernels have no more.
        case byFault
        /// All of them at mmap, which takes the ring as a whole, to be neither split nor inherited nor executed. Kernel:
        /// `perf_mmap` of Linux 6.18.
        case atMap
    }
    private let pageFrames: DriverPages
    public let filling: Filling

    /// One control page and `dataPages` of data. Nil: no memory.
    public init?(_ host: Host, dataPages: Int, filling: Filling = .byFault) {
        guard let owned = DriverPages(host, count: 1 + dataPages) else { return nil }
        pageFrames = owned
        self.filling = filling
        super.init(
            name: "event ring", flags: .framesOfDevice, wantsWriteNotification: true,
            refusals: filling == .atMap ? [.growth, .splits, .copies, .execution] : .growth)
        claim(owned)
    }

    public var frames: [HostFrame] { pageFrames.frames }

    public override func mapped(_ space: AddressSpace, _ vma: VMAInfo) -> Errno? {
        guard filling == .atMap else { return nil }
        let data = frames.count - 1
        guard vma.firstPage == 0, vma.pageCount == frames.count, data & (data - 1) == 0 else { return .EINVAL }
        describeData(bytes: data << pageShift)
        for (page, frame) in frames.enumerated() {
            let result = space.insertFrame(frame, at: vma.range.lowerBound + UInt64(page) * pageSize, in: vma)
            if result != .inserted { return .ENOMEM }
        }
        return nil
    }

    /// Tells where the data is; what else the kernel keeps in the control page is not modelled. Kernel:
    /// `perf_event_mmap_page.data_offset`, `data_size`.
    private func describeData(bytes: Int) {
        pageFrames.memory.willWrite(frames[0])
        pageFrames.memory.bytes(of: frames[0]).storeBytes(of: pageSize, toByteOffset: 0x410, as: UInt64.self)
        pageFrames.memory.bytes(of: frames[0]).storeBytes(of: UInt64(bytes), toByteOffset: 0x418, as: UInt64.self)
    }

    public override func fault(
        _ space: AddressSpace, _ vma: VMAInfo, _ address: UserAddress, write: Bool
    ) -> DriverFault {
        let page = vma.backingPage(of: address)
        guard filling == .byFault, page < pageFrames.frames.count, page == 0 || !write else { return .busError }
        return space.insertFrame(pageFrames.frames[page], at: address, in: vma)
    }

    public override func makeWritable(
        _ space: AddressSpace, _ vma: VMAInfo, _ address: UserAddress
    ) -> DriverFault {
        vma.backingPage(of: address) == 0 ? .inserted : .busError
    }
}

/// A mixed map: even pages are counted pages that get-user-pages can take, odd ones special entries for device frames,
/// which it can't (-EEXIST). Kernel: a VM_MIXEDMAP driver.
public final class MixedBuffer: DriverMapping, @unchecked Sendable {
    // Unchecked: immutable.
    private let pageFrames: DriverPages
    private let device: Range<HostFrame>
    public let pages: Int

    /// Nil: no memory, or not enough device frames.
    public init?(_ host: Host, pages: Int) {
        guard let device = host.memory.allocateDeviceFrames((pages + 1) / 2),
            let owned = DriverPages(host, count: (pages + 1) / 2)
        else { return nil }
        pageFrames = owned
        self.device = device
        self.pages = pages
        super.init(name: "mixed buffer", flags: .mixed)
        claim(owned)
        claim(device)
    }

    /// Frames of RAM that the driver allocated.
    public var ownedFrames: Int { pageFrames.frames.count }

    public func frame(of page: Int) -> HostFrame {
        page % 2 == 0 ? pageFrames.frames[page / 2] : device.lowerBound.advanced(by: page / 2)
    }

    public override func fault(
        _ space: AddressSpace, _ vma: VMAInfo, _ address: UserAddress, write: Bool
    ) -> DriverFault {
        let page = vma.backingPage(of: address)
        guard page < pages else { return .busError }
        if page % 2 == 0 { return space.insertPage(frame(of: page), at: address, in: vma) }
        return space.insertFrame(frame(of: page), at: address, in: vma)
    }
}
