import Frames
import Synchrony
import Testing

@testable import HostMemory

@Suite struct DeviceResets {
    let test = TestHost(ramFrames: 2048, deviceFrames: 2048)

    @Test(arguments: [DeviceBAR.Filling.byFault, .byHugeFault])
    func `a reset zaps every mapping, and faults bring them back`(filling: DeviceBAR.Filling) throws {
        let (space, other) = (test.space(), test.space())
        defer {
            space.exit()
            other.exit()
        }
        let bar = try #require(DeviceBAR(test.host, pages: 1024, filling: filling))
        try space.mapPages(0, 1024, .driver(bar))
        try other.mapPages(512, 512, .driver(bar, firstPage: 512))
        try space.store(at(700), 7)
        #expect(try other.load(at(700)) == 7)
        let listener = ListeningNotifier(space)
        space.register(listener)
        bar.reset()
        #expect(listener.calls.map(\.kind) == [.start, .end] && listener.calls.last?.present == 0)
        #expect(space.walk(at(700)) == nil && other.walk(at(700)) == nil)
        #expect(bar.read(page: 700, offset: 0) == 0)
        #expect(try space.load(at(700)) == 0 && other.load(at(700)) == 0)
        try space.store(at(700), 8)
        #expect(bar.read(page: 700, offset: 0) == 8)
        #expect(test.journal.findings.isEmpty)
    }

    @Test func `what was filled at mmap stays away until it is mapped again`() throws {
        let space = test.space()
        defer { space.exit() }
        let bar = try #require(DeviceBAR(test.host, pages: 2, filling: .atMap))
        try space.mapPages(0, 2, .driver(bar))
        bar.reset()
        #expect(throws: Errno.EFAULT) { try space.load(at(0)) }
        try space.map(
            at: at(0), length: 2 * pageSize, protection: .readWrite, backing: .driver(bar), replacing: true)
        #expect(try space.load(at(0)) == 0)
    }

    @Test func `a disabled device stays so over a reset: SIGBUS`() throws {
        let space = test.space()
        defer { space.exit() }
        let bar = try #require(DeviceBAR(test.host, pages: 2, filling: .byFault))
        try space.mapPages(0, 2, .driver(bar))
        bar.disable()
        bar.reset()
        #expect(throws: UserFault.bus) { try space.access(at(0), store: nil) }
        bar.enable()
        #expect(try space.load(at(0)) == 0)
    }

    /// Threads: what the process reads is never from the middle of a reset, in which the device's words differ.
    @Test func `no fault slips an entry into a reset`() async throws {
        let bar = try #require(DeviceBAR(test.host, pages: 4, filling: .byFault))
        let watcher = ResetWatcher(test.space(), bar)
        try watcher.space.mapPages(0, 4, .driver(bar))
        watcher.space.register(watcher)
        try await onThreads([
            { for _ in 0..<300 { bar.reset() } },
            { for turn in 0..<3000 { try watcher.space.store(at(turn % 4, 8), 1) } },
        ])
        #expect(watcher.entriesAtEnd == 0)
        watcher.space.unregister(watcher)
        watcher.space.exit()
        #expect(test.journal.findings.isEmpty)
    }
}

/// Counts entries that stand when a zap ends: the lock that keeps faults out is still held then.
private final class ResetWatcher: MMUNotifier, @unchecked Sendable {
    // Unchecked: only the resetting task's calls count, and they come one by one.
    let space: AddressSpace
    let bar: DeviceBAR
    var entriesAtEnd = 0
    init(_ space: AddressSpace, _ bar: DeviceBAR) {
        self.space = space
        self.bar = bar
    }
    override func invalidateRangeEnd(_ range: Range<UserAddress>, blockable: Bool) {
        for page in range.lowerBound.page..<range.upperBound.page
        where space.translate(UserAddress(page << pageShift)) != nil { entriesAtEnd += 1 }
    }
}
