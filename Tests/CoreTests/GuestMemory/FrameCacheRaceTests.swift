import Audit
import CSchedule
import Frames
import Machine
import Synchronization
import Synchrony
import Testing

@testable import GuestMemory
@testable import HostMemory

/// Runs actions at chosen points of an operation, one after another, and looks at every point in between.
///
/// A point counts where the running task holds no spinning lock. mmap_lock it may hold: who takes pages away by the reverse
/// map, reclaim for one, does not.
final class SteppingInterposer {
    private var steps: [(point: Int, action: () -> Void)]
    private let look: () -> Void
    private(set) var points = 0

    /// - Parameter steps: ascending.
    init(_ steps: [(point: Int, action: () -> Void)], look: @escaping () -> Void = {}) {
        self.steps = steps
        self.look = look
    }

    func run(_ body: () throws -> Void) rethrows {
        let held = try TestTask { [self] _, _ in pass() }.run(body).held
        #expect(held.isSound)
    }

    private func pass() {
        guard fl_held_current().pointee.atomic_depth == 0 else { return look() }
        TestTask.elsewhere {
            while let next = steps.first, next.point <= points {
                steps.removeFirst()
                next.action()
            }
            look()
        }
        points += 1
    }

    /// What the operation left undone.
    func finish() {
        for step in steps { step.action() }
        steps = []
    }
}

/// I-24, I-6: a cache holds nothing, and is never valid for a page that the process no longer maps.
@Suite struct I24_CachesHoldNothing {
    @Test(arguments: CacheKind.allCases)
    func `after a refresh the page's count is what it was, and the page may be freed at once`(kind: CacheKind) throws {
        let guest = TestGuest()
        try guest.addMemory(0, 1)
        try guest.space.store(at(0), 1)
        let frame = try #require(guest.frame(0))
        let cache = try guest.cache(kind, 0)
        #expect(guest.heldReferences == 0 && guest.test.journal.holdings.isEmpty)
        #expect(guest.test.state(frame).referenceCount == 1 && guest.test.state(frame).mapCount == 1)
        #expect(guest.test.events(.referenceTaken).count == guest.test.events(.referenceDropped).count)
        #expect(guest.test.events(.referenceTaken).allSatisfy { $0.holder == .frameCache })
        try guest.space.advise(pages(0..<1), .dontNeed)
        #expect(guest.test.state(frame).referenceCount == 0)
        cache.deactivate()
    }

