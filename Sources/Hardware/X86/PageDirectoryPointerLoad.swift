import Frames
import HostMemory
import Synchrony

/// What loading the four pointers of PAE paging comes to.
public enum PageDirectoryPointerLoad: Sendable, Equatable {
    case loaded(PageDirectoryPointers)
    /// #GP: a present pointer has a reserved bit set. The registers stay as they were.
    case generalProtection
    /// Never `.translated`; the processor reports no linear address with it.
    case stageTwo(WalkResult)
    /// Outside of physical memory: this address.
    case outside(UInt64)
}

extension LegacyWalker {
    /// What the processor does when CR3 is written in PAE paging, or when PAE paging is switched on: all four pointers are
    /// read and judged. Source: Intel SDM volume 3, "PDPTE registers". Under EPT the loads count as reads, whether or not
    /// EPT keeps D ("Accessed and dirty flags for EPT"). Under NPT the processor loads nothing; a walk reads them.
    public func loadPageDirectoryPointers() -> PageDirectoryPointerLoad {
        let root = LegacyFormat.pointerTable(registers.cr3)
        let physical: UInt64
        switch tables {
        case .physical(let memory):
            guard memory.exists(HostFrame(root >> pageShift)) else { return .outside(root) }
            physical = root
        case .guest(let stage):
            let result = stage.walk(GuestAddress(root), .read)
            guard case .translated(let translation) = result else { return .stageTwo(result) }
            physical = translation.frame.physicalAddress | root & (pageSize - 1)
        }
        func pointer(_ index: UInt64) -> UInt64 { memory.word(at: physical + 8 * index).loadRacing() }
        let pointers = PageDirectoryPointers(pointer(0), pointer(1), pointer(2), pointer(3))
        for i in 0..<4 where pointers[i] & 1 != 0 && pointers[i] & format.reservedInPointer != 0 {
            return .generalProtection
        }
        return .loaded(pointers)
    }
}
