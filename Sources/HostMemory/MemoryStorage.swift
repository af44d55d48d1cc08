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
    /// The page frames and free lists of a memory that nobody has used.
    private let pristine: UnsafeMutableRawPointer
    private(set) var heads: [UInt32] = []
    /// One past the last page frame that differs from its pristine state.
    var touched = 0
    var deviceNext: UInt64

    /// - Parameters:
    ///   - arena: page-aligned and zero, `(ramFrames + deviceFrames) * 4096` bytes, the caller's to keep.
    public init(arena: UnsafeMutableRawPointer, ramFrames: Int, deviceFrames: Int) {
        self.arena = arena
        self.ramFrames = ramFrames
        self.deviceFrames = deviceFrames
        frames = .allocate(capacity: ramFrames)
        let bytes = ramFrames * MemoryLayout<PageFrame>.stride
        pristine = .allocate(byteCount: bytes, alignment: 64)
        deviceNext = UInt64(ramFrames)
        let first = PhysicalMemory(
            arena: arena, ramFrames: ramFrames, deviceFrames: deviceFrames, arenaIsZero: true,
            pageFrameStorage: UnsafeMutableRawPointer(frames))
        heads = first.freeHeads
        // The frames outlive that first memory: they are trivial, and its end leaves the bytes alone.
        pristine.copyMemory(from: UnsafeRawPointer(frames), byteCount: bytes)
    }

    deinit {
        frames.deallocate()
        pristine.deallocate()
    }

    /// Makes everything new that was touched since the last time.
    func renew() {
        for i in 0..<touched where frames[i].flags.load(ordering: .relaxed) & PageFlags.knownZero == 0 {
            (arena + i << Int(pageShift)).initializeMemory(as: UInt64.self, repeating: 0, count: Int(pageSize / 8))
        }
        UnsafeMutableRawPointer(frames).copyMemory(from: pristine, byteCount: touched * MemoryLayout<PageFrame>.stride)
        let device = Int(deviceNext) - ramFrames
        if device > 0 {
            (arena + ramFrames << Int(pageShift)).initializeMemory(
                as: UInt64.self, repeating: 0, count: device * Int(pageSize / 8))
        }
        touched = 0
        deviceNext = UInt64(ramFrames)
    }
}
