import Audit
import Frames
import Synchrony
import Testing

@testable import HostMemory

@Suite struct I29_CopyOnWrite {
    let test = TestHost(ramFrames: 2048)

    @Test func `a read maps the page of zeros, which no count knows of`() throws {
        let space = test.space()
        defer { space.exit() }
        try space.mapPages(0, 1)
        let before = test.state(test.host.zeroPage)
        #expect(try space.load(at(0)) == 0)
        let entry = try #require(space.translate(at(0)))
        #expect(entry.frame == test.host.zeroPage && entry.special && !entry.writable)
        #expect(test.state(test.host.zeroPage) == before)
    }

    @Test func `a write after the read replaces the frame between the notifier's start and end`() throws {
        let space = test.space()
        defer { space.exit() }
        let listener = ListeningNotifier(space)
        space.register(listener)
        try space.mapPages(0, 1)
        #expect(try space.load(at(0)) == 0)
        #expect(listener.calls.isEmpty, "filling an absent entry is no business of the notifier's")
        try space.store(at(0), 9)
        #expect(listener.starts == 1 && listener.isBalanced)
        #expect(space.translate(at(0))?.frame != test.host.zeroPage)
        #expect(try space.load(at(0)) == 9)
        #expect(test.events(.copyOnWrite).count == 1)
    }

    @Test func `fork write-protects the parent under the notifier and shares each page`() throws {
        let space = test.space()
        let listener = ListeningNotifier(space)
        space.register(listener)
        try space.mapPages(0, 3)
        try space.store(at(0), 10)
        try space.store(at(2), 12)
        let frame = try #require(space.translate(at(0))).frame
        let child = try space.fork()
        #expect(listener.calls.map(\.present) == [2, 2])
        #expect(listener.calls[0].first == at(0).page && listener.calls[0].pages == 3)
        for one in [space, child] {
            let entry = try #require(one.translate(at(0)))
            #expect(entry.frame == frame && !entry.writable)
        }
        #expect(test.state(frame).referenceCount == 2 && test.state(frame).mapCount == 2)
        #expect(test.state(frame).flags.bits & PageFlags.anonymousExclusive == 0)
        try child.store(at(0), 20)
        #expect(try space.load(at(0)) == 10)
        #expect(try child.load(at(2)) == 12)
        child.exit()
        space.exit()
    }

    @Test func `the last one who maps a page keeps it on a write, and no notifier hears of it`() throws {
        let space = test.space()
        try space.mapPages(0, 1)
        try space.store(at(0), 10)
        let frame = try #require(space.translate(at(0))).frame
        let child = try space.fork()
        child.exit()
        let listener = ListeningNotifier(space)
        space.register(listener)
        try space.store(at(0), 11)
        #expect(space.translate(at(0))?.frame == frame)
        #expect(listener.calls.isEmpty)
        #expect(test.state(frame).flags.bits & PageFlags.anonymousExclusive != 0)
        space.exit()
    }

    @Test func `an extra reference forces a copy, and its holder keeps the old page`() throws {
        let space = test.space()
        try space.mapPages(0, 1)
        try space.store(at(0), 10)
        let child = try space.fork()
        let held = try space.getUserPageUnlocked(at(0), LookupFlags(), holder: .getUserPages)
        child.exit()
        try space.store(at(0), 11)
        #expect(space.translate(at(0))?.frame != held.frame)
        #expect(test.memory.word(at: held.frame.physicalAddress).load() == 10)
        let free = test.memory.freeFrames
        held.releaseUnused()
        #expect(test.memory.freeFrames == free + 1)
        space.exit()
    }

    @Test func `fork copies a pinned page at once, and the parent's stays writable`() throws {
        let space = test.space()
        try space.mapPages(0, 1)
        try space.store(at(0), 10)
        let pin = try space.pinUserPageFast(at(0), write: true, holder: .hostMap)
        let child = try space.fork()
        let mine = try #require(space.translate(at(0)))
        #expect(mine.frame == pin.frame && mine.writable)
        #expect(child.translate(at(0))?.frame != pin.frame)
        #expect(try child.load(at(0)) == 10)
        pin.unpin(dirty: false)
        child.exit()
        space.exit()
    }

