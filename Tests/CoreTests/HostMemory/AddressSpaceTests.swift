import Audit
import Frames
import Synchrony
import Testing

@testable import HostMemory

@Suite struct G3_1_NotifierPairs {
    let test = TestHost(ramFrames: 2048, deviceFrames: 64)

    @Test func `munmap tells once for all VMAs: present at the start, gone at the end`() throws {
        let space = test.space()
        defer { space.exit() }
        try space.mapPages(0, 4)
        try space.mapPages(4, 4, .anonymousShared)
        for page in 0..<8 { try space.store(at(page), 1) }
        let listener = ListeningNotifier(space)
        space.register(listener)
        try space.unmap(pages(2..<6))
        #expect(
            listener.calls == [
                .init(kind: .start, first: at(2).page, pages: 4, present: 4),
                .init(kind: .end, first: at(2).page, pages: 4, present: 0),
            ])
        #expect(try space.load(at(1)) == 1)
        #expect(throws: Errno.EFAULT) { try space.load(at(2)) }
        try space.unmap(pages(2..<6))
        #expect(listener.calls.count == 2, "nothing mapped, nothing told")
    }

    @Test func `mprotect tells, keeps the frame, and takes the right away inside`() throws {
        let space = test.space()
        defer { space.exit() }
        try space.mapPages(0, 2)
        try space.store(at(0), 1)
        let frame = space.translate(at(0))?.frame
        let listener = ListeningNotifier(space)
        space.register(listener)
        try space.protect(pages(0..<1), .read)
        #expect(listener.starts == 1 && listener.isBalanced)
        #expect(space.translate(at(0))?.frame == frame && space.translate(at(0))?.writable == false)
        try space.protect(pages(0..<1), .none)
        #expect(space.translate(at(0)) == nil)
        #expect(throws: Errno.EFAULT) { try space.load(at(0)) }
        try space.protect(pages(0..<1), .readWrite)
        #expect(space.translate(at(0))?.frame == frame && space.translate(at(0))?.writable == true)
        #expect(try space.load(at(0)) == 1)
        try space.protect(pages(0..<1), .readWrite)
        #expect(listener.starts == 3, "no change, nothing told")
    }

    @Test func `discarding tells for each VMA and the next access finds zeros`() throws {
        let space = test.space()
        defer { space.exit() }
        try space.mapPages(0, 2)
        try space.mapPages(2, 2, .anonymous, .readWriteExecute)
        for page in 0..<4 { try space.store(at(page), 1) }
        let listener = ListeningNotifier(space)
        space.register(listener)
        try space.advise(pages(1..<3), .dontNeed)
        #expect(listener.calls.map(\.present) == [1, 0, 1, 0])
        #expect(try space.load(at(1)) == 0)
        #expect(try space.load(at(0)) == 1)
        #expect(throws: Errno.ENOMEM) { try space.advise(pages(3..<6), .dontNeed) }
        #expect(try space.load(at(3)) == 0, "what is mapped was discarded all the same")
    }

    @Test func `truncation and holes reach every address space; private copies go only with the end of the file`()
        throws
    {
        let first = test.space()
        let second = test.space()
        defer {
            first.exit()
            second.exit()
        }
        let object = MemoryObject(host: test.host, pages: 4)
        try first.mapPages(0, 4, .object(object))
        try second.mapPages(2, 2, .object(object, firstPage: 2, shared: false))
        for page in 0..<4 { try first.store(at(page), 5) }
        try second.store(at(2), 6)
        #expect(try second.load(at(3)) == 5)
        let listeners = [ListeningNotifier(first), ListeningNotifier(second)]
        first.register(listeners[0])
        second.register(listeners[1])
        object.punchHole(1..<3)
        #expect(listeners[0].calls.map(\.present) == [2, 0])
        #expect(listeners[1].calls.map(\.present) == [1, 1])
        #expect(try first.load(at(2)) == 0)
        #expect(try second.load(at(2)) == 6)
        object.truncate(to: 2)
        for listener in listeners { #expect(listener.isBalanced) }
        #expect(throws: Errno.EFAULT) { try first.load(at(2)) }
        #expect(throws: Errno.EFAULT) { try second.load(at(2)) }
        #expect(try first.load(at(0)) == 5)
        object.truncate(to: 4)
        #expect(try first.load(at(3)) == 0)
    }

    @Test func `poison is told to every address space that maps the page, and the frame never comes back`() throws {
        let space = test.space()
        let free = test.memory.freeFrames
        try space.mapPages(0, 1)
        try space.store(at(0), 1)
        let child = try space.fork()
        let listeners = [ListeningNotifier(space), ListeningNotifier(child)]
        space.register(listeners[0])
        child.register(listeners[1])
        test.host.poison(try #require(space.translate(at(0))).frame)
        for listener in listeners { #expect(listener.calls.map(\.present) == [1, 0]) }
        #expect(throws: Errno.EHWPOISON) { try child.load(at(0)) }
        child.exit()
        space.exit()
        #expect(test.memory.freeFrames == free - 1)
    }

    @Test func `exit releases the notifiers, and nothing is told afterwards`() throws {
        let space = test.space()
        try space.mapPages(0, 1)
        try space.store(at(0), 1)
        let listener = ListeningNotifier(space)
        space.register(listener)
        space.exit()
        #expect(listener.released == 1 && listener.calls.isEmpty)
        space.unregister(listener)
        #expect(listener.released == 1)
    }

    @Test func `unregistering releases once and ends the telling`() throws {
        let space = test.space()
        defer { space.exit() }
        try space.mapPages(0, 1)
        try space.store(at(0), 1)
        let listener = ListeningNotifier(space)
        space.register(listener)
        space.unregister(listener)
        try space.unmap(pages(0..<1))
        #expect(listener.released == 1 && listener.calls.isEmpty)
    }

    @Test func `ageing asks every listener`() {
        let space = test.space()
        defer { space.exit() }
        let listener = ListeningNotifier(space)
        space.register(listener)
        #expect(!space.clearYoung(pages(0..<1)))
        listener.young = true
        #expect(space.clearYoung(pages(0..<1)))
        #expect(listener.calls.isEmpty)
    }
}

@Suite struct AddressSpaceCalls {
    let test = TestHost(ramFrames: 2048)

    @Test func `mapping checks its arguments`() throws {
        let space = test.space()
        defer { space.exit() }
        func answer(_ address: UInt64, _ length: UInt64) -> Errno? {
            do {
                try space.map(
                    at: UserAddress(address), length: length, protection: .read, backing: .anonymous)
                return nil
            } catch { return error }
        }
        #expect(answer(0x1000_0001, 4096) == .EINVAL)
        #expect(answer(0x1000_0000, 0) == .EINVAL)
        #expect(answer(0x1000_0000, 4095) == .EINVAL)
        #expect(answer(UserAddress.end.value, 4096) == .EINVAL)
        #expect(answer(UInt64.max & ~4095, 8192) == .EINVAL)
        #expect(answer(0x1000_0000, 8192) == nil)
        #expect(answer(0x1000_1000, 4096) == .EEXIST)
        #expect(answer(0x0fff_f000, 8192) == .EEXIST)
        #expect(answer(0x1000_2000, 4096) == nil)
        #expect(answer(0x0fff_f000, 4096) == nil)
        #expect(answer(UserAddress.end.value - 4096, 4096) == nil)
    }

    @Test func `looking up finds the VMA that contains the address`() throws {
        let space = test.space()
        defer { space.exit() }
        for page in stride(from: 0, to: 40, by: 4) { try space.mapPages(page, 2) }
        space.mmapLock.lockForRead()
        for page in 0..<44 {
            let vma = space.vmaLookup(at(page, 8))
            #expect((vma != nil) == (page < 40 && page % 4 < 2), "page \(page)")
            if let vma { #expect(vma.range == pages(page / 4 * 4..<page / 4 * 4 + 2)) }
        }
        space.mmapLock.unlockRead()
    }

    @Test func `parts split off keep their place in the backing`() throws {
        let space = test.space()
        defer { space.exit() }
        let object = MemoryObject(host: test.host, pages: 16)
        for page in 0..<16 { try object.write(page: page, offset: 0, UInt64(page)) }
        try space.mapPages(0, 8, .object(object, firstPage: 8))
        try space.unmap(pages(2..<3))
        try space.protect(pages(5..<6), .read)
        for page in [0, 1, 3, 4, 5, 6, 7] { #expect(try space.load(at(page)) == UInt64(page + 8)) }
        object.punchHole(12..<14)
        #expect(try space.load(at(4)) == 0)
        #expect(try space.load(at(5)) == 0)
        #expect(try space.load(at(6)) == 14)
    }

    @Test func `protecting changes what lies before a hole`() throws {
        let space = test.space()
        defer { space.exit() }
        try space.mapPages(0, 1)
        try space.mapPages(2, 1)
        try space.store(at(0), 1)
        #expect(throws: Errno.ENOMEM) { try space.protect(pages(0..<3), .none) }
        #expect(throws: Errno.EFAULT) { try space.load(at(0)) }
        try space.store(at(2), 1)
        #expect(throws: Errno.EFAULT) { try space.load(at(1)) }
    }

    @Test func `everything is given back at exit`() throws {
        let free = test.memory.freeFrames
        let space = test.space()
        try space.mapPages(0, 64)
        try space.mapPages(100, 4, .anonymousShared)
        for page in 0..<64 { try space.store(at(page), 1) }
        try space.store(at(101), 1)
        let child = try space.fork()
        try child.store(at(0), 2)
        space.exit()
        #expect(try child.load(at(1)) == 1)
        child.exit()
        #expect(test.memory.freeFrames == free)
    }

    @Test func `an address space that is dropped without exit gives everything back too`() throws {
        let leaked = try test.leaked {
            let space = test.space()
            try space.mapPages(0, 4)
            try space.store(at(0), 1)
        }
        #expect(leaked == 0)
    }

    @Test func `a fork without memory leaves the parent as it was`() throws {
        let space = test.space()
        defer { space.exit() }
        try space.mapPages(0, 16)
        for page in 0..<16 { try space.store(at(page), UInt64(page)) }
        var eaten: [HostFrame] = []
        while test.memory.freeFrames > 2, let frame = test.memory.allocatePages(order: 0) { eaten.append(frame) }
        #expect(throws: Errno.ENOMEM) { try space.fork() }
        #expect(test.memory.freeFrames == 2)
        for page in 0..<16 {
            try space.store(at(page), UInt64(page + 1))
            #expect(try space.load(at(page)) == UInt64(page + 1))
        }
        for frame in eaten { test.memory.put(test.memory.page(frame)) }
    }

    @Test func `going away, an entry gives its accessed and dirty bits to its page`() throws {
        let space = test.space()
        defer { space.exit() }
        let object = MemoryObject(host: test.host, pages: 2)
        try space.mapPages(0, 2, .object(object))
        #expect(try space.load(at(0)) == 0)
        try space.store(at(1), 1)
        try space.unmap(pages(0..<2))
        let clean = test.state(try #require(object.frame(of: 0))).flags
        let dirty = test.state(try #require(object.frame(of: 1))).flags
        #expect(clean.isAccessed(by: .primaryEntry) && !clean.isDirty)
        #expect(dirty.isDirty(by: .primaryEntry))
    }

    @Test func `a fresh zero arena is not touched by reading it`() throws {
        let bytes = 256 * Int(pageSize)
        let arena = UnsafeMutableRawPointer.allocate(byteCount: bytes, alignment: Int(pageSize))
        defer { arena.deallocate() }
        arena.initializeMemory(as: UInt8.self, repeating: 0, count: bytes)
        let memory = PhysicalMemory(arena: arena, ramFrames: 256, arenaIsZero: true)
        let host = Host(memory: memory, transparentHugePages: false)
        let space = AddressSpace(host: host)
        try space.mapPages(0, 2)
        try space.store(at(0), 5)
        let frame = try #require(space.translate(at(0))).frame
        try space.unmap(pages(0..<1))
        try space.mapPages(0, 1)
        for page in 0..<2 {
            try space.store(at(page), 0)
            #expect(try space.load(at(page, 8)) == 0)
        }
        #expect(!memory.inspect(frame)!.flags.isKnownZero, "what was written is not known zero")
        space.exit()
    }
}
