import Audit
import Frames
import Synchrony
import Testing

@testable import HostMemory

/// A driver's fault handler that fails: what each caller is told, and that the next attempt works. Spec: generic 1.9, 2.6.
@Suite struct DriversAnswersReachTheCaller {
    let test = TestHost(ramFrames: 1024, deviceFrames: 16)

    private func bar() throws -> (AddressSpace, DeviceBAR) {
        let space = test.space()
        let device = try #require(DeviceBAR(test.host, pages: 4, filling: .byFault))
        try space.mapPages(0, 4, .driver(device))
        return (space, device)
    }

    private func mixed() throws -> (AddressSpace, MixedBuffer) {
        let space = test.space()
        let buffer = try #require(MixedBuffer(test.host, pages: 4))
        try space.mapPages(0, 4, .driver(buffer))
        return (space, buffer)
    }

    private func get(_ space: AddressSpace, _ page: Int, poison: Bool = true) throws(GetUserPagesError) {
        let flags = LookupFlags(write: true, hardwarePoison: poison)
        try space.getUserPageUnlocked(at(page), flags, holder: .getUserPages).releaseUnused()
    }

    @Test(arguments: [
        (DriverFault.busError, UserFault.bus), (.outOfMemory, .outOfMemory), (.poisoned, .poisoned),
    ])
    func `the process gets a signal, once`(_ answer: DriverFault, _ signal: UserFault) throws {
        let (space, device) = try bar()
        defer { space.exit() }
        device.forced.set(answer, count: 1)
        #expect(throws: signal) { try space.access(at(0), store: 1) }
        #expect(try space.access(at(0), store: 1) == 1)
    }

    @Test(arguments: [(DriverFault.busError, Errno.EFAULT), (.outOfMemory, .ENOMEM), (.poisoned, .EFAULT)])
    func `a simulated fault fails and keeps the lock, however often it is asked`(
        _ answer: DriverFault, _ error: Errno
    ) throws {
        let (space, device) = try bar()
        defer { space.exit() }
        device.forced.set(answer, count: 2)
        // `unlocked` would say: look again. A driver that never has memory would then be asked for ever.
        for _ in 0..<2 {
            #expect(space.fixup(at(0), write: true) == FixupResult(error: error, unlocked: false))
        }
        #expect(space.fixup(at(0), write: true) == FixupResult(error: nil, unlocked: false))
    }

    @Test func `get-user-pages tells poison apart where it is wanted, and waits for a retry`() throws {
        let (space, buffer) = try mixed()
        defer { space.exit() }
        let answers: [(DriverFault, GetUserPagesError)] = [
            (.busError, .fault), (.outOfMemory, .noMemory), (.poisoned, .hardwarePoison),
        ]
        for (answer, error) in answers {
            buffer.forced.set(answer, count: 1)
            #expect(throws: error) { try get(space, 0) }
        }
        buffer.forced.set(.poisoned, count: 1)
        #expect(throws: GetUserPagesError.fault) { try get(space, 0, poison: false) }
        buffer.forced.set(.retry, count: 3)
        try get(space, 0)
        #expect(buffer.forced.next() == nil)
    }

    @Test func `done although it is not: asked again, and a breach when it goes on`() throws {
        let (space, buffer) = try mixed()
        defer { space.exit() }
        buffer.forced.set(.inserted, count: UInt32(DriverMapping.toleratedEmptyAnswers) - 1)
        try get(space, 0)
        #expect(test.journal.findings.isEmpty)
        buffer.forced.set(.inserted, count: UInt32(DriverMapping.toleratedEmptyAnswers))
        #expect(throws: GetUserPagesError.fault) { try get(space, 2) }
        #expect(test.journal.findings.map(\.invariant) == [.d1])
    }

    @Test func `a write to an entry that is read-only asks too`() throws {
        let space = test.space()
        defer { space.exit() }
        let ring = try #require(EventRing(test.host, dataPages: 1))
        try space.mapPages(0, 2, .driver(ring))
        _ = try space.access(at(0), store: nil)
        ring.forced.set(.busError, count: 1)
        #expect(throws: UserFault.bus) { try space.access(at(0), store: 1) }
        #expect(try space.access(at(0), store: 1) == 1)
    }

    @Test func `zero times: the driver works again`() throws {
        let (space, device) = try bar()
        defer { space.exit() }
        device.forced.set(.busError, count: 5)
        #expect(throws: UserFault.bus) { try space.access(at(0), store: 1) }
        device.forced.set(.busError, count: 0)
        #expect(try space.access(at(0), store: 1) == 1)
    }
}
