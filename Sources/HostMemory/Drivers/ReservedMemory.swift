import Frames

/// RAM that was set aside at boot and is mapped by frame number at mmap: every page frame is PG_reserved.
/// Kernel: `/dev/mem` over reserved memory, a carve-out's driver.
public final class ReservedMemory: DriverMapping, @unchecked Sendable {
    // Unchecked: immutable.
    public let frames: Range<HostFrame>

    /// Nil: no contiguous memory left.
    public init?(_ host: Host, pages: Int) {
        guard let frames = host.reserveFrames(pages) else { return nil }
        self.frames = frames
        super.init(name: "reserved memory", flags: .frames)
        claim(frames)
    }

    public override func mapped(_ space: AddressSpace, _ vma: VMAInfo) -> Errno? {
        let count = Int(vma.range.upperBound.page - vma.range.lowerBound.page)
        guard vma.firstPage + count <= frames.lowerBound.distance(to: frames.upperBound) else { return .EINVAL }
        for i in 0..<count {
            let frame = frames.lowerBound.advanced(by: vma.firstPage + i)
            let result = space.insertFrame(frame, at: vma.range.lowerBound + UInt64(i) * pageSize, in: vma)
            if result != .inserted { return .ENOMEM }
        }
        return nil
    }
}
