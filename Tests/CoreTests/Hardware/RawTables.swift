import Audit
import Frames
import Glibc
import Hardware
import HostMemory
import Testing

/// Physical memory for walker tests, of which only touched pages are committed. Tables are written by hand: no encoder
/// stands between the test and the bits.
final class RawTables {
    let memory: PhysicalMemory
    let journal = Journal()
    private let arena: UnsafeMutableRawPointer
    private let bytes: Int

    /// RAM is 16 frames; all else, up to `top`, is device memory, which needs no page frames.
    init(top: UInt64 = 0x100_0000) {
        bytes = Int(top)
        arena = mmap(nil, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
        precondition(arena != MAP_FAILED, "no address space for the arena")
        memory = PhysicalMemory(
            arena: arena, ramFrames: 16, deviceFrames: bytes / 4096 - 16, arenaIsZero: true, journal: journal)
    }

    deinit { munmap(arena, bytes) }

    /// The entry at a physical address, without scheduling points.
    subscript(_ address: UInt64) -> UInt64 {
        get { arena.load(fromByteOffset: Int(address), as: UInt64.self) }
        set { arena.storeBytes(of: newValue, toByteOffset: Int(address), as: UInt64.self) }
    }
}

/// Runs `body`, calling `point` at each scheduling point it passes, with the point's number from 0.
/// Returns how many there were.
@discardableResult
func withHook<R>(_ point: @escaping (Int) -> Void, _ body: () -> R) -> (result: R, points: Int) {
    var count = 0
    let task = TestTask { _, _ in
        defer { count += 1 }
        point(count)
    }
    let result = task.run(body).result
    return (result, count)
}

extension WalkResult {
    var translation: Translation? {
        guard case .translated(let translation) = self else { return nil }
        return translation
    }
    /// The fault, if the walk ended in an EPT violation or a guest-page fault.
    var violation: WalkFault? {
        guard case .violation(let fault) = self else { return nil }
        return fault
    }
    var misconfiguration: WalkFault? {
        guard case .misconfiguration(let fault) = self else { return nil }
        return fault
    }
}
