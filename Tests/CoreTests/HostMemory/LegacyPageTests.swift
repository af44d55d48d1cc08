import Audit
import Frames
import Testing

@testable import HostMemory

/// Generic 10.1: what the heuristic of the old policies finds, kind by kind.
@Suite struct Rows10_1_LegacyPageLookup {
    let test = TestHost(ramFrames: 1024, deviceFrames: 16)
    var lookup: LegacyPageLookup { LegacyPageLookup(memory: test.memory) }

    @Test func `a device frame and a reserved frame have no page, the page of zeros has`() throws {
        let device = try #require(test.memory.allocateDeviceFrames(1))
        let reserved = try #require(test.host.reserveFrames(1))
        #expect(lookup.refcountedPage(of: device.lowerBound) == nil)
        #expect(lookup.refcountedPage(of: reserved.lowerBound) == nil)
        #expect(lookup.refcountedPage(of: test.host.zeroPage)?.frame == test.host.zeroPage)
    }

    @Test func `only a frame's own counter counts: every tail refuses, compound or not`() throws {
        for shape in [PhysicalMemory.Shape.plain, .compound] {
            let block = try #require(test.memory.allocatePages(order: 2, shape: shape))
            for i in 0..<4 {
                let page = try #require(lookup.refcountedPage(of: block.advanced(by: i)))
                #expect(page.tryGet() == (i == 0), "\(shape) \(i)")
            }
            #expect(test.state(block).referenceCount == 2)
            lookup.refcountedPage(of: block)?.put()
            #expect(test.state(block).referenceCount == 1)
        }
    }

    @Test func `a reference that was taken by mistake frees the page under its owner when the owner is done`() throws {
        let free = test.memory.freeFrames
        let block = try #require(test.memory.allocatePages(order: 2, shape: .plain))
        #expect(lookup.refcountedPage(of: block)?.tryGet() == true)
        test.memory.freePlain(block, order: 2)
        #expect(test.memory.freeFrames == free - 1)
        lookup.refcountedPage(of: block)?.put()
        #expect(test.memory.freeFrames == free)
        #expect(test.journal.findings.contains { $0.invariant == .i5 })
    }

    @Test func `marks go to the folio's head, never to a reserved page`() throws {
        let block = try #require(test.memory.allocatePages(order: 2))
        let reserved = try #require(test.host.reserveFrames(1))
        lookup.setPFNDirty(block.advanced(by: 3))
        lookup.setPFNAccessed(block.advanced(by: 3))
        #expect(test.state(block).flags.isDirty(by: .kvm) && test.state(block).flags.isAccessed(by: .kvm))
        let before = test.state(reserved.lowerBound)
        let zero = test.state(test.host.zeroPage)
        lookup.setPFNDirty(reserved.lowerBound)
        lookup.setPFNDirty(test.host.zeroPage)
        lookup.refcountedPage(of: test.host.zeroPage)?.setAccessed()
        lookup.setPFNDirty(HostFrame(5000))
        #expect(test.state(reserved.lowerBound) == before && test.state(test.host.zeroPage) == zero)
        #expect(test.journal.findings.contains { $0.invariant == .i4 })
    }
}
