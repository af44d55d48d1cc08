import CBenchmarkLimits
import Machine
import SeededRandom

/// The host's tables, the guest's and the page frames of a guest, as the limit of faults touches them.
final class FaultLimit: @unchecked Sendable {
    // Unchecked: constant; what the memory holds is changed by atomic instructions, or with nobody else running.
    private let host: MappedArena
    private let guest: MappedArena
    private let pageFrames: MappedArena
    private let pages: Int

    init(pages: Int, seed: UInt64) throws(BenchmarkError) {
        var random = SplitMix(seed: seed)
        let frames = (0..<UInt32(pages)).shuffled(using: &random)
        let size = limit_radix_size(pages)
        guard let host = MappedArena(size: size, hugePages: true), let guest = MappedArena(size: size, hugePages: true),
            let pageFrames = MappedArena(size: pages * 64, hugePages: true)
        else { throw .noMemory("the limit's tables") }
        self.host = host
        self.guest = guest
        self.pageFrames = pageFrames
        self.pages = pages
        limit_radix_make(host.base, frames, pages)
        for page in 0..<pages { pageFrames.base.storeBytes(of: 1, toByteOffset: page * 64 + 8, as: UInt32.self) }
    }

    /// Nothing is mapped any more.
    func zapAll() { limit_radix_make(guest.base, nil, pages) }

    /// Faults on the pages of `order`. Returns how many installed an entry.
    func faults(_ order: UnsafeBufferPointer<UInt32>) -> Int {
        limit_faults(
            host.base, guest.base, pageFrames.base, order.baseAddress, order.count, Int32(X86Benchmark.sections))
    }

    /// The same of `orders`, each on a thread of its own.
    func faultInParallel(_ orders: [UnsafeBufferPointer<UInt32>]) -> ParallelWork.Result {
        ParallelWork.run(
            orders.map { part in
                nonisolated(unsafe) let order = part
                return { self.faults(order) }
            })
    }
}
