import Frames
import Synchrony

/// A device's view of a memfd: its pages, pinned for as long as the buffer lives, mapped by frame number in shared mappings.
/// Kernel: `/dev/udmabuf`, `UDMABUF_CREATE` (6.12 and later: `memfd_pin_folios`).
///
/// The memfd must be sealed against shrinking, so that no page of the buffer can lie beyond its end. A hole may be punched
/// all the same: the buffer keeps its pages, the memfd gets others, and the two no longer show the same bytes.
public final class Udmabuf: DriverMapping, @unchecked Sendable {
    // Unchecked: immutable, but for `isFreed`, which is touched only under `lock`.
    public let object: MemoryObject
    public let frames: [HostFrame]
    private let lock = SleepingLock(.buffer)
    private var isFreed = false
    private var memory: PhysicalMemory { object.host.memory }

    /// Pins `pages` of `object`, making what is absent. Errors: EINVAL without the seal, for no pages, or for pages beyond
    /// the end; ENOMEM; EHWPOISON.
    public init(_ object: MemoryObject, pages: Range<Int>) throws(Errno) {
        guard object.sealed.contains(.shrink), !pages.isEmpty, pages.lowerBound >= 0,
            pages.upperBound <= object.pages
        else { throw .EINVAL }
        var frames: [HostFrame] = []
        do throws(Errno) {
            for page in pages { frames.append(try Self.pin(page, of: object)) }
        } catch {
            Self.unpin(frames, object.host.memory)
            throw error
        }
        self.object = object
        self.frames = frames
        super.init(name: "udmabuf", flags: .frames)
        for frame in frames { claim(frame..<frame.advanced(by: 1)) }
    }

    deinit { if !isFreed { Self.unpin(frames, memory) } }

    /// The buffer goes: unmapped everywhere, then unpinned. Every fault is a SIGBUS from now on.
    /// Kernel: `release_udmabuf`, when the last descriptor and mapping are gone.
    public func free() {
        lock.lock()
        defer { lock.unlock() }
        guard !isFreed else { return }
        isFreed = true
        unmapMappings(pages: 0..<frames.count)
        for frame in frames where !relinquish(frame..<frame.advanced(by: 1), of: object.host) { return }
        Self.unpin(frames, memory)
    }

    private static func pin(_ index: Int, of object: MemoryObject) throws(Errno) -> HostFrame {
        let memory = object.host.memory
        while true {
            switch object.take(index) {
            case .page(let page):
                // The reference keeps the count above 0, so the pin can't fail; a second pin of the page counts again.
                let isPinned = memory.tryPin(page)
                memory.put(page)
                guard isPinned else { throw .ENOMEM }
                return memory.frame(of: page)
            case .mustWait: object.waitForPage(index)
            case .beyondEnd: throw .EINVAL
            case .outOfMemory: throw .ENOMEM
            case .poisoned: throw .EHWPOISON
            case .unreadable: throw .EIO
            }
        }
    }

    /// The device, or a process through its special entries, may have written: nothing else tells the object.
    private static func unpin(_ frames: [HostFrame], _ memory: PhysicalMemory) {
        for frame in frames {
            memory.mark(memory.page(frame), PageFlags.dirty(.driver))
            memory.unpin(memory.page(frame))
        }
    }

    /// Shared mappings only, of pages that the buffer has. Kernel: `mmap_udmabuf`.
    public override func mapped(_ space: AddressSpace, _ vma: VMAInfo) -> Errno? {
        let count = Int(vma.range.upperBound.page - vma.range.lowerBound.page)
        return vma.flags.shared && vma.firstPage + count <= frames.count ? nil : .EINVAL
    }

    /// Kernel: `udmabuf_vm_fault`.
    public override func fault(
        _ space: AddressSpace, _ vma: VMAInfo, _ address: UserAddress, write: Bool
    ) -> DriverFault {
        let page = vma.backingPage(of: address)
        lock.lock()
        defer { lock.unlock() }
        guard page < frames.count, !isFreed else { return .busError }
        return space.insertFrame(frames[page], at: address, in: vma)
    }

    /// The device's own access: 8 bytes at an aligned offset, while the buffer lives.
    public func read(page: Int, offset: Int) -> UInt64 { word(page, offset).loadData() }
    public func write(page: Int, offset: Int, _ value: UInt64) {
        memory.willWrite(frames[page])
        word(page, offset).storeData(value)
    }

    private func word(_ page: Int, _ offset: Int) -> AtomicWord {
        precondition(frames.indices.contains(page) && offset >= 0 && offset < Int(pageSize))
        return memory.word(at: frames[page].physicalAddress + UInt64(offset))
    }
}
