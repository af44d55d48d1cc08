import Audit
import Frames
import HostMemory
import Synchrony
import Testing

/// A host with an arena of its own, for tests. Its journal is on. It checks the lock order when it goes.
final class TestHost {
    let arena: UnsafeMutableRawPointer
    let journal: Journal
    let memory: PhysicalMemory
    let host: Host

    /// - Parameter thp: huge pages in every suitable anonymous VMA; else only where advised.
    /// - Parameter swap: a swap device, with which the host reclaims.
    init(
        ramFrames: Int = 1024, deviceFrames: Int = 0, thp: Bool = false, keepsEvents: Bool = true,
        swap: SwapDevice? = nil, reclaims: Bool = false
    ) {
        LockViolations.clear()
        let bytes = (ramFrames + deviceFrames) * Int(pageSize)
        arena = UnsafeMutableRawPointer.allocate(byteCount: bytes, alignment: Int(pageSize))
        // Not zeros: whoever forgets to clear a frame is found out.
        arena.initializeMemory(as: UInt8.self, repeating: 0xa5, count: Int(pageSize))
        var filled = Int(pageSize)
        while filled < bytes {
            let part = min(filled, bytes - filled)
            (arena + filled).copyMemory(from: arena, byteCount: part)
            filled += part
        }
        journal = Journal(keepsEvents: keepsEvents)
        memory = PhysicalMemory(
            arena: arena, ramFrames: ramFrames, deviceFrames: deviceFrames, arenaIsZero: false, journal: journal)
        host = Host(memory: memory, transparentHugePages: thp, swap: swap, reclaims: reclaims)
    }

    deinit {
        let seen = LockViolations.ofCurrentTask()
        #expect(seen.order == 0 && seen.sleeping == 0, "lock order: \(seen)")
        arena.deallocate()
    }

    func space() -> AddressSpace { AddressSpace(host: host) }

    /// Frames that are neither free nor the host's own, once `body` has run: what it leaks.
    func leaked(_ body: () throws -> Void) rethrows -> Int {
        let before = memory.freeFrames
        try body()
        return before - memory.freeFrames
    }

    /// The events of `kind` since the run began.
    func events(_ kind: Event.Kind) -> [Event] { journal.events.filter { $0.kind == kind } }

    func state(_ frame: HostFrame) -> PageState { memory.inspect(frame)! }
}

/// Records what a notifier hears, and what the primary table held at the time.
final class ListeningNotifier: MMUNotifier, @unchecked Sendable {
    // Unchecked: tests call from one task at a time.
    struct Call: Equatable {
        enum Kind { case start, end }
        var kind: Kind
        var first: UInt64
        var pages: UInt64
        /// Entries present in the range when the call came.
        var present: Int
    }
    unowned let space: AddressSpace
    var calls: [Call] = []
    var released = 0
    var young = false

    init(_ space: AddressSpace) { self.space = space }

    private func note(_ kind: Call.Kind, _ range: Range<UserAddress>) {
        var present = 0
        for page in range.lowerBound.page..<range.upperBound.page
        where space.translate(UserAddress(page << pageShift)) != nil { present += 1 }
        calls.append(
            Call(
                kind: kind, first: range.lowerBound.page, pages: range.upperBound.page - range.lowerBound.page,
                present: present))
    }

    override func invalidateRangeStart(_ range: Range<UserAddress>, blockable: Bool) { note(.start, range) }
    override func invalidateRangeEnd(_ range: Range<UserAddress>, blockable: Bool) { note(.end, range) }
    override func clearYoung(_ range: Range<UserAddress>) -> Bool { young }
    override func release() { released += 1 }

    var starts: Int { calls.filter { $0.kind == .start }.count }

    /// Every start has its end, properly nested for one task.
    var isBalanced: Bool {
        var open: [Call] = []
        for call in calls {
            if call.kind == .start {
                open.append(call)
            } else {
                guard let last = open.popLast(), last.first == call.first, last.pages == call.pages else {
                    return false
                }
            }
        }
        return open.isEmpty
    }
}

/// The address of page `n` of a region that tests use.
func at(_ page: Int, _ offset: UInt64 = 0) -> UserAddress {
    UserAddress(0x7000_0000_0000 + UInt64(page) * pageSize + offset)
}
func pages(_ range: Range<Int>) -> Range<UserAddress> { at(range.lowerBound)..<at(range.upperBound) }

extension AddressSpace {
    /// Maps `count` pages at test page `page`.
    func mapPages(
        _ page: Int, _ count: Int, _ backing: Backing = .anonymous, _ protection: Protection = .readWrite
    ) throws(Errno) {
        try map(at: at(page), length: UInt64(count) * pageSize, protection: protection, backing: backing)
    }
}

/// A small deterministic generator (xorshift64*), so that a failing seed can be run again.
struct TestRandom: RandomNumberGenerator {
    var state: UInt64
    init(seed: UInt64) { state = seed | 1 }
    mutating func next() -> UInt64 {
        state ^= state >> 12
        state ^= state << 25
        state ^= state >> 27
        return state &* 0x2545_f491_4f6c_dd1d
    }
}
