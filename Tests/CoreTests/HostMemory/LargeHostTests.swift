import Frames
import Glibc
import HostMemory
import Machine
import Testing

/// A host of 256 GiB on a machine that has far less. Issue: at most 50 ms and 100 MB; the limits here leave room for
/// unoptimised code on a busy machine, `faultline bench host` has the numbers.
@Suite struct LargeHost {
    static let bytes = 256 << 30

    /// Bytes of this process in the machine's memory. Nil: the kernel doesn't tell.
    static func residentBytes() -> Int? {
        let file = open("/proc/self/statm", O_RDONLY)
        guard file >= 0 else { return nil }
        defer { close(file) }
        var text = [UInt8](repeating: 0, count: 128)
        let length = read(file, &text, text.count)
        guard length > 0 else { return nil }
        let fields = text[..<length].split(separator: UInt8(ascii: " "))
        guard fields.count > 1, let pages = Int(String(decoding: fields[1], as: UTF8.self)) else { return nil }
        return pages * sysconf(Int32(_SC_PAGESIZE))
    }

    /// Whether the address space has room for it: an overcommit limit or `ulimit -v` may forbid.
    static var fits: Bool {
        residentBytes() != nil && MappedArena(size: bytes) != nil && MappedArena(size: bytes / 64) != nil
    }

    /// In a process of its own: other tests' memory would count too.
    @Test(.enabled(if: fits, "no room for 256 GiB of address space, or no /proc/self/statm"))
    func `a host of 256 GiB starts at once and takes next to no memory`() async {
        await #expect(processExitsWith: .success) {
            let before = try #require(LargeHost.residentBytes())
            let start = ContinuousClock.now
            let arena = try #require(MappedArena(size: LargeHost.bytes))
            let pageFrames = try #require(MappedArena(size: LargeHost.bytes / 64))
            defer { withExtendedLifetime((arena, pageFrames)) {} }
            let frames = LargeHost.bytes / Int(pageSize)
            let memory = PhysicalMemory(
                arena: arena.base, ramFrames: frames, arenaIsZero: true, pageFrameStorage: pageFrames.base)
            let host = Host(memory: memory, transparentHugePages: false)
            let space = AddressSpace(host: host)
            let address = UserAddress(1 << 40)
            try space.map(at: address, length: 64 << 30, protection: .readWrite, backing: .anonymous)
            for page in stride(from: 0, to: 16 << 20, by: 1 << 20) as StrideTo<UInt64> {
                try space.store(address + page << 12, page)
            }
            let elapsed = ContinuousClock.now - start
            let resident = try #require(LargeHost.residentBytes()) - before
            #expect(elapsed < .seconds(2))
            #expect(resident < 100 << 20, "\(resident) bytes")
            #expect(memory.freeFrames > frames - 100)
            #expect(try space.load(address + (15 << 20) << 12) == 15 << 20)
            space.exit()
        }
    }
}
