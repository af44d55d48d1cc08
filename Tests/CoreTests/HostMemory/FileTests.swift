import Audit
import Frames
import Synchrony
import Testing

@testable import HostMemory

/// Files: a page cache over a disk.
@Suite struct Files {
    let test = TestHost(ramFrames: 1024, reclaims: true)
    let disk = Disk(pages: 16)

    private func mapped(_ file: MemoryObject, shared: Bool = true, _ rights: Protection = .readWrite) throws
        -> AddressSpace
    {
        let space = test.space()
        try space.map(
            at: at(0), length: 8 * pageSize, protection: rights, backing: .object(file, firstPage: 0, shared: shared))
        return space
    }

    @Test func `what is written through a mapping is on the disk after it was written back, not before`() throws {
        let file = MemoryObject(host: test.host, file: disk, bytes: 4 * 4096)
        let space = try mapped(file)
        defer { space.exit() }
        try space.store(at(1), 11)
        #expect(disk.word(page: 1, offset: 0) == 0)
        try file.writeBack()
        #expect(disk.word(page: 1, offset: 0) == 11)
    }

    @Test func `writing back takes the right to write away everywhere, and the next write is noticed`() throws {
        let file = MemoryObject(host: test.host, file: disk, bytes: 4 * 4096)
        let space = try mapped(file)
        defer { space.exit() }
        let listener = ListeningNotifier(space)
        space.register(listener)
        #expect(try space.load(at(0)) == 0)
        #expect(space.translate(at(0))?.writable == false)
        try space.store(at(0), 1)
        #expect(space.translate(at(0))?.writable == true && listener.calls.isEmpty)
        try file.writeBack()
        #expect(listener.calls.count == 2)
        #expect(space.translate(at(0))?.writable == false && space.translate(at(0))?.dirty == false)
        // Clean already: nothing changes, though the notifier is called, as the kernel does it before it looks.
        try file.writeBack()
        #expect(listener.calls.count == 4 && space.translate(at(0))?.writable == false)
        try space.store(at(0), 2)
        try file.writeBack()
        #expect(disk.word(page: 0, offset: 0) == 2)
        space.unregister(listener)
    }

