import Frames
import Synchrony

/// A device's registers or memory, mapped by frame number: no page frame stands behind it. Kernel: a VFIO or sysfs BAR.
///
/// Mappings come by fault (but with `atMap`) and go when the device stops answering: `disable`, `reset`. Both hold
/// `memoryLock` for write over the zap, and a fault holds it for read over its check and its insertion, so none slips an
/// entry in between. A fault that comes during a reset sleeps until the reset is over and then finds the device's memory
/// as before it, enabled or not: SIGBUS where it is disabled. Kernel: `vfio_pci_zap_and_down_write_memory_lock`.
public final class DeviceBAR: DriverMapping, @unchecked Sendable {
    // Unchecked: `enabled` is touched only under `memoryLock`.
    /// When entries are made.
    public enum Filling: Sendable {
        /// All of them at mmap. Kernel: `remap_pfn_range`.
        case atMap
        /// One at each fault. Kernel: `vmf_insert_pfn`.
        case byFault
        /// 2 MiB at each fault where address and frame allow it. Kernel: `vmf_insert_pfn_pmd`.
        case byHugeFault
    }

    public let memory: PhysicalMemory
    public let frames: Range<HostFrame>
    public let filling: Filling
    /// Kernel: VFIO's `memory_lock`.
    private let memoryLock = ReadWriteLock(.buffer, spinning: false)
    private var enabled = true

    /// Nil: not enough device frames.
    public init?(_ host: Host, pages: Int, filling: Filling) {
        let alignment: PageLevel = filling == .byHugeFault ? .page2M : .page4K
        guard let frames = host.memory.allocateDeviceFrames(pages, alignment: alignment) else { return nil }
        memory = host.memory
        self.frames = frames
        self.filling = filling
        super.init(name: "device BAR", flags: .framesOfDevice)
        claim(frames)
    }

    public var pages: Int { frames.lowerBound.distance(to: frames.upperBound) }

    public override func mapped(_ space: AddressSpace, _ vma: VMAInfo) -> Errno? {
        let count = Int(vma.range.upperBound.page - vma.range.lowerBound.page)
        guard vma.firstPage + count <= pages else { return .EINVAL }
        guard filling == .atMap else { return nil }
        for i in 0..<count {
            let frame = frames.lowerBound.advanced(by: vma.firstPage + i)
            let result = space.insertFrame(frame, at: vma.range.lowerBound + UInt64(i) * pageSize, in: vma)
            if result != .inserted { return .ENOMEM }
        }
        return nil
    }

    /// Kernel: `vfio_pci_mmap_fault`. What was filled at mmap and is gone is not made again: SIGBUS.
    public override func fault(
        _ space: AddressSpace, _ vma: VMAInfo, _ address: UserAddress, write: Bool
    ) -> DriverFault {
        memoryLock.lockForRead()
        defer { memoryLock.unlockRead() }
        guard enabled, filling != .atMap else { return .busError }
        let page = vma.backingPage(of: address)
        guard page < pages else { return .busError }
        return space.insertFrame(frames.lowerBound.advanced(by: page), at: address, in: vma)
    }

    /// Kernel: `vfio_pci_mmap_huge_fault`.
    public override func hugeFault(
        _ space: AddressSpace, _ vma: VMAInfo, _ address: UserAddress, write: Bool
    ) -> DriverFault? {
        memoryLock.lockForRead()
        defer { memoryLock.unlockRead() }
        guard enabled, filling == .byHugeFault, vma.flags.shared else { return nil }
        let frame = frames.lowerBound.advanced(by: vma.backingPage(of: address))
        let first = frame.aligned(to: .page2M)
        guard (address.page ^ frame.number) & (PageLevel.page2M.frames - 1) == 0, first >= frames.lowerBound,
            first.advanced(by: 512) <= frames.upperBound
        else { return nil }
        return space.insertFrame(first, at: address.aligned(to: .page2M), in: vma, level: .page2M)
    }

    /// The device stops answering: every mapping goes, every fault is a SIGBUS. Kernel: `vfio_pci_zap_bars` after the
    /// memory-enable bit was cleared.
    public func disable() {
        memoryLock.lockForWrite()
        enabled = false
        unmapMappings(pages: 0..<pages)
        memoryLock.unlockWrite()
    }

    /// The device starts anew: every mapping goes, the memory reads as zeros, and the next faults make the mappings anew.
    /// With `atMap` nothing brings them back: a process has to map the BAR again. Whether the device answers stays as it
    /// was: the driver restores the memory-enable bit. Kernel: `vfio_pci_ioctl_reset`.
    public func reset() {
        memoryLock.lockForWrite()
        unmapMappings(pages: 0..<pages)
        memory.noteGivenBack(frames.lowerBound, count: pages)
        for frame in frames {
            memory.bytes(of: frame).initializeMemory(as: UInt64.self, repeating: 0, count: Int(pageSize / 8))
        }
        memoryLock.unlockWrite()
    }

    /// Faults are served again.
    public func enable() {
        memoryLock.lockForWrite()
        enabled = true
        memoryLock.unlockWrite()
    }

    /// The device's own view of its memory: 8 bytes at an aligned offset.
    public func read(page: Int, offset: Int) -> UInt64 { word(page, offset).loadData() }
    public func write(page: Int, offset: Int, _ value: UInt64) { word(page, offset).storeData(value) }

    private func word(_ page: Int, _ offset: Int) -> AtomicWord {
        precondition(page >= 0 && page < pages && offset >= 0 && offset < Int(pageSize))
        return memory.word(at: frames.lowerBound.advanced(by: page).physicalAddress + UInt64(offset))
    }
}
