import Audit
import Frames
import Synchrony
import Testing

@testable import HostMemory

/// Faults that another task of the process serves. Kernel: userfaultfd.
@Suite struct ServedFaults {
    let swap = SwapDevice(slots: 64)
    let test: TestHost
    init() { test = TestHost(ramFrames: 1024, swap: swap) }

    private func page(_ first: UInt64) -> [UInt64] { [first] + Array(repeating: 0, count: 511) }

    /// A space of four pages whose faults are served by `serve`, inline.
    private func served(
        _ modes: UserFaults.Modes, _ backing: Backing = .anonymous,
        _ serve: @escaping (UserFaults, UserFaults.Message) throws -> Void
    ) throws -> (AddressSpace, UserFaults) {
        let space = test.space()
        try space.map(at: at(0), length: 4 * pageSize, protection: .readWrite, backing: backing)
        let faults = UserFaults(of: space)
        try space.register(pages(0..<4), modes, faults)
        faults.whenWaiting = { [unowned faults] in
            while let message = faults.nextMessage() {
                do { try serve(faults, message) } catch { Issue.record("serving failed: \(error)") }
            }
        }
        return (space, faults)
    }

    @Test func `a page that is missing is the one that the server puts there`() throws {
        var seen: [UserFaults.Message] = []
        let (space, faults) = try served(.missing) { faults, message in
            seen.append(message)
            try page(message.address.page).withUnsafeBytes { try faults.copy($0.baseAddress!, to: message.address) }
        }
        defer { space.exit() }
        #expect(try space.load(at(1)) == at(1).page)
        try space.store(at(2) + 8, 5)
        #expect(try space.load(at(2)) == at(2).page && space.load(at(2) + 8) == 5)
        #expect(seen.map(\.address) == [at(1), at(2)] && seen.map(\.write) == [false, true])
        #expect(throws: Errno.EEXIST) { try faults.zero(at(1)) }
        try faults.zero(at(3))
        #expect(try space.load(at(3)) == 0)
        withExtendedLifetime(faults) {}
    }

    @Test func `get-user-pages waits for the server, and does not if it may not`() throws {
        let (space, faults) = try served(.missing) { faults, message in try faults.zero(message.address) }
        defer { space.exit() }
        #expect(throws: GetUserPagesError.wouldBlock) {
            try space.getUserPageUnlocked(at(0), LookupFlags(noWait: true), holder: .getUserPages).releaseUnused()
        }
        let found = try space.getUserPageUnlocked(at(0), LookupFlags(), holder: .getUserPages)
        #expect(found.frame == test.host.zeroPage)
        found.releaseUnused()
        withExtendedLifetime(faults) {}
    }

    @Test func `shared memory that is there is mapped by the server, in minor mode`() throws {
        let object = MemoryObject(host: test.host, pages: 4)
        try object.write(page: 1, offset: 0, 9)
        var modes: [UserFaults.Modes] = []
        let (space, faults) = try served([.missing, .minor], .object(object)) { faults, message in
            modes.append(message.mode)
            if message.mode == .minor {
                try faults.map(message.address)
            } else {
                try page(4).withUnsafeBytes { try faults.copy($0.baseAddress!, to: message.address) }
            }
        }
        defer { space.exit() }
        #expect(try space.load(at(1)) == 9 && space.load(at(2)) == 4)
        #expect(modes == [.minor, .missing])
        #expect(try object.read(page: 2, offset: 0) == 4)
        #expect(throws: Errno.EFAULT) { try faults.map(at(0)) }
    }

    @Test func `a write to a protected page goes to the server, across swap, migration and mprotect`() throws {
        var writes: [UserAddress] = []
        let (space, faults) = try served([.writeProtect]) { faults, message in
            writes.append(message.address)
            try faults.protect(message.address..<message.address + pageSize, false)
        }
        defer { space.exit() }
        for number in 0..<4 { try space.store(at(number), 1) }
        let listener = ListeningNotifier(space)
        space.register(listener)
        try faults.protect(pages(0..<4), true)
        #expect(listener.calls.count == 2)
        space.unregister(listener)
        try space.advise(pages(0..<1), .pageOut)
        test.host.migrate(space, pages(1..<2))
        try space.protect(pages(2..<3), .read)
        try space.protect(pages(2..<3), .readWrite)
        #expect(try (0..<4).allSatisfy { try space.load(at($0)) == 1 } && writes.isEmpty)
        for number in 0..<4 { try space.store(at(number), 2) }
        #expect(writes == (0..<4).map { at($0) })
        for number in 0..<4 { try space.store(at(number), 3) }
        #expect(writes.count == 4)
    }

    @Test func `a child's faults are its own`() throws {
        let (space, faults) = try served([.missing, .writeProtect]) { faults, message in
            try faults.zero(message.address)
        }
        defer { space.exit() }
        try faults.zero(at(0))
        let child = try space.fork()
        defer { child.exit() }
        try child.store(at(1), 1)
        #expect(try child.load(at(1)) == 1)
        withExtendedLifetime(faults) {}
    }

    @Test func `whoever is left without a server gets a bus error`() throws {
        let (space, faults) = try served(.missing) { faults, _ in faults.abandon() }
        defer { space.exit() }
        #expect(throws: UserFault.bus) { try space.access(at(0), store: nil) }
        withExtendedLifetime(faults) {}
    }

    @Test func `bad calls get Linux's errnos`() throws {
        let (space, faults) = try served(.missing) { _, _ in }
        defer { space.exit() }
        let other = UserFaults(of: space)
        #expect(throws: Errno.EBUSY) { try space.register(pages(0..<1), .missing, other) }
        #expect(throws: Errno.EINVAL) { try space.register(pages(0..<1), .minor, faults) }
        #expect(throws: Errno.EINVAL) { try space.register(pages(0..<1), [], faults) }
        #expect(throws: Errno.ENOMEM) { try space.register(pages(2..<8), .missing, faults) }
        #expect(throws: Errno.ENOENT) { try other.zero(at(0)) }
        #expect(throws: Errno.ENOENT) { try faults.protect(pages(0..<1), true) }
        #expect(throws: Errno.EINVAL) { try faults.zero(at(0) + 8) }
        try space.unregister(pages(0..<4))
        #expect(try space.load(at(0)) == 0)
    }
}