    @Test func `clean pages are dropped and read again, dirty ones stay until they are written`() throws {
        let file = MemoryObject(host: test.host, file: disk, bytes: 4 * 4096)
        let space = try mapped(file)
        defer { space.exit() }
        for page in 0..<4 { try space.store(at(page), UInt64(page + 1)) }
        while test.host.reclaim(pages: 4) > 0 {}
        #expect((0..<4).allSatisfy { file.frame(of: $0) != nil })
        try file.writeBack()
        while test.host.reclaim(pages: 4) > 0 {}
        while test.host.reclaim(pages: 4) > 0 {}
        #expect((0..<4).allSatisfy { file.frame(of: $0) == nil })
        for page in 0..<4 { #expect(try space.load(at(page)) == UInt64(page + 1)) }
    }

    @Test func `a failed write is told once, a failed read is a bus error`() throws {
        let file = MemoryObject(host: test.host, file: disk, bytes: 4 * 4096)
        let space = try mapped(file)
        defer { space.exit() }
        try space.store(at(0), 1)
        disk.failNext(writes: 1)
        #expect(throws: Errno.EIO) { try file.writeBack() }
        try file.writeBack()
        disk.failNext(reads: 1)
        #expect(throws: UserFault.bus) { try space.access(at(2), store: nil) }
        #expect(try space.load(at(2)) == 0)
        disk.failNext(reads: 1)
        #expect(throws: Errno.EIO) { try file.read(page: 3, offset: 0) }
    }

    @Test func `a private mapping copies, and the file never learns of it`() throws {
        let file = MemoryObject(host: test.host, file: disk, bytes: 4 * 4096)
        try file.write(page: 0, offset: 8, 5)
        let space = try mapped(file, shared: false)
        defer { space.exit() }
        try space.store(at(0), 1)
        try file.writeBack()
        #expect(disk.word(page: 0, offset: 0) == 0 && disk.word(page: 0, offset: 8) == 5)
        #expect(try space.load(at(0)) == 1 && space.load(at(0) + 8) == 5)
    }

    @Test func `beyond the end is a bus error, behind it in its page are zeros`() throws {
        let file = MemoryObject(host: test.host, file: disk, bytes: 4096 + 100)
        let space = try mapped(file)
        defer { space.exit() }
        try space.store(at(1) + 200, 9)
        #expect(throws: UserFault.bus) { try space.access(at(2), store: nil) }
        file.truncate(toBytes: 4096 + 50)
        #expect(try space.load(at(1) + 200) == 0)
        file.truncate(toBytes: 3 * 4096)
        #expect(try space.load(at(2)) == 0)
    }

    @Test func `what was cut off does not come back from the disk`() throws {
        let file = MemoryObject(host: test.host, file: disk, bytes: 4 * 4096)
        try file.write(page: 2, offset: 0, 7)
        try file.writeBack()
        file.truncate(to: 2)
        file.truncate(to: 4)
        #expect(try file.read(page: 2, offset: 0) == 0)
        try file.write(page: 3, offset: 0, 8)
        try file.writeBack()
        file.punchHole(3..<4)
        #expect(try file.read(page: 3, offset: 0) == 0)
    }

    @Test func `a slow disk is waited for without the lock`() throws {
        let slow = Disk(pages: 4, slow: true)
        let file = MemoryObject(host: test.host, file: slow, bytes: 4 * 4096)
        let space = test.space()
        defer { space.exit() }
        try space.map(at: at(0), length: 4 * pageSize, protection: .readWrite, backing: .object(file))
        #expect(throws: GetUserPagesError.wouldBlock) {
            try space.getUserPageUnlocked(at(0), LookupFlags(noWait: true), holder: .getUserPages).releaseUnused()
        }
        #expect(try space.load(at(0)) == 0)
    }

    @Test func `secret memory is shared, locked, and not for execution; a child's is not locked`() throws {
        let object = MemoryObject(host: test.host, pages: 2, secret: true)
        let space = test.space()
        defer { space.exit() }
        #expect(throws: Errno.EINVAL) { try space.mapPages(0, 2, .object(object, shared: false)) }
        #expect(throws: Errno.EPERM) { try space.mapPages(0, 2, .object(object), .readExecute) }
        try space.mapPages(0, 2, .object(object))
        try space.store(at(0), 5)
        #expect(throws: Errno.EACCES) { try space.protect(pages(0..<1), .readExecute) }
        for advice in [
            Advice.dontNeed, .cold, .pageOut, .free, .remove, .populateRead, .populateWrite, .guardInstall, .collapse,
        ] {
            #expect(throws: Errno.EINVAL, "\(advice)") { try space.advise(pages(0..<2), advice) }
        }
        for advice in [Advice.guardRemove, .hugePage, .noHugePage, .mergeable, .unmergeable] {
            try space.advise(pages(0..<2), advice)
        }
        #expect(throws: Errno.EINVAL) { try object.setSize(4096) }
        let child = try space.fork()
        defer { child.exit() }
        try child.advise(pages(0..<2), .dontNeed)
        #expect(throws: Errno.EOPNOTSUPP) { try child.advise(pages(0..<2), .remove) }
        #expect(try child.load(at(0)) == 5)
    }

