import CBenchmarkLimits
import Frames
import Machine
import SeededRandom

/// The limit rows of the host: the bare memory traffic, in C, on memory of the same kind.
extension HostBenchmark {
    func measureLimits(_ samples: inout HostSamples) throws(BenchmarkError) {
        let memory = try HostBenchmarkMachine.mappings(pages << 12, hugePages: true)
        let wordBytes = pages * 8
        guard let parent = MappedArena(size: wordBytes, hugePages: true),
            let child = MappedArena(size: wordBytes, hugePages: true), let device = MappedArena(size: pages << 12),
            let tables = MappedArena(size: limit_tables_size(pages), hugePages: true)
        else { throw .noMemory("\(wordBytes >> 20) MiB of address space") }
        var random = SplitMix(seed: seed)
        let order = (0..<UInt32(pages)).shuffled(using: &random)
        let entries = parent.base.bindMemory(to: UInt64.self, capacity: pages)
        let copies = child.base.bindMemory(to: UInt64.self, capacity: pages)
        limit_make_tables(tables.base, order, pages)
        let same = [UInt32](repeating: order[0], count: pages)
        let any = (0..<UInt32(pages)).shuffled(using: &random)
        for round in 0..<rounds + 1 {
            func keep(_ operation: HostOperation, _ body: () -> Void) {
                samples.keep(operation, round > 0, pages, time(body).nanoseconds, isLimit: true)
            }
            keep(.faultZero) { limit_fault(entries, memory.pageFrames.base, memory.arena.base, pages) }
            keep(.faultCleared) { limit_clear(memory.arena.base, pages) }
            keep(.getUserPagesFault) { limit_clear(memory.arena.base, pages) }
            for i in 0..<pages { entries[i] = UInt64(order[i]) << 12 | 0x67 }
            keep(.fork) { limit_fork(entries, copies, memory.pageFrames.base, pages) }
            keep(.exit) { limit_exit(copies, memory.pageFrames.base, pages) }
            keep(.reclaim) { limit_copy(device.base, memory.arena.base, pages) }
            keep(.swapIn) { limit_copy(memory.arena.base, device.base, pages) }
            var found = 0
            keep(.getSamePage) { found += limit_get_pages(tables.base, memory.pageFrames.base, same, pages) }
            keep(.getRandomPage) { found += limit_get_pages(tables.base, memory.pageFrames.base, any, pages) }
            guard found == 2 * pages else { throw .wrongResult("the limit of get: \(found) of \(2 * pages) pages") }
        }
    }
}