    @Test func `a private mapping of an object copies from the object's page`() throws {
        let space = test.space()
        defer { space.exit() }
        let object = MemoryObject(host: test.host, pages: 2)
        try object.write(page: 0, offset: 8, 33)
        try space.mapPages(0, 2, .object(object, shared: false))
        #expect(try space.load(at(0, 8)) == 33)
        #expect(space.translate(at(0))?.frame == object.frame(of: 0))
        #expect(space.translate(at(0))?.writable == false)
        try space.store(at(0), 44)
        #expect(try space.load(at(0, 8)) == 33)
        #expect(try object.read(page: 0, offset: 0) == 0)
        try space.store(at(1), 55)
        #expect(try object.read(page: 1, offset: 0) == 0)
    }

    @Test func `taking the right to write away and giving it back makes no shared page writable`() throws {
        let space = test.space()
        let object = MemoryObject(host: test.host, pages: 1)
        try space.mapPages(0, 3)
        try space.mapPages(3, 1, .object(object, shared: false))
        try space.store(at(0), 1)
        #expect(try space.load(at(1)) == 0)
        #expect(try space.load(at(3)) == 0)
        let child = try space.fork()
        try space.store(at(2), 3)
        for one in [space, child] {
            try one.protect(pages(0..<4), .read)
            try one.protect(pages(0..<4), .readWrite)
            // Of the object's page, which has no private copy, the child has no entry.
            for page in [0, 1, 3] { #expect(one.translate(at(page))?.writable != true, "page \(page)") }
        }
        #expect(space.translate(at(2))?.writable == true, "an exclusive page needs no fault")
        for page in 0..<4 { try space.store(at(page), 100) }
        #expect(try child.load(at(0)) == 1)
        #expect(try object.read(page: 0, offset: 0) == 0)
        child.exit()
        space.exit()
    }

    @Test func `a shared mapping is the object, also over fork`() throws {
        let space = test.space()
        try space.mapPages(0, 2, .anonymousShared)
        try space.store(at(0), 1)
        let child = try space.fork()
        try child.store(at(0), 2)
        try child.store(at(1), 3)
        #expect(try space.load(at(0)) == 2)
        #expect(try space.load(at(1)) == 3)
        #expect(space.translate(at(0))?.writable == true)
        child.exit()
        space.exit()
    }

    @Test func `a read of a shared writable mapping makes a writable entry`() throws {
        let space = test.space()
        defer { space.exit() }
        try space.mapPages(0, 1, .anonymousShared)
        #expect(try space.load(at(0)) == 0)
        #expect(space.translate(at(0))?.writable == true && space.translate(at(0))?.dirty == false)
        #expect(space.gives(at(0), write: true))
    }

    /// Every short program of two processes over two pages against the obvious model: each has its own values.
    @Test func `no order of writes, forks and discards lets one process see another's writes`() throws {
        enum Step: CaseIterable { case write0, write1, childWrite0, childWrite1, fork, discard, pin, unshare }
        func run(_ steps: [Step]) throws {
            let test = TestHost(ramFrames: 128)
            let free = test.memory.freeFrames
            let parent = test.space()
            try parent.mapPages(0, 2)
            var child: AddressSpace?
            var mine: [UInt64] = [0, 0]
            var theirs: [UInt64] = [0, 0]
            for (index, step) in steps.enumerated() {
                let value = UInt64(index + 1)
                switch step {
                case .write0, .write1:
                    let page = step == .write0 ? 0 : 1
                    try parent.store(at(page), value)
                    mine[page] = value
                case .childWrite0, .childWrite1:
                    let page = step == .childWrite0 ? 0 : 1
                    try child?.store(at(page), value)
                    theirs[page] = value
                case .fork:
                    child?.exit()
                    child = try parent.fork()
                    theirs = mine
                case .discard:
                    try parent.advise(pages(0..<1), .dontNeed)
                    mine[0] = 0
                case .pin: try parent.pinUserPageFast(at(1), write: true, holder: .getUserPages).unpin(dirty: true)
                case .unshare:
                    try parent.pinUserPageUnlocked(at(1), LookupFlags(), holder: .getUserPages).unpin(dirty: true)
                }
                for page in 0...1 {
                    #expect(try parent.load(at(page)) == mine[page], "\(steps)")
                    if let child { #expect(try child.load(at(page)) == theirs[page], "\(steps)") }
                }
            }
            child?.exit()
            parent.exit()
            #expect(test.memory.freeFrames == free, "\(steps)")
        }
        for a in Step.allCases {
            for b in Step.allCases {
                for c in Step.allCases { try run([.write1, a, b, c]) }
            }
        }
    }
}

@Suite struct HugePagesOnFault {
    let test = TestHost(ramFrames: 1 << 13, thp: true)

    @Test func `a fault maps 2 MiB with one leaf and one reference`() throws {
        let space = test.space()
        try space.mapPages(0, 1024)
        let free = test.memory.freeFrames
        try space.store(at(515), 7)
        let entry = try #require(space.translate(at(515)))
        #expect(entry.level == .page2M && entry.writable && entry.frame.number % 512 == 3)
        #expect(space.mappingLevel(of: at(600)) == .page2M)
        #expect(space.mappingLevel(of: at(0)) == .page4K)
        #expect(test.state(entry.frame).headReferenceCount == 1)
        #expect(try space.load(at(1023)) == 0)
        #expect(free - test.memory.freeFrames == 512 + 4)
        space.exit()
        #expect(test.memory.freeFrames == free)
    }

    @Test func `no huge page where the VMA is too small, was advised against, or small ones are there`() throws {
        let space = test.space()
        defer { space.exit() }
        try space.mapPages(1, 1022)
        try space.store(at(1), 1)
        try space.store(at(600), 1)
        #expect(space.mappingLevel(of: at(600)) == .page4K)
        try space.mapPages(1024, 512)
        try space.advise(pages(1024..<1536), .noHugePage)
        try space.store(at(1024), 1)
        #expect(space.mappingLevel(of: at(1024)) == .page4K)
        try space.advise(pages(1024..<1536), .hugePage)
        try space.store(at(1025), 1)
        #expect(space.mappingLevel(of: at(1025)) == .page4K)
    }

    @Test func `advice brings huge pages where they are not the rule`() throws {
        let test = TestHost(ramFrames: 1 << 12)
        let space = test.space()
        defer { space.exit() }
        try space.mapPages(0, 1024)
        try space.advise(pages(0..<512), .hugePage)
        try space.store(at(0), 1)
        try space.store(at(512), 1)
        #expect(space.mappingLevel(of: at(0)) == .page2M && space.mappingLevel(of: at(512)) == .page4K)
    }

    @Test func `a partial unmap splits the leaf, one reference an entry`() throws {
        let space = test.space()
        let listener = ListeningNotifier(space)
        let free = test.memory.freeFrames
        try space.mapPages(0, 512)
        for page in [0, 99, 100, 511] { try space.store(at(page), UInt64(page)) }
        let first = try #require(space.translate(at(0))).frame
        space.register(listener)
        try space.unmap(pages(100..<200))
        #expect(listener.isBalanced)
        #expect(listener.calls.contains { $0.first == at(100).page && $0.pages == 100 && $0.kind == .start })
        #expect(space.translate(at(100)) == nil && space.mappingLevel(of: at(0)) == .page4K)
        #expect(test.state(first).headReferenceCount == 412)
        for page in [0, 99, 511] { #expect(try space.load(at(page)) == UInt64(page)) }
        #expect(space.translate(at(511))?.writable == true)
        #expect(test.state(first.advanced(by: 511)).mapCount == 1)
        space.exit()
        #expect(test.memory.freeFrames == free)
    }

    @Test func `a write after fork keeps an exclusive huge page and splits a shared one`() throws {
        let space = test.space()
        let free = test.memory.freeFrames
        try space.mapPages(0, 512)
        try space.store(at(5), 5)
        try space.store(at(6), 6)
        let first = try #require(space.translate(at(0))).frame
        let child = try space.fork()
        #expect(test.state(first).headReferenceCount == 2)
        #expect(space.mappingLevel(of: at(5)) == .page2M && space.translate(at(5))?.writable == false)
        try space.store(at(5), 50)
        #expect(space.mappingLevel(of: at(5)) == .page4K)
        #expect(space.translate(at(5))?.frame != first.advanced(by: 5))
        #expect(space.translate(at(6))?.frame == first.advanced(by: 6))
        #expect(try child.load(at(5)) == 5)
        #expect(try child.load(at(6)) == 6)
        space.exit()
        try child.store(at(6), 60)
        #expect(child.translate(at(6))?.frame == first.advanced(by: 6) && child.mappingLevel(of: at(6)) == .page2M)
        child.exit()
        #expect(test.memory.freeFrames == free)
    }

    @Test func `fork splits a pinned huge page and copies all of it that is exclusive`() throws {
        let space = test.space()
        let free = test.memory.freeFrames
        try space.mapPages(0, 512)
        try space.store(at(5), 5)
        let pin = try space.pinUserPageFast(at(5), write: true, holder: .hostMap)
        let child = try space.fork()
        #expect(space.translate(at(5))?.frame == pin.frame && space.translate(at(5))?.writable == true)
        #expect(child.translate(at(5))?.frame != pin.frame)
        #expect(try child.load(at(5)) == 5)
        pin.unpin(dirty: false)
        child.exit()
        space.exit()
        #expect(test.memory.freeFrames == free)
    }

    @Test func `protecting all of it changes the leaf, a part of it splits`() throws {
        let space = test.space()
        defer { space.exit() }
        try space.mapPages(0, 512)
        try space.store(at(5), 5)
        try space.protect(pages(0..<512), .read)
        #expect(space.mappingLevel(of: at(5)) == .page2M && space.translate(at(5))?.writable == false)
        try space.protect(pages(0..<512), .readWrite)
        #expect(space.mappingLevel(of: at(5)) == .page2M && space.translate(at(5))?.writable == true)
        try space.protect(pages(0..<8), .read)
        #expect(space.mappingLevel(of: at(5)) == .page4K && space.translate(at(5))?.writable == false)
        #expect(space.translate(at(8))?.writable == true)
        #expect(try space.load(at(5)) == 5)
        #expect(throws: Errno.EFAULT) { try space.store(at(5), 1) }
    }

    @Test func `get-user-pages takes the exact page of a huge one and marks the entry only`() throws {
        let space = test.space()
        defer { space.exit() }
        try space.mapPages(0, 512)
        try space.store(at(0), 1)
        let first = try #require(space.translate(at(0))).frame
        let page = try space.getUserPageUnlocked(at(17), LookupFlags(write: true), holder: .getUserPages)
        #expect(page.frame == first.advanced(by: 17))
        #expect(test.state(first).headReferenceCount == 2)
        page.releaseUnused()
        #expect(!test.state(first).flags.isDirty && !test.state(first).flags.isAccessed)
    }

    @Test func `with no order-9 block left small pages serve`() throws {
        let small = TestHost(ramFrames: 400, thp: true)
        let space = small.space()
        defer { space.exit() }
        try space.mapPages(0, 512)
        try space.store(at(3), 3)
        #expect(space.mappingLevel(of: at(3)) == .page4K)
        #expect(try space.load(at(3)) == 3)
    }
}
