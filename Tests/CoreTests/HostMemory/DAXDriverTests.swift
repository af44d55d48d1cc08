import Audit
import Frames
import Synchrony
import Testing

@testable import HostMemory

@Suite struct DAXFiles {
    let test = TestHost(ramFrames: 1024)

    private func mapped(_ pages: Int = 8, _ protection: Protection = .readWrite) throws -> (DAXFile, AddressSpace) {
        let file = try #require(DAXFile(test.host, pages: pages))
        let space = test.space()
        try space.map(
            at: at(0), length: UInt64(pages) * pageSize, protection: protection, backing: .driver(file))
        return (file, space)
    }

    @Test func `its pages are counted: one for the device, one for each entry, one for each holder`() throws {
        let (file, space) = try mapped()
        defer { space.exit() }
        #expect(test.state(file.deviceFrames[2]).referenceCount == 1)
        #expect(try space.load(at(2)) == 0)
        #expect(test.state(file.deviceFrames[2]).referenceCount == 2)
        #expect(space.translate(at(2))?.special == false && space.walk(at(2)) == nil)
        let page = try space.getUserPageUnlocked(at(2), LookupFlags(write: true), holder: .getUserPages)
        #expect(page.frame == file.deviceFrames[2] && test.state(page.frame).referenceCount == 3)
        page.releaseUnused()
        guard let fast = space.getUserPageFastOnly(at(2), write: true, holder: .getUserPages) else {
            Issue.record("an ordinary page was refused")
            return
        }
        fast.releaseUnused()
        try space.unmap(pages(0..<8))
        #expect(test.state(file.deviceFrames[2]).referenceCount == 1)
    }