    @Test func `secret memory is its process's alone: no lookup, no reclaim`() throws {
        let object = MemoryObject(host: test.host, pages: 2, secret: true)
        let space = test.space()
        defer { space.exit() }
        try space.map(at: at(0), length: 2 * pageSize, protection: .readWrite, backing: .object(object))
        try space.store(at(0), 3)
        if let page = space.getUserPageFastOnly(at(0), write: false, holder: .getUserPages) {
            page.releaseUnused()
            Issue.record("the fast walk took a secret page")
        }
        #expect(throws: GetUserPagesError.fault) {
            try space.getUserPageUnlocked(at(0), LookupFlags(), holder: .getUserPages).releaseUnused()
        }
        while test.host.reclaim(pages: 2) > 0 {}
        #expect(try space.load(at(0)) == 3)
    }

    @Test func `a pin for long makes a private page of what a write would leave`() throws {
        let object = MemoryObject(host: test.host, pages: 1)
        try object.write(page: 0, offset: 0, 6)
        let space = test.space()
        defer { space.exit() }
        try space.map(at: at(0), length: pageSize, protection: .readWrite, backing: .object(object, shared: false))
        try space.mapPages(4, 1)
        for page in [0, 4] {
            let short = try space.pinUserPageUnlocked(at(page), LookupFlags(), holder: .getUserPages)
            #expect(short.frame == (page == 0 ? object.frame(of: 0) : test.host.zeroPage))
            short.unpin(dirty: false)
            let long = try space.pinUserPageUnlocked(at(page), LookupFlags(longTerm: true), holder: .getUserPages)
            #expect(long.frame != object.frame(of: 0) && long.frame != test.host.zeroPage)
            try space.store(at(page), 1)
            #expect(space.translate(at(page))?.frame == long.frame)
            long.unpin(dirty: false)
        }
    }
}

/// Every allocation of a run fails once: the right answer comes, and nothing is lost.
@Suite struct FailedAllocations {
    @Test func `whatever allocation fails, the call says so or does without, and nothing leaks`() throws {
        var number = 0
        var failures = 0
        while true {
            number += 1
            let swap = SwapDevice(slots: 64)
            let test = TestHost(ramFrames: 2048, thp: false, swap: swap)
            var reached = false
            let leaked = try test.leaked {
                test.memory.failAllocation(number)
                failures += try run(test)
                reached = !test.memory.allocationIsToFail
                test.memory.failAllocation(0)
            }
            #expect(leaked == 0, "allocation \(number)")
            #expect(swap.usedSlots == 0)
            if !reached { break }
        }
        #expect(number > 20 && failures > 10)
    }

    /// A life: memory, a file, fork, copies, swap, huge pages, exit. The calls that failed.
    private func run(_ test: TestHost) throws -> Int {
        var failed = 0
        func attempt(_ body: () throws(Errno) -> Void) {
            do throws(Errno) { try body() } catch {
                failed += 1
                // EAGAIN: the child shares pages that were to become one.
                #expect(error == .ENOMEM || error == .EAGAIN)
            }
        }
        let space = test.space()
        let object = MemoryObject(host: test.host, pages: 2)
        attempt { () throws(Errno) in
            try space.map(at: at(0), length: 1024 * pageSize, protection: .readWrite, backing: .anonymous)
        }
        attempt { () throws(Errno) in
            try space.map(at: at(2000), length: 2 * pageSize, protection: .readWrite, backing: .object(object))
        }
        for page in [0, 1, 513, 2000, 2001] { attempt { () throws(Errno) in try space.store(at(page), 1) } }
        var child: AddressSpace?
        attempt { () throws(Errno) in child = try space.fork() }
        for page in [0, 1, 513] { attempt { () throws(Errno) in try space.store(at(page), 2) } }
        attempt { () throws(Errno) in try space.advise(pages(0..<600), .pageOut) }
        for page in [0, 1, 513] { attempt { () throws(Errno) in _ = try space.load(at(page)) } }
        attempt { () throws(Errno) in try space.advise(pages(0..<512), .collapse) }
        attempt { () throws(Errno) in try space.advise(pages(1000..<1002), .guardInstall) }
        attempt { () throws(Errno) in try space.remap(pages(512..<514), length: 2 * pageSize, to: at(5000)) }
        child?.exit()
        space.exit()
        return failed
    }
}
