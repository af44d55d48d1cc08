import Frames
import HostMemory
import Synchronization

/// A frame in the kernel's own address space; it ends when it is dropped. No reference belongs to it: who maps says what
/// keeps the memory alive. Kernel: `kmap` where the frame has a page frame, else `memremap`.
struct KernelMapping: ~Copyable {
    let frame: HostFrame
    /// The first byte of the page. Kernel: `khva`, without its offset.
    let bytes: UnsafeMutableRawPointer
    private unowned(unsafe) let vm: VirtualMachine

    /// Nil: nothing there can be mapped.
    init?(_ frame: HostFrame, _ vm: VirtualMachine) {
        guard vm.canMap(frame) else { return nil }
        self.frame = frame
        bytes = vm.memory.bytes(of: frame)
        self.vm = vm
        vm.memory.willWrite(frame)
        vm.frameCaches.mappings.add(1, ordering: .relaxed)
    }

    deinit { vm.frameCaches.mappings.subtract(1, ordering: .relaxed) }
}

extension VirtualMachine {
    /// Whether `frame` can be mapped into the kernel's address space.
    func canMap(_ frame: HostFrame) -> Bool {
        memory.hasPageFrame(frame) || (remapsDeviceMemory && memory.exists(frame))
    }
}
