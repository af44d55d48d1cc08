import Audit
import Frames
import Synchrony
import Testing

@testable import HostMemory

/// A small secondary MMU: it keeps what it translated, and drops it when it is told to. It obeys the retry rule, so
/// what it holds outside of an invalidation must always be what the primary table says. Spec: generic 3.4.
private final class ShadowMap: MMUNotifier, @unchecked Sendable {
    // Unchecked: everything is touched under `lock`.
    let lock = SpinLock(.mmu)
    private var frames: [UInt64: HostFrame] = [:]
    private var sequence = 0
    private var inProgress = 0

    func snapshot() -> Int {
        lock.lock()
        defer { lock.unlock() }
        return sequence
    }

    /// Installs and checks in one go. `verify` runs under the lock, with the entry installed.
    func install(_ page: UInt64, _ frame: HostFrame, _ snapshot: Int, verify: () -> Bool) -> Bool {
        lock.lock()
        defer { lock.unlock() }
        guard inProgress == 0, sequence == snapshot else { return true }
        frames[page] = frame
        return verify()
    }

    override func invalidateRangeStart(_ range: Range<UserAddress>, blockable: Bool) {
        lock.lock()
        inProgress += 1
        for page in range.lowerBound.page..<range.upperBound.page { frames[page] = nil }
        lock.unlock()
    }
    override func invalidateRangeEnd(_ range: Range<UserAddress>, blockable: Bool) {
        lock.lock()
        sequence += 1
        inProgress -= 1
        lock.unlock()
    }

    /// What is held for pages whose primary entry says otherwise. Nobody else runs.
    func stale(_ space: AddressSpace) -> [UInt64] {
        frames.filter { space.translate(UserAddress($0.key << pageShift))?.frame != $0.value }.map(\.key)
    }
}

@Suite struct Threads_I6_I7 {
    @Test(arguments: [11 as UInt64, 12, 13])
    func `what a secondary MMU holds is what the primary table says, whoever changes it`(seed: UInt64) async throws {
        let test = TestHost(ramFrames: 4096, deviceFrames: 4096, thp: seed == 13)
        let space = test.space()
        let shadow = ShadowMap()
        let buffer = try #require(GraphicsBuffer(test.host, pages: 8, order: 2))
        let object = MemoryObject(host: test.host, pages: 8)
        try space.mapPages(0, 512)
        try space.mapPages(512, 8, .driver(buffer))
        try space.mapPages(520, 8, .object(object))
        space.register(shadow)
        try await onThreads([
            { try Self.faultIn(space, shadow, seed) },
            { try Self.faultIn(space, shadow, seed &+ 100) },
            {
                var random = TestRandom(seed: seed &+ 200)
                for _ in 0..<300 {
                    let page = Int.random(in: 0..<16, using: &random)
                    switch Int.random(in: 0..<6, using: &random) {
                    case 0: try space.advise(pages(page..<page + 2), .dontNeed)
                    case 1:
                        try space.protect(pages(page..<page + 2), .read)
                        try space.protect(pages(page..<page + 2), .readWrite)
                    case 2: try space.fork().exit()
                    case 3: object.punchHole(page / 2..<page / 2 + 1)
                    case 4: try buffer.move(to: page % 2 == 0 ? .system : .deviceMemory)
                    default: try space.store(at(page), UInt64(page))
                    }
                }
            },
        ])
        #expect(shadow.stale(space).isEmpty, "seed \(seed)")
        space.exit()
        buffer.free()
        #expect(test.journal.holdings.isEmpty, "seed \(seed)")
        #expect(test.journal.findings.isEmpty, "seed \(seed)")
    }

    private static func faultIn(_ space: AddressSpace, _ shadow: ShadowMap, _ seed: UInt64) throws {
        var random = TestRandom(seed: seed)
        for _ in 0..<600 {
            let page = Int.random(in: 0..<24, using: &random)
            let address = at(page < 16 ? page : 496 + page)
            let snapshot = shadow.snapshot()
            if page >= 16, page < 24, Bool.random(using: &random) {
                _ = space.fixup(address, write: false)
                guard let found = space.walk(address) else { continue }
                let same = shadow.install(address.page, found.frame, snapshot) {
                    space.translate(address)?.frame == found.frame
                }
                #expect(same, "seed \(seed)")
                continue
            }
            // Another task may just have taken the right to write away: then there is nothing to install.
            guard
                let reference = try? space.getUserPageUnlocked(
                    address, LookupFlags(write: page % 2 == 0), holder: .guestFault)
            else { continue }
            let frame = reference.frame
            let same = shadow.install(address.page, frame, snapshot) { space.translate(address)?.frame == frame }
            #expect(same, "seed \(seed)")
            reference.releaseUnused()
        }
    }

    @Test(arguments: [21 as UInt64, 22])
    func `pages are conserved while threads allocate, fork and fault`(seed: UInt64) async throws {
        let test = TestHost(ramFrames: 4096)
        let free = test.memory.freeFrames
        let space = test.space()
        try space.mapPages(0, 64)
        try await onThreads(
            (0..<3).map { worker in
                {
                    var random = TestRandom(seed: seed &+ UInt64(worker))
                    for round in 0..<200 {
                        let page = Int.random(in: 0..<64, using: &random)
                        switch (worker, round % 5) {
                        case (0, 0):
                            let child = try space.fork()
                            try child.store(at(page), 1)
                            child.exit()
                        case (1, 0): try space.advise(pages(page..<min(64, page + 9)), .dontNeed)
                        case (2, 0):
                            try space.pinUserPageFast(at(page), write: true, holder: .driver).unpin(dirty: true)
                        default: try space.store(at(page), UInt64(round))
                        }
                        _ = space.gives(at(page), write: false)
                    }
                }
            })
        space.exit()
        #expect(test.memory.freeFrames == free, "seed \(seed)")
    }
}
