import Frames
import Synchrony
import Testing

@testable import HostMemory

/// Signals that come while a task waits for a page. Spec: generic 1.9, I-19.
@Suite struct SignalsEndWaits {
    let swap = SwapDevice(slots: 64, slow: true)
    let test: TestHost
    init() { test = TestHost(ramFrames: 1024, swap: swap) }

    /// A space of four pages whose faults nobody serves but `whenWaiting`.
    private func space(_ whenWaiting: @escaping (UserFaults, UserFaults.Message) -> Void) throws -> AddressSpace {
        let space = test.space()
        try space.mapPages(0, 4)
        let faults = UserFaults(of: space)
        try space.register(pages(0..<4), .missing, faults)
        faults.whenWaiting = { [unowned faults] in
            if let message = faults.nextMessage() { whenWaiting(faults, message) } else { faults.abandon() }
        }
        return space
    }

    private func get(_ space: AddressSpace, _ page: Int, interruptible: Bool) throws(GetUserPagesError) {
        let flags = LookupFlags(write: true, interruptible: interruptible)
        try space.getUserPageUnlocked(at(page), flags, holder: .getUserPages).releaseUnused()
    }

    @Test func `any signal ends an interruptible lookup that waits for another task`() throws {
        let space = try space { faults, _ in faults.space.signals.pending = true }
        defer { space.exit() }
        #expect(throws: GetUserPagesError.interrupted) { try get(space, 0, interruptible: true) }
        // Only a lookup that has to wait looks at it.
        space.signals.pending = false
        #expect(throws: GetUserPagesError.interrupted) { try get(space, 0, interruptible: true) }
    }

    @Test func `a lookup that is not interruptible waits on, until it is served`() throws {
        var asked = 0
        let space = try space { faults, message in
            asked += 1
            faults.space.signals.pending = true
            do { try faults.zero(message.address) } catch { Issue.record("serving failed: \(error)") }
        }
        defer { space.exit() }
        try get(space, 0, interruptible: false)
        #expect(asked == 1 && space.signals.pending)
        // A lookup that need not wait succeeds in spite of the signal.
        try get(space, 0, interruptible: true)
    }

    @Test func `a plain signal does not end a wait that only a fatal one may end`() throws {
        let space = try space { faults, _ in faults.space.signals.pending = true }
        defer { space.exit() }
        // Nobody serves it: the server that is asked again gives up.
        #expect(throws: GetUserPagesError.fault) { try get(space, 0, interruptible: false) }
    }

    @Test(arguments: [false, true])
    func `a fatal signal ends every wait`(_ interruptible: Bool) throws {
        let leaked = try test.leaked {
            let space = try space { faults, _ in faults.space.signals.fatal = true }
            #expect(throws: GetUserPagesError.interrupted) { try get(space, 0, interruptible: interruptible) }
            #expect(throws: GetUserPagesError.again) { try get(space, 0, interruptible: interruptible) }
            #expect(throws: UserFault.killed) { try space.access(at(1), store: nil) }
            #expect(throws: Errno.EINTR) { try space.store(at(1), 1) }
            space.exit()
        }
        #expect(leaked == 0)
    }

    @Test func `the same for the swap device, which a process's own access waits for`() throws {
        let space = test.space()
        defer { space.exit() }
        try space.mapPages(0, 2)
        for page in 0..<2 { try space.store(at(page), UInt64(page) + 1) }
        try space.advise(pages(0..<2), .pageOut)
        space.signals.pending = true
        #expect(throws: GetUserPagesError.interrupted) { try get(space, 0, interruptible: true) }
        try get(space, 0, interruptible: false)
        #expect(try space.load(at(1)) == 2)
        try space.advise(pages(0..<2), .pageOut)
        space.signals.fatal = true
        #expect(throws: UserFault.killed) { try space.access(at(1), store: nil) }
    }
}
