import Frames

/// Pages that the kernel uses for itself and may share with a process: no page table, in no list of reclaim.
extension Host {
    /// `count` frames of zeros, wherever they are. Nil, and nothing taken, when memory is used up. Kernel: `vzalloc`.
    public func allocateKernelPages(_ count: Int) -> [HostFrame]? {
        var frames: [HostFrame] = []
        for _ in 0..<count {
            guard let frame = memory.allocatePages(order: 0) else {
                freeKernelPages(frames)
                return nil
            }
            memory.clear(frame, count: 1)
            memory.willWrite(frame, count: 1)
            frames.append(frame)
        }
        return frames
    }

    /// Gives them back. Nobody may use them any more. Kernel: `vfree`.
    public func freeKernelPages(_ frames: [HostFrame]) {
        for frame in frames { memory.put(memory.page(frame)) }
    }
}