    @Test func `a read maps it read-only, the first write makes it dirty, fsync cleans and protects it`() throws {
        let (file, space) = try mapped()
        defer { space.exit() }
        let listener = ListeningNotifier(space)
        #expect(try space.load(at(1)) == 0)
        space.register(listener)
        #expect(space.translate(at(1))?.writable == false && file.dirtyPages.isEmpty)
        try space.store(at(1), 5)
        try space.store(at(3), 6)
        #expect(file.dirtyPages == [1, 3])
        #expect(space.translate(at(1))?.writable == true && space.translate(at(3))?.writable == true)
        #expect(listener.calls.isEmpty, "the frames stay: nothing to invalidate")
        file.writeBack()
        #expect(file.dirtyPages.isEmpty)
        #expect(listener.calls.map(\.first) == [at(1).page, at(1).page, at(3).page, at(3).page] && listener.isBalanced)
        for page in [1, 3] { #expect(space.translate(at(page)).map { !$0.writable && !$0.dirty } == true) }
        try space.store(at(3), 7)
        #expect(file.dirtyPages == [3])
        #expect(try file.read(page: 3, offset: 0) == 7 && file.read(page: 1, offset: 0) == 5)
    }

    @Test func `a read-only mapping never makes it dirty; a private one copies`() throws {
        let (file, space) = try mapped(8, .read)
        defer { space.exit() }
        #expect(throws: Errno.EFAULT) { try space.store(at(0), 1) }
        #expect(try space.load(at(0)) == 0)
        try space.mapPages(16, 8, .driver(file, shared: false))
        try file.write(page: 2, offset: 0, 9)
        try space.store(at(18, 8), 1)
        #expect(try space.load(at(18)) == 9 && file.read(page: 2, offset: 8) == 0)
        #expect(file.dirtyPages.isEmpty)
        try file.truncate(toPages: 0)
        #expect(throws: UserFault.bus) { try space.access(at(18), store: nil) }
    }

    @Test func `a held page is EBUSY, and the file stays as it was`() throws {
        let (file, space) = try mapped()
        defer { space.exit() }
        try space.store(at(4), 5)
        let pin = try space.pinUserPageFast(at(4), write: true, holder: .getUserPages)
        #expect(throws: Errno.EBUSY) { try file.truncate(toPages: 2, .never) }
        #expect(throws: Errno.EBUSY) { try file.punchHole(3..<5, .never) }
        #expect(file.pages == 8)
        #expect(try space.load(at(4)) == 5)
        try file.punchHole(5..<8, .never)
        pin.unpin(dirty: false)
        try file.truncate(toPages: 2, .never)
        #expect(throws: UserFault.bus) { try space.access(at(4), store: nil) }
        #expect(throws: UserFault.bus) { try space.access(at(2), store: 1) }
        #expect(try space.load(at(1)) == 0)
    }

    @Test func `truncate waits until the page is idle, with no lock that a fault needs`() async throws {
        let (file, space) = try mapped()
        defer { space.exit() }
        try space.store(at(4), 5)
        let held = PinBox(try space.pinUserPageFast(at(4), write: true, holder: .getUserPages))
        try await onThreads([
            { try file.truncate(toPages: 4) },
            {
                // The file isn't shorter before the pin goes.
                defer { held.unpin() }
                for _ in 0..<200 {
                    #expect(file.pages == 8)
                    _ = try space.load(at(4))
                }
            },
        ])
        #expect(file.pages == 4)
        #expect(throws: Errno.EFAULT) { try space.load(at(4)) }
    }

    @Test func `what comes back after a hole or a new end is zeros`() throws {
        let (file, space) = try mapped()
        defer { space.exit() }
        for page in 0..<8 { try space.store(at(page, 16), 1) }
        try file.punchHole(2..<4)
        try file.truncate(toPages: 6)
        try file.truncate(toPages: 8)
        #expect(try (0..<8).map { try space.load(at($0, 16)) } == [1, 1, 0, 0, 1, 1, 0, 0])
        #expect(file.dirtyPages == [0, 1, 4, 5])
        #expect(throws: Errno.ENOSPC) { try file.truncate(toPages: 9) }
        #expect(throws: Errno.EINVAL) { try file.truncate(toPages: -1) }
        #expect(throws: Errno.EINVAL) { try file.punchHole(7..<9) }
        #expect(throws: Errno.ENXIO) { try file.read(page: 8, offset: 0) }
        #expect(throws: Errno.ENXIO) { try file.write(page: -1, offset: 0, 1) }
    }

    @Test func `its pages go back to the host with the device alone`() throws {
        let space = test.space()
        let leaked = try test.leaked {
            let free = test.memory.freeFrames
            let file = try #require(DAXFile(test.host, pages: 8))
            #expect(test.memory.freeFrames == free - 8)
            try space.mapPages(0, 8, .driver(file))
            try space.store(at(1), 1)
            try file.truncate(toPages: 0)
            space.exit()
            #expect(test.memory.freeFrames == free - 8)
        }
        #expect(leaked == 0)
        #expect(test.journal.findings.isEmpty)
        #expect(DAXFile(test.host, pages: 5000) == nil)
    }

    @Test func `fork shares the file, and both are heard of`() throws {
        let (file, space) = try mapped()
        try space.store(at(1), 1)
        let child = try space.fork()
        #expect(try child.load(at(1)) == 1)
        try child.store(at(2), 2)
        #expect(try space.load(at(2)) == 2)
        #expect(file.dirtyPages == [1, 2])
        file.writeBack()
        #expect(child.translate(at(2))?.writable == false && space.translate(at(1))?.writable == false)
        child.exit()
        space.exit()
        #expect(file.deviceFrames.map { test.state($0).referenceCount } == Array(repeating: 1, count: 8))
    }
}

/// Carries a pin into another task.
private final class PinBox: @unchecked Sendable {
    // Unchecked: one task takes the pin out.
    private var pin: PagePin?
    init(_ pin: consuming PagePin) { self.pin = consume pin }
    func unpin() { pin.take()?.unpin(dirty: true) }
}
