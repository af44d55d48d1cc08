import Frames
import Synchrony

/// The host-visible window of a virtual GPU: a BAR behind one slot, into which the VMM maps blob resources at offsets that
/// the guest chose. Kernel: none; it is the VMM's half of virtio-gpu's `VIRTIO_GPU_CMD_RESOURCE_MAP_BLOB`, with
/// `mmap(MAP_FIXED)` into the window, as QEMU, crosvm and libkrun do.
///
/// What is not mapped is reserved address space. Either it allows nothing, and a guest access is EFAULT; or it is private
/// memory of zeros, which KVM wants where it makes no slot over what can't be written (RISC-V).
///
/// Mapping and unmapping replace what the window shows in one call each, so KVM hears one invalidation, and no third party
/// can slip into a hole.
///
/// The resource may move, be evicted and be freed while it is mapped: its driver unmaps it, and the guest's next access
/// faults. A freed one stays in the window, and accesses fail, until it is unmapped.
public final class BlobWindow: @unchecked Sendable {
    // Unchecked: `placed` is touched only under `lock`.
    public enum Resource: Sendable {
        case buffer(GraphicsBuffer)
        /// Kernel: a dma-buf over a memfd, or guest-visible shared memory.
        case shared(MemoryObject)

        /// Bytes, whole pages.
        public var size: UInt64 {
            switch self {
            case .buffer(let buffer): UInt64(buffer.pages) * pageSize
            case .shared(let object): UInt64(object.pages) * pageSize
            }
        }
        fileprivate var backing: Backing {
            switch self {
            case .buffer(let buffer): .driver(buffer)
            case .shared(let object): .object(object)
            }
        }
        fileprivate func isSame(as other: Resource) -> Bool {
            switch (self, other) {
            case (.buffer(let mine), .buffer(let its)): mine === its
            case (.shared(let mine), .shared(let its)): mine === its
            default: false
            }
        }
    }

    private struct Placement {
        let offsets: Range<UInt64>
        let resource: Resource
        /// It is being taken out; its place is free when that is done.
        var leaves = false
    }

    public let space: AddressSpace
    public let address: UserAddress
    /// Bytes.
    public let size: UInt64
    /// What the reserved part allows.
    public let idle: Protection
    private let lock = SpinLock(.objectIndex)
    private var placed: [Placement] = []

    /// Reserves the window. Errors: those of `map`.
    public init(in space: AddressSpace, at address: UserAddress, size: UInt64, idle: Protection = .none) throws(Errno) {
        try space.map(at: address, length: size, protection: idle, backing: .anonymous)
        self.space = space
        self.address = address
        self.size = size
        self.idle = idle
    }

    /// Shows `resource` from `offset` on. Errors, checked in this order: EINVAL for an offset that is not page-aligned, a
    /// resource without pages, or one that doesn't fit; EBUSY where another is mapped, or if it is mapped already (virtio
    /// 1.3 allows one mapping each); those of mmap.
    public func map(_ resource: Resource, at offset: UInt64) throws(Errno) {
        let length = resource.size
        guard offset & (pageSize - 1) == 0, length > 0, offset <= size, length <= size - offset else { throw .EINVAL }
        guard reserve(Placement(offsets: offset..<(offset + length), resource: resource)) else { throw .EBUSY }
        do throws(Errno) {
            try show(resource.backing, .readWrite, offset..<(offset + length))
        } catch {
            forget(offset)
            throw error
        }
    }

    /// Takes out what was mapped at `offset`. Errors: ENOENT, if no mapping begins there; those of mmap, and then it stays.
    /// Kernel: `VIRTIO_GPU_CMD_RESOURCE_UNMAP_BLOB`.
    public func unmap(at offset: UInt64) throws(Errno) {
        guard let offsets = beginLeaving(offset) else { throw .ENOENT }
        do throws(Errno) {
            try show(.anonymous, idle, offsets)
        } catch {
            mark(offset, leaves: false)
            throw error
        }
        forget(offset)
    }

    /// Where resources are mapped, in the order in which they were.
    public var offsets: [Range<UInt64>] {
        lock.lock()
        defer { lock.unlock() }
        return placed.map { $0.offsets }
    }

    private func show(_ backing: Backing, _ protection: Protection, _ offsets: Range<UInt64>) throws(Errno) {
        try space.map(
            at: address + offsets.lowerBound, length: offsets.upperBound - offsets.lowerBound, protection: protection,
            backing: backing, replacing: true)
    }

    private func reserve(_ new: Placement) -> Bool {
        lock.lock()
        defer { lock.unlock() }
        for other in placed where other.offsets.overlaps(new.offsets) || other.resource.isSame(as: new.resource) {
            return false
        }
        placed.append(new)
        return true
    }

    private func beginLeaving(_ offset: UInt64) -> Range<UInt64>? {
        lock.lock()
        defer { lock.unlock() }
        guard let index = placed.firstIndex(where: { $0.offsets.lowerBound == offset && !$0.leaves }) else {
            return nil
        }
        placed[index].leaves = true
        return placed[index].offsets
    }

    private func mark(_ offset: UInt64, leaves: Bool) {
        lock.lock()
        for index in placed.indices where placed[index].offsets.lowerBound == offset { placed[index].leaves = leaves }
        lock.unlock()
    }

    private func forget(_ offset: UInt64) {
        lock.lock()
        let gone = placed.firstIndex { $0.offsets.lowerBound == offset }.map { placed.remove(at: $0) }
        lock.unlock()
        // The resource may go with it, which takes other locks.
        _ = gone
    }
}
