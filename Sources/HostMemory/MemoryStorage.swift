import Frames
import Synchronization

/// Arena and page frames of one physical memory after another: what the last one touched is made new, and nothing else is
/// looked at. For whoever needs many small worlds, one at a time.
public final class MemoryStorage: @unchecked Sendable {
    // Unchecked: belongs to one `PhysicalMemory` at a time.
    let arena: UnsafeMutableRawPointer
    let ramFrames: Int
    let deviceFrames: Int
    let frames: UnsafeMutablePointer<PageFrame>
    /// One past the last page frame that was used. The watermark of the last `PhysicalMemory`.
    var touched = 0
    var deviceNext: UInt64

    /// - Parameters:
    ///   - arena: page-aligned and zero, `(ramFrames + deviceFrames) * 4096` bytes, the caller's to keep.
    public init(arena: UnsafeMutableRawPointer, ramFrames: Int, deviceFrames: Int) {
        self.arena = arena
        self.ramFrames = ramFrames
        self.deviceFrames = deviceFrames
        frames = PageFrame.allocateZeroed(ramFrames)
        deviceNext = UInt64(ramFrames)
    }

    deinit { frames.deallocate() }

    /// Makes everything new that was touched since the last time.
    func renew() {
        for i in 0..<touched where frames[i].flags.load(ordering: .relaxed) & PageFlags.written != 0 {
            (arena + i << Int(pageShift)).initializeMemory(as: UInt64.self, repeating: 0, count: Int(pageSize / 8))
        }
        PageFrame.zero(UnsafeMutableRawPointer(frames), touched)
        let device = Int(deviceNext) - ramFrames
        if device > 0 {
            (arena + ramFrames << Int(pageShift)).initializeMemory(
                as: UInt64.self, repeating: 0, count: device * Int(pageSize / 8))
        }
        touched = 0
        deviceNext = UInt64(ramFrames)
    }
}
