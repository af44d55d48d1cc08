import CBenchmarkLimits
import Frames
import HostMemory
import Machine
import SeededRandom

/// A host with one process that has one anonymous mapping, for the benchmark of the host.
///
/// Arena and page frames lie on huge pages of this machine, as Linux's own do, and are committed before anything is timed:
/// this machine's page faults are not what is measured.
final class HostBenchmarkMachine {
    let memory: PhysicalMemory
    private let host: Host
    private let process: AddressSpace
    private let pages: Int
    private let arena: MappedArena
    private let pageFrames: MappedArena
    /// Heap bytes of the empty host.
    let objectsAtStart: Int
    private let framesAtStart: Int
    private static let user = UserAddress(0x7f00_0000_0000)

    static func mappings(
        _ ram: Int, hugePages: Bool = false
    ) throws(BenchmarkError) -> (arena: MappedArena, pageFrames: MappedArena) {
        guard let arena = MappedArena(size: ram, hugePages: hugePages),
            let pageFrames = MappedArena(size: ram / Int(pageSize) * 64, hugePages: hugePages)
        else { throw .noMemory("\(ram >> 20) MiB of address space") }
        return (arena, pageFrames)
    }

    /// - Parameters:
    ///   - ram: bytes; nil: enough for the pages, twice their tables, and some room.
    ///   - commits: whether this machine's memory is to be there before anything is timed.
    init(
        ram: Int? = nil, pages: Int, arenaIsZero: Bool = true, commits: Bool = true, swaps: Bool = false
    ) throws(BenchmarkError) {
        let ram = ram ?? (pages + pages / 64 + 4096) << 12
        (arena, pageFrames) = try Self.mappings(ram, hugePages: commits)
        if commits {
            for place in stride(from: 0, to: arena.size, by: 4096) {
                arena.base.storeBytes(of: 0, toByteOffset: place, as: UInt64.self)
            }
            for place in stride(from: 0, to: pageFrames.size, by: 4096) {
                pageFrames.base.storeBytes(of: 0, toByteOffset: place, as: UInt64.self)
            }
        }
        let heap = limit_heap_bytes()
        self.pages = pages
        memory = PhysicalMemory(
            arena: arena.base, ramFrames: ram >> 12, arenaIsZero: arenaIsZero, pageFrameStorage: pageFrames.base)
        host = Host(memory: memory, transparentHugePages: false, swap: swaps ? SwapDevice(slots: pages) : nil)
        process = AddressSpace(host: host)
        framesAtStart = memory.freeFrames
        do throws(Errno) { try Self.map(process, pages) } catch { throw .wrongResult("mmap: \(error)") }
        do throws(Errno) {
            if !commits { try process.store(Self.user, 1) }
        } catch { throw .wrongResult("the first store: \(error)") }
        objectsAtStart = max(0, limit_heap_bytes() - heap)
    }

    deinit { process.exit() }

    private static func map(_ process: AddressSpace, _ pages: Int) throws(Errno) {
        try process.map(at: user, length: UInt64(pages) << 12, protection: .readWrite, backing: .anonymous)
    }

    private func address(_ page: UInt32) -> UserAddress { Self.user + UInt64(page) << pageShift }

    /// Gives all pages back and maps the same stretch again.
    func unmapAndMap() throws(BenchmarkError) {
        do throws(Errno) {
            try process.unmap(Self.user..<Self.user + UInt64(pages) << 12)
            try Self.map(process, pages)
        } catch { throw .wrongResult("munmap, mmap: \(error)") }
    }

    /// One store to each page, in the order of addresses. Nanoseconds.
    func storeAll() throws(BenchmarkError) -> Double {
        try store(0..<UInt32(pages))
    }

    /// Makes every page, so that neighbours are strangers in physical memory.
    func fill(shuffledBy random: inout SplitMix) throws(BenchmarkError) {
        _ = try store((0..<UInt32(pages)).shuffled(using: &random))
    }

    private func store(_ order: some Sequence<UInt32>) throws(BenchmarkError) -> Double {
        do throws(Errno) {
            return try time { () throws(Errno) in
                for page in order { try process.store(address(page), UInt64(page)) }
            }.nanoseconds
        } catch { throw .wrongResult("a store: \(error)") }
    }

    /// Gets each page for writing, which faults it in. Nanoseconds.
    func getAll() throws(BenchmarkError) -> Double {
        var flags = LookupFlags()
        flags.write = true
        do throws(GetUserPagesError) {
            return try time { () throws(GetUserPagesError) in
                for page in 0..<UInt32(pages) {
                    try process.getUserPageUnlocked(address(page), flags, holder: .getUserPages).releaseUnused()
                }
            }.nanoseconds
        } catch { throw .wrongResult("get_user_pages_unlocked: \(error)") }
    }

    /// Gets `pages` without locks, one after another, and releases each. Nanoseconds.
    func get(_ pages: [UInt32]) throws(BenchmarkError) -> Double {
        var missed = 0
        let elapsed = time {
            for page in pages {
                guard let reference = process.getUserPageFastOnly(address(page), write: true, holder: .getUserPages)
                else {
                    missed += 1
                    continue
                }
                reference.releaseUnused()
            }
        }.nanoseconds
        guard missed == 0 else { throw .wrongResult("get_user_page_fast_only: \(missed) of \(pages.count) missed") }
        return elapsed
    }

    /// Takes every page to the swap device. Nanoseconds.
    func reclaimAll() throws(BenchmarkError) -> Double {
        var freed = 0
        let elapsed = time {
            var last = 1
            while freed < pages, last > 0 {
                last = host.reclaim(pages: pages - freed)
                freed += last
            }
        }.nanoseconds
        guard freed == pages, host.swap?.usedSlots == pages else {
            throw .wrongResult("reclaim: \(freed) of \(pages) pages")
        }
        return elapsed
    }

    /// One load of each page, whose value is what was stored. Nanoseconds.
    func loadAll() throws(BenchmarkError) -> Double {
        var wrong = 0
        do throws(Errno) {
            let elapsed = try time { () throws(Errno) in
                for page in 0..<UInt32(pages) where try process.load(address(page)) != UInt64(page) { wrong += 1 }
            }.nanoseconds
            guard wrong == 0 else { throw .EIO }
            return elapsed
        } catch { throw .wrongResult("loads after reclaim: \(wrong) pages differ, \(error)") }
    }

    /// A fork, and the end of the child. Afterwards every page is the parent's own again, so that the next fork has as
    /// much to do. Nanoseconds.
    func forkAndExit() throws(BenchmarkError) -> (fork: Double, exit: Double) {
        do throws(Errno) {
            let forked = try time { () throws(Errno) in try process.fork() }
            let exit = time { forked.result.exit() }.nanoseconds
            _ = forked.result
            do throws(BenchmarkError) { _ = try storeAll() } catch { throw .EFAULT }
            return (forked.nanoseconds, exit)
        } catch { throw .wrongResult("fork: \(error)") }
    }

    /// What the host holds now that every page is there.
    func footprint(objects: Int) -> HostFootprint {
        let tables = framesAtStart - memory.freeFrames - pages
        return HostFootprint(
            modelled: pages << 12, pageFrames: pages * 64, pageTables: tables << 12, objects: objects)
    }
}
