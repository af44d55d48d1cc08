import Frames
import Synchrony

extension AddressSpace {
    /// The first VMA that intersects `range`, by address. `mmapLock` held. Kernel: `find_vma_intersection`.
    public func firstVMA(intersecting range: Range<UserAddress>) -> VMAInfo? {
        precondition(isHeld(.mmap), "find_vma_intersection without mmap_lock")
        let index = firstIndex(endingAfter: range.lowerBound)
        guard index < vmas.count, vmas[index].range.lowerBound < range.upperBound else { return nil }
        return vmas[index].info
    }
}