    @Test func `I-17: an idle cache does not keep a page from moving`() throws {
        let guest = TestGuest(reclaims: true)
        try guest.addMemory(0, 1)
        try guest.space.store(at(0), 5)
        let cache = try guest.cache(.guest, 0)
        let before = guest.frame(0)
        #expect(guest.test.host.migrate(guest.space, pages(0..<1)) == 1)
        #expect(guest.frame(0) != before && !cache.isUsable)
        try cache.withBytes(8) { #expect($0.load(as: UInt64.self) == 5) }
        cache.deactivate()
    }

    @Test func `the bytes are used with the lock held, and an invalidation waits for it`() async throws {
        let guest = TestGuest(keepsEvents: false)
        try guest.addMemory(0, 1)
        let cache = try guest.cache(.guest, 0)
        let (holds, isOver, mayEnd) = (Flag(), Flag(), Flag())
        try await onThreads([
            {
                try cache.withBytes(8) { bytes in
                    #expect(isHeld(.frameCache))
                    holds.raise()
                    while !mayEnd.isRaised {}
                    for round in 0..<1000 { bytes.store(UInt64(round)) }
                    #expect(!isOver.isRaised, "nobody may have the page before it is let go of")
                }
            },
            {
                while !holds.isRaised {}
                mayEnd.raise()
                try guest.space.advise(pages(0..<1), .dontNeed)
                isOver.raise()
            },
        ])
        #expect(cache.word() == nil)
        cache.deactivate()
    }

    @Test func `caches are invalidated before the guest's entries are, with mmu_lock free`() throws {
        let guest = TestGuest()
        try guest.addMemory(0, 1)
        let cache = try guest.cache(.guest, 0)
        guest.store(0, 1)
        let watch = ZapWatch { cache.isValid }
        guest.test.journal.observer = watch
        try guest.space.advise(pages(0..<1), .dontNeed)
        guest.test.journal.observer = nil
        #expect(watch.seen == [false])
        cache.deactivate()
    }

    // MARK: Every order

    /// Every place of an invalidation's start, change and end among the points of `operation`. Between the end of the start
    /// and the beginning of the end the cache must not be valid, whatever the point; afterwards it is valid at most for
    /// the page that is there.
    private func race(
        _ kind: CacheKind, inSlot: Bool, _ prepare: (TestGuest, FrameCache) throws -> Void,
        _ operation: (TestGuest, FrameCache) throws -> Void
    ) throws -> Int {
        var (runs, refused) = (0, 0)
        var bound = 0
        // The first run, with the invalidation after the end, counts the points.
        var triples = [(Int.max, Int.max, Int.max)]
        while let (s, p, e) = triples.popLast() {
            let guest = TestGuest(ramFrames: 128, deviceFrames: 16)
            try guest.space.mapPages(0, 1)
            if inSlot { try guest.setSlot(pages: 1) }
            try guest.space.store(at(0), 1)
            let cache = FrameCache(guest.vm)
            try prepare(guest, cache)
            let invalidation = SteppedInvalidation(guest.space, 0..<1)
            var runsNow = false
            let interposer = SteppingInterposer(
                [
                    (
                        s,
                        {
                            invalidation.start()
                            runsNow = true
                        }
                    ),
                    (p, { invalidation.change() }),
                    (
                        e,
                        {
                            runsNow = false
                            invalidation.end()
                        }
                    ),
                ],
                look: { if runsNow, cache.isValid { refused += 1 } })
            try interposer.run { try operation(guest, cache) }
            if bound == 0 {
                bound = interposer.points
                for s in 0...bound {
                    for p in s...bound { for e in p...bound { triples.append((s, p, e)) } }
                }
            }
            interposer.finish()
            #expect(refused == 0, "I-6: valid inside an invalidation: \(kind) \(s) \(p) \(e)")
            if cache.isUsable { #expect(cache.frame == guest.frame(0), "I-6: \(kind) \(s) \(p) \(e)") }
            #expect(guest.heldReferences == 0 && guest.vm.activeNotifierCount == 0)
            guest.check()
            cache.deactivate()
            #expect(guest.vm.cachedFrameCount == 0)
            runs += 1
            if refused > 0 { break }
        }
        return runs
    }

    private func notActive(_ guest: TestGuest, _ cache: FrameCache) {}

    @Test(arguments: CacheKind.allCases)
    func `an activation against an invalidation, in every order`(kind: CacheKind) throws {
        let runs = try race(kind, inSlot: true, notActive) { _, cache in try kind.activate(cache, 0) }
        #expect(runs > 100)
    }

    @Test(arguments: CacheKind.allCases)
    func `a refresh against an invalidation, in every order`(kind: CacheKind) throws {
        func outdated(_ guest: TestGuest, _ cache: FrameCache) throws {
            try kind.activate(cache, 0)
            guest.space.hintNUMA(pages(0..<1))
            #expect(!cache.isUsable)
        }
        let runs = try race(kind, inSlot: true, outdated) { _, cache in try cache.refresh(length: 8) }
        #expect(runs > 100)
    }

    @Test func `G1: memory that no slot shows, in every order`() throws {
        let runs = try race(.user, inSlot: false, notActive) { _, cache in try CacheKind.user.activate(cache, 0) }
        #expect(runs > 100)
    }

    @Test func `a deactivation against an invalidation, in every order`() throws {
        func active(_ guest: TestGuest, _ cache: FrameCache) throws { try CacheKind.guest.activate(cache, 0) }
        let runs = try race(.guest, inSlot: true, active) { _, cache in
            cache.deactivate()
            #expect(!cache.isUsable)
        }
        #expect(runs > 20)
    }

    @Test func `a cache that goes elsewhere is at no point valid for the bytes of the place it left`() throws {
        let guest = TestGuest()
        try guest.addMemory(0, 2)
        for page in 0..<2 { try guest.space.store(at(page), UInt64(page + 1)) }
        let cache = try guest.cache(.guest, 0)
        let interposer = SteppingInterposer([]) {
            guard !cache.lock.isWriteLocked, cache.isValid, let address = cache.userAddress else { return }
            #expect(cache.frame == guest.space.translate(address)?.frame)
        }
        try interposer.run { try cache.activate(gfn(1).address, length: 8) }
        #expect(cache.word() == 2)
        cache.deactivate()
    }

    /// The same by whole system calls of another thread.
    @Test(arguments: CacheKind.allCases, HostAction.allCases)
    func `whatever the host does at whatever point of a use, the bytes are the process's`(
        kind: CacheKind, action: HostAction
    ) throws {
        var point = 0
        while true {
            let guest = TestGuest(ramFrames: 128)
            try guest.addMemory(0, 2, log: true)
            try guest.space.store(at(0), 7)
            let cache = FrameCache(guest.vm)
            var children: [AddressSpace] = []
            defer { for child in children { child.exit() } }
            let interposer = Interposer(point) {
                #expect(throws: Never.self) { try action.perform(guest, &children) }
            }
            interposer.ignoring(.frameCacheRefresh)
            var failed = false
            var seen: UInt64 = 0
            interposer.run {
                do throws(Errno) {
                    try kind.activate(cache, 0)
                    try cache.withBytes(8) { bytes in
                        seen = bytes.load()
                        bytes.store(UInt64(8))
                    }
                } catch { failed = true }
            }
            defer { cache.deactivate() }
            guard interposer.hasFired else { break }
            let value = try guest.space.load(at(0))
            let forgets = action == .dontNeed || action == .remap
            if failed {
                #expect(action == .readOnly && value == 7, "point \(point)")
            } else {
                #expect(seen == 7 || (seen == 0 && forgets), "point \(point)")
                #expect(value == 8 || (value == 0 && forgets), "point \(point)")
            }
            for child in children { #expect(try [7, 8].contains(child.load(at(0)))) }
            #expect(guest.heldReferences == 0)
            guest.check()
            point += 1
        }
        #expect(point > 8)
    }

    // MARK: Real threads

    /// Pages that go back to the host are taken by another process, which fills them and looks whether they stay so: a
    /// write through a cache that is not valid any more would show there.
    @Test func `caches write only to memory that is theirs, while the host does what it likes`() async throws {
        let seed = UInt64.random(in: 1 ... .max)
        print("seed \(seed)")
        let guest = TestGuest(ramFrames: 256, keepsEvents: false)
        let other = guest.test.space()
        try other.mapPages(0, 32)
        try guest.addMemory(0, 8, log: true)
        try guest.space.mapPages(16, 8)
        let stop = Flag()
        let uses = Atomic<Int>(0)
        let writer: @Sendable (Int) throws -> Void = { number in
            var random = TestRandom(seed: seed &+ UInt64(number))
            let cache = FrameCache(guest.vm)
            var turn: UInt64 = 0
            while !stop.isRaised || turn < 200 {
                turn += 1
                let page = Int.random(in: 0..<8, using: &random)
                let isGuest = Bool.random(using: &random)
                do throws(Errno) {
                    try (isGuest ? CacheKind.guest : .user).activate(cache, isGuest ? page : 16 + page, offset: 8)
                    for _ in 0..<8 { try cache.withBytes(16) { $0.store(turn << 8 | 0x77, at: 8 * number) } }
                    uses.add(1, ordering: .relaxed)
                } catch {
                    // The process may not write now, or the slot is gone.
                    if error != .EFAULT { throw error }
                }
                if turn % 16 == 0 { cache.deactivate() }
            }
            cache.deactivate()
        }
        try await onThreads([
            { try writer(0) }, { try writer(1) },
            {
                var random = TestRandom(seed: seed &+ 10)
                for round in 0..<400 {
                    let page = Int.random(in: 0..<8, using: &random) + (Bool.random(using: &random) ? 0 : 16)
                    switch round % 8 {
                    case 0: try guest.space.fork().exit()
                    case 1:
                        try guest.space.protect(pages(page..<page + 1), .read)
                        try guest.space.protect(pages(page..<page + 1), .readWrite)
                    case 2: guest.space.hintNUMA(pages(page..<page + 1))
                    case 3:
                        try guest.deleteSlot()
                        try guest.setSlot(pages: 8, log: true)
                    default: try guest.space.advise(pages(page..<page + 1), .dontNeed)
                    }
                }
                stop.raise()
            },
            {
                while !stop.isRaised {
                    for page in 0..<32 { try other.store(at(page, 8), 0x1111) }
                    for page in 0..<32 {
                        for word in 1..<4 {
                            let value = try other.load(at(page, UInt64(8 * word)))
                            #expect(value == (word == 1 ? 0x1111 : 0), "seed \(seed)")
                        }
                    }
                    try other.advise(pages(0..<32), .dontNeed)
                }
            },
        ])
        #expect(uses.load(ordering: .relaxed) > 100)
        #expect(guest.heldReferences == 0 && guest.vm.cachedFrameCount == 0, "seed \(seed)")
        guest.check()
        other.exit()
    }
}

/// Asks its question whenever an entry is zapped.
private final class ZapWatch: EventObserver {
    private let question: () -> Bool
    private(set) var seen: [Bool] = []
    init(_ question: @escaping () -> Bool) { self.question = question }
    override func observe(_ event: Event) {
        if event.kind == .entryZapped { seen.append(question()) }
    }
}
