import Audit
import Frames
import Synchrony
import Testing

@testable import HostMemory

/// The host's own tasks beside processes on real threads: no byte is lost, no lock taken out of order, nothing left over.
@Suite struct BackgroundThreads {
    @Test func `two processes keep their bytes while their pages are reclaimed, moved, merged and collapsed`()
        async throws
    {
        let swap = SwapDevice(slots: 4096)
        let test = TestHost(ramFrames: 4096, keepsEvents: false, swap: swap)
        let free = test.memory.freeFrames
        let object = MemoryObject(host: test.host, pages: 64)
        let spaces = [test.space(), test.space()]
        for (number, space) in spaces.enumerated() {
            try space.map(at: at(0), length: 1024 * pageSize, protection: .readWrite, backing: .anonymous)
            try space.advise(pages(0..<1024), .mergeable)
            try space.advise(pages(0..<1024), .hugePage)
            try space.map(at: at(4096), length: 64 * pageSize, protection: .readWrite, backing: .object(object))
            for page in 0..<1024 { try space.store(at(page), UInt64(number << 32 | page)) }
        }
        let rounds = 40
        let (one, other) = (spaces[0], spaces[1])
        let host = test.host
        @Sendable func use(_ space: AddressSpace, _ number: Int) throws {
            for round in 0..<rounds {
                for page in stride(from: round % 7, to: 1024, by: 7) {
                    let value = UInt64(number << 32 | page)
                    let found = try space.load(at(page))
                    #expect(found == value, "process \(number), page \(page), round \(round)")
                    try space.store(at(page) + 8, value)
                }
                for page in 0..<64 where page % 2 == number { try space.store(at(4096 + page), UInt64(page)) }
            }
        }
        try await onThreads([
            { try use(one, 0) }, { try use(other, 1) },
            { for _ in 0..<rounds { host.reclaim(pages: 300) } },
            {
                for _ in 0..<rounds {
                    host.migrate(one, pages(0..<1024))
                    host.migrate(other, pages(0..<4160))
                }
            },
            {
                for _ in 0..<rounds / 4 {
                    host.mergeSamePages()
                    host.collapseHugePages()
                }
            },
        ])
        for (number, space) in spaces.enumerated() {
            for page in 0..<1024 { #expect(try space.load(at(page)) == UInt64(number << 32 | page)) }
        }
        for page in 0..<64 { #expect(try object.read(page: page, offset: 0) == UInt64(page)) }
        for space in spaces { space.exit() }
        object.truncate(to: 0)
        #expect(test.memory.freeFrames == free && swap.usedSlots == 0)
        #expect(test.journal.findings.isEmpty, "\(test.journal.findings)")
    }
}
