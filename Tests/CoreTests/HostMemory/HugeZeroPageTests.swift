import Audit
import Frames
import Synchrony
import Testing

@testable import HostMemory

/// Reads of memory that nobody wrote, where huge pages are wanted. Kernel: `huge_zero_folio`.
@Suite struct HugeZeroPage {
    let test = TestHost(ramFrames: 4096, thp: true)
    private static let huge = PageLevel.page2M.bytes

    private func untouched(_ hugePages: Int = 1) throws -> AddressSpace {
        let space = test.space()
        try space.mapPages(0, hugePages * 512)
        return space
    }

    @Test func `a read maps one and the same huge page of zeros everywhere`() throws {
        let before = test.memory.freeFrames
        let one = try untouched(2)
        let other = try untouched(1)
        #expect(try one.load(at(5)) == 0 && one.load(at(700)) == 0 && other.load(at(9)) == 0)
        let first = try #require(one.translate(at(0)))
        #expect(first.level == .page2M && !first.writable)
        #expect(one.translate(at(512))?.frame == first.frame && other.translate(at(0))?.frame == first.frame)
        // Nobody's entries are counted, and there is one of it.
        #expect(test.memory.inspect(first.frame)?.referenceCount == 1)
        #expect(test.memory.inspect(first.frame)?.mapCount == 0)
        one.exit()
        #expect(try other.load(at(300)) == 0)
        other.exit()
        #expect(test.memory.freeFrames == before)
    }

    @Test func `a write gets a huge page of its own, and who listens hears of it`() throws {
        let space = try untouched()
        let other = try untouched()
        #expect(try space.load(at(0)) == 0 && other.load(at(0)) == 0)
        let listener = ListeningNotifier(space)
        space.register(listener)
        try space.store(at(3), 7)
        #expect(listener.calls.map(\.pages) == [512, 512] && listener.isBalanced)
        #expect(space.translate(at(0))?.writable == true && space.translate(at(0))?.level == .page2M)
        #expect(try space.load(at(3)) == 7 && space.load(at(4)) == 0 && other.load(at(3)) == 0)
        space.unregister(listener)
        space.exit()
        other.exit()
    }

    @Test func `where no block is left a write gets a small page, and its neighbours small zeros`() throws {
        let space = try untouched()
        #expect(try space.load(at(0)) == 0)
        var blocks: [HostFrame] = []
        while let block = test.memory.allocatePages(order: 9) { blocks.append(block) }
        try space.store(at(3), 7)
        #expect(space.translate(at(3))?.level == .page4K && space.translate(at(3))?.writable == true)
        #expect(space.translate(at(4))?.frame == test.host.zeroPage)
        #expect(try space.load(at(3)) == 7 && space.load(at(4)) == 0)
        for block in blocks { test.memory.put(test.memory.page(block)) }
        space.exit()
    }

    @Test func `a reference from get_user_pages is counted, and outlives the mapping`() throws {
        let before = test.memory.freeFrames
        let space = try untouched()
        let page = try space.getUserPageUnlocked(at(5), LookupFlags(), holder: .getUserPages)
        let frame = page.frame
        #expect(frame == space.translate(at(5))?.frame)
        #expect(test.memory.inspect(frame)?.headReferenceCount == 2)
        space.exit()
        #expect(test.memory.inspect(frame)?.headReferenceCount == 1)
        page.releaseUnused()
        #expect(test.memory.freeFrames == before)
    }

    @Test func `a pin for long gets a page that stays`() throws {
        let space = try untouched()
        #expect(try space.load(at(0)) == 0)
        let zeros = space.translate(at(0))?.frame
        let short = try space.pinUserPageUnlocked(at(0), LookupFlags(), holder: .getUserPages)
        #expect(short.frame == zeros)
        short.unpin(dirty: false)
        let long = try space.pinUserPageUnlocked(at(0), LookupFlags(longTerm: true), holder: .getUserPages)
        #expect(long.frame != zeros)
        try space.store(at(0), 8)
        #expect(space.translate(at(0))?.frame == long.frame)
        long.unpin(dirty: false)
        space.exit()
    }

    @Test func `what cuts through it makes small zeros of it`() throws {
        let before = test.memory.freeFrames
        let cuts: [(AddressSpace) throws -> Void] = [
            { try $0.unmap(pages(10..<20)) },
            { try $0.protect(pages(10..<20), .read) },
            { try $0.advise(pages(10..<20), .dontNeed) },
            { try $0.remap(pages(0..<256), length: 256 * pageSize, to: at(2048)) },
        ]
        for cut in cuts {
            let space = try untouched()
            #expect(try space.load(at(0)) == 0)
            try cut(space)
            #expect(space.translate(at(300))?.frame == test.host.zeroPage)
            try space.store(at(300), 3)
            #expect(try space.load(at(300)) == 3 && space.load(at(301)) == 0)
            space.exit()
        }
        #expect(test.memory.freeFrames == before)
    }

    @Test func `mprotect of all of it leaves it whole, and lets nobody write to it`() throws {
        let space = try untouched()
        #expect(try space.load(at(0)) == 0)
        let zeros = space.translate(at(0))?.frame
        try space.protect(pages(0..<512), .read)
        try space.protect(pages(0..<512), .readWrite)
        #expect(space.translate(at(0))?.frame == zeros && space.translate(at(0))?.writable == false)
        try space.store(at(0), 1)
        #expect(space.translate(at(0))?.frame != zeros)
        space.exit()
    }

    @Test func `fork shares it, and the child's write is the child's`() throws {
        let before = test.memory.freeFrames
        let space = try untouched()
        #expect(try space.load(at(0)) == 0)
        let child = try space.fork()
        #expect(child.translate(at(0))?.frame == space.translate(at(0))?.frame)
        try child.store(at(1), 6)
        #expect(try space.load(at(1)) == 0 && child.load(at(1)) == 6)
        space.exit()
        #expect(try child.load(at(2)) == 0)
        child.exit()
        #expect(test.memory.freeFrames == before)
    }

    @Test func `it is neither broken, moved, nor collapsed`() throws {
        let space = try untouched()
        #expect(try space.load(at(0)) == 0)
        let zeros = try #require(space.translate(at(0))?.frame)
        #expect(!test.host.poison(zeros.advanced(by: 4)))
        try space.advise(pages(0..<512), .collapse)
        try space.advise(pages(0..<512), .free)
        space.hintNUMA(pages(0..<512))
        #expect(space.translate(at(0))?.frame == zeros && space.translate(at(0))?.level == .page2M)
        space.exit()
    }

    @Test func `no allocation that fails on the way loses anything`() throws {
        for failing in 1...8 {
            let test = TestHost(ramFrames: 4096, thp: true)
            let leaked = test.leaked {
                let space = test.space()
                test.memory.failAllocation(failing)
                do {
                    try space.mapPages(0, 512)
                    _ = try space.access(at(0), store: nil)
                    let child = try space.fork()
                    _ = try child.access(at(1), store: 4)
                    #expect(try space.load(at(1)) == 0)
                    child.exit()
                } catch let error as Errno {
                    #expect(error == .ENOMEM)
                } catch {
                    #expect(error as? UserFault == .outOfMemory)
                }
                space.exit()
            }
            #expect(leaked == 0, "allocation \(failing)")
        }
    }
}
